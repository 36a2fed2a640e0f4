# ruff: noqa: F811  (fixtures are imported by their names)
"""What users copy works as it stands: each snippet, each receiver and each request of the collection is run here."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests
import standardwebhooks

from backstage import meanwhile
from description import DESCRIPTION, followed, validator
from local.sandbox import Sandbox
from merchant import OTHER_SECRET, SECRET, Merchant, Received, merchant  # noqa: F401
from shop import ROOT, Server, Shop, free_port, open_shop, sandbox, wait_until  # noqa: F401
from test_notifications import deliver, let_pass

GUIDE = (ROOT / "docs/integrate.md").read_text()
SNIPPETS = {
    (step, language): code
    for language, step, code in re.findall(
        r"^```(\w+) (create|wait|verify|list|refund)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL
    )
}
STEPS = ("create", "wait", "verify", "list", "refund")
LANGUAGES = ("sh", "python", "php", "javascript")
RECEIVERS = {"python": "receiver.py", "php": "receiver.php", "javascript": "receiver.mjs"}
EXAMPLE_URL, EXAMPLE_ID = "https://pay.example.com", "PAY-3M7Q9XK2V5T8B1C4D6F0G2H4J6"
TOKENS = {"API_TOKEN": "open-sesame-0123", "ADMIN_TOKEN": "the-owner-0123456789"}
ORDER_1001: dict[str, Any] = {"amount": "1250.00", "metadata": {"order": "1001"}}


def each(languages: Iterable[str]) -> list[Any]:
    """As parameters. Other languages than Python need a program that `make test` does not install."""
    return [name if name == "python" else pytest.param(name, marks=pytest.mark.programs) for name in sorted(languages)]


def program(language: str) -> list[str]:
    if language == "python":
        return [sys.executable]
    name, package = {"sh": ("sh", "dash"), "php": ("php", "php-cli"), "javascript": ("node", "nodejs")}[language]
    for needed, its_package in ((name, package), ("curl", "curl"), ("openssl", "openssl")):
        assert shutil.which(needed) is not None, f"{needed} is missing: apt-get install {its_package}"
    return [name]


def start(language: str, file: Path, cwd: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program(language), *arguments, str(file)],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(language: str, code: str, folder: Path, **env: str) -> tuple[int, str]:
    """The exit status of a snippet and what it prints."""
    file = folder / f"snippet.{'mjs' if language == 'javascript' else language}"
    file.write_text(code)
    with start(language, file, folder, **env) as process:
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, output


@pytest.fixture
def served(database_url: str, sandbox: Sandbox, tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    with Server(database_url, sandbox, folder, **TOKENS, METRICS_TOKEN="count-0123456789") as server:
        sandbox.configure(webhook_url=f"{server.url}/api/v1/webhooks/paystack")
        yield server


# The snippets


def test_there_is_a_snippet_of_each_step_in_each_language() -> None:
    assert set(SNIPPETS) == {(step, language) for step in STEPS for language in LANGUAGES}
    for step, _ in SNIPPETS:
        assert f"# {step.capitalize()}\n" in GUIDE


@pytest.mark.parametrize("language", each(LANGUAGES))
def test_each_snippet_that_creates_and_waits_works_as_it_stands(served: Server, tmp_path: Path, language: str) -> None:
    """The provider is away at first, and the request is sent twice: there is one payment, and it is waited for."""
    served.sandbox.fault("initialize", "lost-request", times=2)
    create = SNIPPETS["create", language].replace(EXAMPLE_URL, served.url)
    outputs = [run(language, create, tmp_path, API_TOKEN="open-sesame-0123") for _ in range(2)]
    assert [status for status, _ in outputs] == [0, 0], outputs
    (payment,) = served.sql("SELECT id, reference, checkout_url FROM payments")
    for _, output in outputs:
        assert payment["id"] in output
        assert payment["checkout_url"] in output
    wait = SNIPPETS["wait", language].replace(EXAMPLE_URL, served.url).replace(EXAMPLE_ID, payment["id"])
    with meanwhile(lambda: run(language, wait, tmp_path, **TOKENS)) as waited:
        time.sleep(0.5)
        served.sandbox.pay(payment["reference"])
        status, output = waited()
    assert status == 0, output
    if language == "sh":
        assert '"status": "completed"' in output
    else:
        assert output == "deliver\n"


@pytest.mark.parametrize("language", each(LANGUAGES[1:]))
def test_no_snippet_delivers_what_was_paid_at_another_price(served: Server, tmp_path: Path, language: str) -> None:
    bearer = {"Authorization": "Bearer open-sesame-0123"}
    created = served.create(headers=bearer, amount=50, metadata={"order": "1001"})
    assert created.status_code == 201, created.text
    payment = created.json["payment"]
    served.sandbox.pay(payment["reference"])
    wait_until(lambda: served.sql("SELECT status FROM payments") == [{"status": "completed"}])
    wait = SNIPPETS["wait", language].replace(EXAMPLE_URL, served.url).replace(EXAMPLE_ID, payment["id"])
    assert run(language, wait, tmp_path, **TOKENS) == (0, "completed\n")


def paid_1001(served: Server) -> dict[str, Any]:
    created = served.create(headers={"Authorization": f"Bearer {TOKENS['API_TOKEN']}"}, **ORDER_1001)
    served.sandbox.pay(created.json["payment"]["reference"])
    paid = "SELECT status FROM payments WHERE id = %s"
    wait_until(lambda: served.sql(paid, created.json["payment"]["id"]) == [{"status": "completed"}])
    return dict(created.json["payment"])


@pytest.mark.parametrize("language", each(LANGUAGES))
def test_each_snippet_that_lists_finds_all_of_an_order_and_nothing_else(
    served: Server, tmp_path: Path, language: str
) -> None:
    ours = [paid_1001(served)["id"] for _ in range(2)]
    served.create(headers={"Authorization": f"Bearer {TOKENS['API_TOKEN']}"}, metadata={"order": "1002"})
    snippet = SNIPPETS["list", language].replace(EXAMPLE_URL, served.url)
    if language != "sh":  # which shows one page
        snippet = re.sub(r"(limit\W+)20", r"\g<1>1", snippet)
    status, output = run(language, snippet, tmp_path, **TOKENS)
    assert status == 0, output
    assert re.findall("PAY-[0-9A-Z]{26}", output) == ours[::-1]


@pytest.mark.parametrize("language", each(LANGUAGES))
def test_each_snippet_that_refunds_gives_back_once_also_when_the_answer_is_lost(
    served: Server, tmp_path: Path, language: str
) -> None:
    payment = paid_1001(served)
    served.sandbox.fault("refund", "lost-answer", times=1)
    snippet = SNIPPETS["refund", language].replace(EXAMPLE_URL, served.url).replace(EXAMPLE_ID, payment["id"])
    outputs = [run(language, snippet, tmp_path, **TOKENS) for _ in range(2)]
    assert [status for status, _ in outputs] == [0, 0], outputs
    (refund,) = served.sql("SELECT id, amount_minor, made_by FROM refunds")
    assert all(refund["id"] in output for _, output in outputs)
    assert (refund["amount_minor"], refund["made_by"]) == (1000, "operator:Ada")
    assert served.sandbox.calls("refund") == 1


@pytest.mark.programs
def test_the_back_offices_curl_lines_work_as_pasted(served: Server, tmp_path: Path) -> None:
    bearer = {"Authorization": f"Bearer {TOKENS['API_TOKEN']}"}
    payment = served.create(headers=bearer, metadata={"order": "1001"}).json["payment"]
    (lines,) = re.findall(r"^```sh\n(API=.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    lines = lines.replace(EXAMPLE_URL, served.url).replace(EXAMPLE_ID, payment["id"])
    status, output = run("sh", "set -e\n" + lines, tmp_path, **TOKENS)
    answers = [json.loads(line) for line in output.splitlines()]
    assert (status, {answer["status"] for answer in answers}) == (0, {"success"}), output
    assert len(answers) == lines.count("\nask ")
    assert served.sql("SELECT cancelled_at IS NOT NULL AS given_up FROM payments") == [{"given_up": True}]


@pytest.mark.parametrize("language", each(LANGUAGES))
def test_a_snippet_ends_with_the_reason_where_trying_again_is_of_no_use(
    served: Server, tmp_path: Path, language: str
) -> None:
    create = SNIPPETS["create", language].replace(EXAMPLE_URL, served.url)
    begun = time.monotonic()
    status, output = run(language, create, tmp_path, API_TOKEN="open-simsim-0123")
    assert status != 0
    assert "unauthorized" in output
    assert time.monotonic() - begun < 5


@pytest.fixture
def told(open_shop: Callable[..., Shop], merchant: Merchant) -> Received:
    """A real notification, with a signature of either secret."""
    shop = open_shop(NOTIFY_URL=merchant.url, NOTIFY_SECRET=f"{SECRET},{OTHER_SECRET}")
    shop.pay(shop.created(**ORDER_1001)["reference"])
    assert deliver(shop) == 1
    (received,) = merchant.received
    return received


def signed_at(received: Received, timestamp: int) -> dict[str, str]:
    """The headers as they would have been, had the notification been sent at another time."""
    moment = datetime.fromtimestamp(timestamp, UTC)
    signature = standardwebhooks.Webhook(SECRET).sign(received.id, moment, received.body.decode())
    return {"webhook-id": received.id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}


def cases(received: Received) -> dict[str, tuple[bool, bytes, dict[str, str], str]]:
    """Notifications to be verified: whether each is genuine, its body and headers, and the secret."""
    headers, body = {name: received.headers[name] for name in received.headers if "webhook-" in name}, received.body
    now = int(time.time())
    changed = body.replace(b'"amount": 1250.00', b'"amount": 9250.00')
    assert changed != body
    return {
        "as it came": (True, body, headers, SECRET),
        "by the other secret": (True, body, headers, OTHER_SECRET),
        "sent a while ago": (True, body, signed_at(received, now - 200), SECRET),
        "too old": (False, body, signed_at(received, now - 400), SECRET),
        "from the future": (False, body, signed_at(received, now + 400), SECRET),
        "another body": (False, changed, headers, SECRET),
        "another id": (False, body, {**headers, "webhook-id": headers["webhook-id"][:-1] + "x"}, SECRET),
        "another time": (False, body, {**headers, "webhook-timestamp": str(now + 1)}, SECRET),
        "a secret that nobody gave out": (False, body, headers, "whsec_" + "QUJD" * 11),
        "another version": (
            False,
            body,
            {**headers, "webhook-signature": "v2" + headers["webhook-signature"][2:44]},
            SECRET,
        ),
        "no signature": (False, body, {**headers, "webhook-signature": ""}, SECRET),
        "a bare version": (False, body, {**headers, "webhook-signature": "v1"}, SECRET),
        "garbage": (False, body, {**headers, "webhook-signature": "v1,!!!! ,v1,, v1a,="}, SECRET),
    }


HARNESS = {
    "python": """
import base64, binascii, hashlib, hmac, json, sys, time
{snippet}
cases = json.load(open("cases.json"))
print(json.dumps([verify(body.encode(), *rest) for body, *rest in cases]))
""",
    "php": """<?php
{snippet}
$cases = json_decode(file_get_contents('cases.json'), true);
echo json_encode(array_map(fn ($case) => verify(...$case), $cases));
""",
    "javascript": """
import {{ createHmac, timingSafeEqual }} from "node:crypto";
import {{ readFileSync }} from "node:fs";
{snippet}
console.log(JSON.stringify(JSON.parse(readFileSync("cases.json")).map((each) => verify(...each))));
""",
}


@pytest.mark.parametrize("language", each(HARNESS))
def test_each_snippet_that_verifies_tells_genuine_notifications_from_others(
    told: Received, tmp_path: Path, language: str
) -> None:
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    given = [
        [body.decode(), *(headers[name] for name in names), secret] for _, body, headers, secret in cases(told).values()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(given))
    snippet = SNIPPETS["verify", language]
    status, output = run(language, HARNESS[language].format(snippet=snippet), tmp_path)
    assert status == 0, output
    verdicts = dict(zip(cases(told), json.loads(output), strict=True))
    assert verdicts == {name: is_genuine for name, (is_genuine, *_) in cases(told).items()}


def test_the_snippet_for_the_shell_verifies_too(told: Received, tmp_path: Path) -> None:
    for name, (is_genuine, body, headers, secret) in cases(told).items():
        (tmp_path / "body").write_bytes(body)
        env = {header.removeprefix("webhook-"): value for header, value in headers.items()}
        status, output = run("sh", SNIPPETS["verify", "sh"], tmp_path, NOTIFY_SECRET=secret, **env)
        assert status == 0, output
        assert output in ({"genuine\n"} if is_genuine else {"forged\n", "old\n"}), name


# The receivers


@contextlib.contextmanager
def receiving(language: str, folder: Path, secret: str = SECRET) -> Iterator["Receiver"]:
    file = ROOT / "docs/receivers" / RECEIVERS[language]
    port = str(free_port())
    arguments = ["-S", f"127.0.0.1:{port}"] if language == "php" else []
    process = start(language, file, folder, *arguments, NOTIFY_SECRET=secret, PORT=port)
    receiver = Receiver(process, f"http://127.0.0.1:{port}/paygate")
    try:
        wait_until(receiver.answers)
        yield receiver
    finally:
        process.kill()
        process.wait(10)


class Receiver:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def said(self) -> list[str]:
        """What it has said about orders, in its order."""
        words = "deliver: |delivered before: |not what we sell: |incident.opened|payment.\\w+"
        return [found[0].strip() for line in self.lines if (found := re.search(f"(?:{words}).*$", line))]

    def answers(self) -> bool:
        assert self.process.poll() is None, "".join(self.lines)
        with contextlib.suppress(requests.ConnectionError):
            return self.send(b"{}", {}) == 401
        return False

    def send(self, body: bytes, headers: dict[str, str]) -> int:
        return requests.post(self.url, data=body, headers=headers, timeout=5).status_code


@pytest.mark.parametrize("language", each(RECEIVERS))
def test_each_receiver_delivers_what_was_paid_once(
    open_shop: Callable[..., Shop], tmp_path: Path, language: str
) -> None:
    with receiving(language, tmp_path) as receiver:
        shop = open_shop(NOTIFY_URL=receiver.url, NOTIFY_SECRET=SECRET)
        shop.pay(shop.created(**ORDER_1001)["reference"])
        assert deliver(shop) == 1
        wait_until(lambda: receiver.said == ["deliver: 1001"])
        shop.sql("UPDATE notifications SET delivered_at = NULL, due_at = now()")  # as if its 204 had been lost
        assert deliver(shop) == 1
        wait_until(lambda: receiver.said[1:] == ["delivered before: 1001"])
        assert [row["last_outcome"] for row in shop.sql("SELECT last_outcome FROM notifications")] == ["204"]


@pytest.mark.parametrize("language", each(RECEIVERS))
def test_no_receiver_delivers_what_was_not_paid_for(
    open_shop: Callable[..., Shop], tmp_path: Path, language: str
) -> None:
    """Anybody may open a payment of a small amount and say in its metadata that it is for a large order."""
    with receiving(language, tmp_path) as receiver:
        shop = open_shop(NOTIFY_URL=receiver.url, NOTIFY_SECRET=SECRET, CURRENCIES="NGN,GHS")
        wrong: list[dict[str, Any]] = [
            {"amount": "125.00", "metadata": {"order": "1001"}},
            {"amount": "1250.00", "currency": "GHS", "metadata": {"order": "1001"}},
            {"amount": "1250.00", "metadata": {"order": "../../etc/passwd"}},
            {"amount": "1250.00", "metadata": {"order": "toString"}},
            {"amount": "1250.00", "metadata": {}},
            {"amount": "1250.00"},
        ]
        payments = [shop.created(**fields) for fields in wrong]
        for payment in payments:
            shop.pay(payment["reference"])
        assert deliver(shop) == len(wrong)
        wait_until(lambda: len(receiver.said) == len(wrong))
        assert receiver.said == [f"not what we sell: {payment['id']}" for payment in payments]


@pytest.mark.parametrize("language", each(RECEIVERS))
def test_each_receiver_takes_what_is_no_order_too(
    open_shop: Callable[..., Shop], tmp_path: Path, language: str
) -> None:
    with receiving(language, tmp_path) as receiver:
        shop = open_shop(NOTIFY_URL=receiver.url, NOTIFY_SECRET=SECRET)
        shop.sandbox.charge_elsewhere("PG-" + "0" * 26)
        shop.deliver("PG-" + "0" * 26)
        shop.pay(shop.created(customer_email="underpaid@example.com")["reference"])
        assert deliver(shop) == 3
        wait_until(lambda: sorted(receiver.said) == ["incident.opened", "incident.opened", "payment.review"])


@pytest.mark.parametrize("language", each(RECEIVERS))
def test_each_receiver_refuses_what_is_forged_or_old(told: Received, tmp_path: Path, language: str) -> None:
    for secret in (SECRET, OTHER_SECRET):
        folder = tmp_path / secret[6:12]
        folder.mkdir()
        with receiving(language, folder, secret) as receiver:
            given = {name: case for name, case in cases(told).items() if case[3] == secret}
            answers = {name: receiver.send(body, headers) for name, (_, body, headers, _) in given.items()}
            assert answers == {name: 204 if is_genuine else 401 for name, (is_genuine, *_) in given.items()}
            assert receiver.send(b"x" * 5_000_000, signed_at(told, int(time.time()))) in (401, 413)
            assert receiver.answers()


@pytest.mark.parametrize("language", each(RECEIVERS))
def test_a_receiver_that_fails_is_told_again(open_shop: Callable[..., Shop], tmp_path: Path, language: str) -> None:
    """Its folder cannot be written, as its database might be away."""
    (tmp_path / "delivered").write_text("in the way")
    with receiving(language, tmp_path) as receiver:
        shop = open_shop(NOTIFY_URL=receiver.url, NOTIFY_SECRET=SECRET)
        shop.pay(shop.created(**ORDER_1001)["reference"])
        assert deliver(shop) == 1
        assert shop.sql("SELECT last_outcome FROM notifications") == [{"last_outcome": "500"}]
        (tmp_path / "delivered").unlink()
        let_pass(shop, 10)
        assert deliver(shop) == 1
        wait_until(lambda: receiver.said == ["deliver: 1001"])


@pytest.mark.parametrize("language", sorted(RECEIVERS))
def test_the_guide_shows_the_receivers_own_code(language: str) -> None:
    assert SNIPPETS["verify", language] in (ROOT / "docs/receivers" / RECEIVERS[language]).read_text()


# The collection

COLLECTION = json.loads((ROOT / "docs/postman.json").read_text())


def test_each_request_of_the_collection_is_described_and_answered_as_it_expects(served: Server) -> None:
    variables = {each["key"]: each["value"] for each in COLLECTION["variable"]}
    variables |= {"base_url": "", "metrics_token": "count-0123456789"}
    variables |= {name.lower(): token for name, token in TOKENS.items()}

    def filled(text: str) -> str:
        return re.sub(r"\{\{(\w+)\}\}", lambda found: variables[found[1]], text)

    for item in COLLECTION["item"]:
        request = item["request"]
        headers = {each["key"]: filled(each["value"]) for each in request["header"]}
        if request["auth"]["type"] == "bearer":
            headers["Authorization"] = "Bearer " + filled(request["auth"]["bearer"][0]["value"])
        body = request.get("body", {}).get("raw")
        answer = served.request(request["method"], filled(request["url"]["raw"]), body, headers)
        operation = operation_of(request["method"], request["url"]["raw"])
        assert str(answer.status_code) in operation["responses"], item["name"]
        script = "\n".join(line for event in item["event"] for line in event["script"]["exec"])
        assert re.search(rf"status\({answer.status_code}\)|oneOf\(\[.*\b{answer.status_code}\b", script), item["name"]
        if body is not None:
            schema = followed(operation["requestBody"]["content"]["application/json"]["schema"])
            assert validator(schema).is_valid(json.loads(body)) == (item["name"] != "An invalid payment")
        if item["name"] == "Start a payment":
            variables["payment_id"] = answer.json["payment"]["id"]


def operation_of(method: str, url: str) -> dict[str, Any]:
    path = url.removeprefix("{{base_url}}").partition("?")[0].replace("{{payment_id}}", "{id}")
    return dict(DESCRIPTION["paths"][path][method.lower()])


# The other pages


def test_every_local_link_in_the_docs_leads_to_a_file() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
