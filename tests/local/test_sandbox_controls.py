# ruff: noqa: F811  (fixtures are imported by their names)
"""The sandbox's controls: what they do, and who reaches them."""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests

from local.sandbox import Sandbox, SandboxError, __main__, controls, faults, settings, wire
from sandbox_client import KEY, PAID, call, initialize, sandbox, verified, without_a_proxy  # noqa: F401
from shop import ROOT


def control(
    sandbox: Sandbox, method: str, headers: dict[str, str] | None = None, /, **arguments: Any
) -> requests.Response:
    return requests.post(f"{sandbox.url}/_sandbox/{method}", json=arguments, headers=headers, timeout=5)


def test_the_controls_work_over_http(sandbox: Sandbox) -> None:
    initialize(sandbox)
    assert control(sandbox, "pay", reference="PG-1", amount=1).json()["result"]["paid"] == 1
    assert control(sandbox, "fault", endpoint="verify", name="503").status_code == 200
    assert call(sandbox, "GET", PAID).status_code == 503
    assert control(sandbox, "calls", endpoint="verify", reference="PG-1").json() == {"result": 1}
    rows = requests.get(f"{sandbox.url}/_sandbox/transactions", timeout=5).json()["result"]
    assert [row["reference"] for row in rows] == ["PG-1"]
    for name, arguments in (("pay", {}), ("pay", {"reference": "PG-none"}), ("configure", {"key": 1})):
        assert control(sandbox, name, **arguments).status_code == 400
    assert control(sandbox, "stop").status_code == 404
    assert control(sandbox, "configure", webhook_url="http://example.com/").status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://example.com"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "rebound.example.com"},
        {"X-Forwarded-For": "192.0.2.1"},
    ],
)
def test_the_controls_are_out_of_reach_of_web_pages(sandbox: Sandbox, headers: dict[str, str]) -> None:
    initialize(sandbox)
    assert control(sandbox, "pay", headers, reference="PG-1").status_code == 403
    assert requests.get(f"{sandbox.url}/_sandbox/transactions", headers=headers, timeout=5).status_code == 403


def test_a_plain_form_reaches_no_control(sandbox: Sandbox) -> None:
    initialize(sandbox)
    answer = requests.post(f"{sandbox.url}/_sandbox/pay", data='{"reference": "PG-1"}', timeout=5)
    assert answer.status_code == 415
    assert requests.get(f"{sandbox.url}/_sandbox/pay?reference=PG-1", timeout=5).status_code == 404
    assert verified(sandbox)["status"] == "abandoned"


def test_the_help_names_every_fault_customer_setting_and_control() -> None:
    words = set(re.findall(r"[a-z0-9_-]+", f"{__main__.__doc__} {Sandbox.configure.__doc__}".lower()))
    named = (
        *faults.FAULTS,
        *faults.WEBHOOK_FAULTS,
        *controls.CUSTOMERS,
        *controls.CONTROLS,
        *settings.SETTINGS,
        *wire.ENDPOINTS,
    )
    assert set(named) <= words
    for name in controls.CONTROLS:
        assert callable(getattr(Sandbox, name))


def test_every_test_customer_is_listed_on_the_checkout_page_and_in_the_document(sandbox: Sandbox) -> None:
    """Those that the code asks for by name, whether or not CUSTOMERS has them."""
    known = {
        *(name for path in (ROOT / "local/sandbox").glob("*.py") for name in compared_with_a_habit(path)),
        *(f"{fault}-webhook" for fault in faults.WEBHOOK_FAULTS),
        *controls.REFUND_PATHS,
        *controls.CUSTOMERS,
        *faults.FAULTS,
    }
    assert {"decline", "underpaid", "webhook-first", "wide-id"} <= known
    url = initialize(sandbox).json()["data"]["authorization_url"]
    page = requests.get(url, timeout=5).text
    on_the_page = {name for term in re.findall("<dt>(.*?)</dt>", page) for name in term.split(", ")}
    in_the_document = set(re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs/sandbox.md").read_text(), re.MULTILINE))
    assert (known - on_the_page, known - in_the_document) == (set(), set())
    assert on_the_page == in_the_document


def compared_with_a_habit(path: Path) -> Iterator[str]:
    """Strings of a module that stand in a comparison, a match or a look-up of a customer's habit."""
    asked: ast.AST
    names: Sequence[ast.AST]
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Compare() | ast.Call(func=ast.Attribute(value=ast.Dict())):
                asked, names = node, [node]
            case ast.Match():
                asked, names = node.subject, [case.pattern for case in node.cases]
            case _:
                continue
        if "habit" in ast.unparse(asked):
            inside = (each for name in names for each in ast.walk(name) if isinstance(each, ast.Constant))
            yield from (each.value for each in inside if isinstance(each.value, str))


def test_it_listens_and_sends_on_loopback_only() -> None:
    with pytest.raises(SandboxError):
        Sandbox(KEY, host="0.0.0.0")  # noqa: S104
    with pytest.raises(SandboxError):
        Sandbox(KEY, "http://example.com/hook")
