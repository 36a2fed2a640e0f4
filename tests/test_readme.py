"""What README and docs say is true: their commands run, their JSON is what comes, their names are there."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import errors
from sandbox import Sandbox
from shop import ROOT, SECRET_KEY, Server, sandbox  # noqa: F401  # a fixture

README = (ROOT / "README.md").read_text()
AUDIT = (ROOT / "docs" / "audit.md").read_text()


@pytest.fixture
def server(database_url: str, sandbox: Sandbox, tmp_path: Path) -> Iterator[Server]:  # noqa: F811
    with Server(database_url, sandbox, tmp_path) as server:
        yield server


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(command: str, server: Server) -> str:
    """What a command of the README prints, run where its server listens."""
    return subprocess.run(
        ["bash", "-euc", command.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")],
        env={"PATH": server.env["PATH"], "PAYSTACK_SECRET_KEY": SECRET_KEY},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout


def with_dots(text: str, like: str) -> str:
    """`text` with each part that `like` leaves open as `…` left open too."""
    pattern = ".*?".join(re.escape(part) for part in like.split("…"))
    return like if re.fullmatch(pattern, text) else text


def test_the_first_commands_are_on_the_first_screen_and_exist() -> None:
    first = README.index("```sh")
    assert README[:first].count("\n") < 20
    targets = re.findall(r"^make (\w+)", blocks("sh")[0], re.MULTILINE)
    assert targets == ["run", "test"]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)


def test_the_curl_lines_work_as_pasted_and_answer_what_is_shown(server: Server, sandbox: Sandbox) -> None:  # noqa: F811
    _, create, read, webhook = blocks("sh")
    created, completed, invalid, received = (block.strip() for block in blocks("json"))
    answer = run(create, server)
    assert with_dots(answer, created) == created
    payment = json.loads(answer)["payment"]
    sandbox.pay(payment["reference"])
    body, headers = sandbox.event(payment["reference"])
    assert server.request("POST", "/api/v1/webhooks/paystack", body, headers).status_code == 200
    assert with_dots(run(read.replace("PAY-…", payment["id"]), server), completed) == completed
    assert with_dots(server.create(amount=0).text, invalid) == invalid
    assert run(webhook, server) == received


def test_every_error_is_listed_with_its_status() -> None:
    listed = {
        (int(status), code)
        for statuses, codes in re.findall(r"^\| ([0-9, ]+) \| ([^|]+) \|", README, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
        for status in statuses.split(",")
    }
    assert {(status, code) for code, (status, _) in errors.PROBLEMS.items()} <= listed
    assert {code for _, code in listed} == set(errors.PROBLEMS)


def test_every_variable_is_listed_with_its_default() -> None:
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", README))
    read = set(re.findall(r'"([A-Z][A-Z_]{3,})"', (ROOT / "settings.py").read_text()))
    assert read - {"DEBUG", "INFO", "WARNING", "ERROR"} <= listed | {"NGN"}


def test_every_command_in_the_readme_exists() -> None:
    told = subprocess.run(
        [sys.executable, "manage.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    ).stdout
    table = README[README.index("## For the operator") : README.index("## Configuration")]
    for commands in re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", table, re.MULTILINE):
        for command in re.findall(r"`(\w+)", commands):
            assert re.search(rf"\b{command}\b", told), command


def test_every_file_that_is_linked_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_name_on_the_audit_page_is_there() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    schema = (ROOT / "schema.sql").read_text()
    for name in re.findall(r"`([^`]+)`", AUDIT[: AUDIT.index("## To check")]):
        if name.startswith("test_"):
            assert f"def {name}(" in tests, name
        elif match := re.fullmatch(r"(\w+)\.([\w.]+)", name):
            module = ROOT / f"{match[1].lower()}.py"
            if module.exists():
                assert defined(module, match[2]), name
        elif "_" in name:
            assert name in schema or (ROOT / name).exists() or name in (ROOT / "db.py").read_text(), name


def defined(module: Path, dotted: str) -> bool:
    """Whether a function, a class or a member of one is defined in a module."""
    if (ROOT / f"{module.stem}.{dotted}").exists():  # a file's name
        return True
    body: list[ast.stmt] = ast.parse(module.read_text()).body
    for part in dotted.split("."):
        found = [each for each in body if getattr(each, "name", None) == part]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True
