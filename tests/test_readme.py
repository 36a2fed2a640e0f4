"""What README and docs say is true: their commands run, their JSON is what comes, their names are there."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import settings
from local.sandbox import Sandbox
from shop import ROOT, SECRET_KEY, Server, sandbox  # noqa: F401  # a fixture
from web import errors

README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
AUDIT = (ROOT / "docs" / "audit.md").read_text()


@pytest.fixture
def server(database_url: str, sandbox: Sandbox, tmp_path: Path) -> Iterator[Server]:  # noqa: F811
    with Server(database_url, sandbox, tmp_path) as server:
        yield server


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README + API, re.MULTILINE | re.DOTALL)


def run(command: str, server: Server) -> str:
    """What a command of README or docs/api.md prints, run where its server listens."""
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
    assert blocks("sh")[0].startswith("git clone ")
    targets = re.findall(r"^make (\w+)", blocks("sh")[0], re.MULTILINE)
    assert targets == ["run", "test"]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.split()) <= 1_800


@pytest.mark.programs
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
        for statuses, codes in re.findall(r"^\| ([0-9, ]+) \| ([^|]+) \|", API, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
        for status in statuses.split(",")
    }
    assert {(status, code) for code, (status, _) in errors.PROBLEMS.items()} <= listed
    assert {code for _, code in listed} == set(errors.PROBLEMS)


def test_every_variable_is_listed_with_its_default() -> None:
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", README))
    read = set(re.findall(r'"([A-Z][A-Z_]{3,})"', (ROOT / "settings.py").read_text()))
    assert read - {"DEBUG", "INFO", "WARNING", "ERROR", "COMPOSE_"} <= listed | {"NGN"}
    shown = dict(shown_defaults())
    assert len(shown) >= 15
    needed = {"DATABASE_URL": "postgresql://shop@db.example.com/pay", "PAYSTACK_SECRET_KEY": SECRET_KEY}
    assert settings.load({**shown, **needed}) == settings.load(needed)


def shown_defaults() -> Iterator[tuple[str, str]]:
    """Each name of the table with its default, but those whose default is none or told in words."""
    table = README[README.index("## Configuration") : README.index("## Going live")]
    for names, defaults in re.findall(r"^\| (`[A-Z].*?`) \| (.*?) \|", table, re.MULTILINE):
        for name, value in zip(names.split(", "), defaults.split(", "), strict=False):
            if value != "none" and re.fullmatch(r"[\w./]+", value):
                yield name.strip("`"), value


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
    for page in (ROOT / "README.md", ROOT / ".github" / "SECURITY.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_name_on_the_audit_page_is_there() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    schema = (ROOT / "schema.sql").read_text()
    for name in re.findall(r"`([^`]+)`", AUDIT[: AUDIT.index("## To check")]):
        if name.startswith("test_"):
            assert f"def {name}(" in tests, name
        elif re.fullmatch(r"\w+(\.\w+)+", name):
            assert (ROOT / name).exists() or defined(name), name
        elif "_" in name:
            assert name in schema or (ROOT / name).exists(), name


def defined(dotted: str) -> bool:
    """Whether a module defines a function, a class or a member: `module.name`, `folder.module.Class.name`."""
    folder, parts = ROOT, dotted.split(".")
    while (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    module = folder / f"{parts.pop(0)}.py"
    body: list[ast.stmt] = ast.parse(module.read_text()).body if module.exists() else []
    for part in parts:
        found = [each for each in body if part in names_of(each)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return bool(parts)


def names_of(statement: ast.stmt) -> list[str]:
    """What a statement defines: a function, a class, or constants."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    names = [getattr(statement, "name", None), *(getattr(target, "id", None) for target in targets)]
    return [name for name in names if name is not None]
