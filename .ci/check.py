"""What no linter looks at: how much there is to read, who imports whom, whether the requirements are in step with their
locks, and under which licences they come."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

ROOT_ENTRIES, FILE_LINES = 34, 600
CORE, PRODUCT, TOOLING = 3_000, 6_965, 4_700
"""Lines of code at most. The core is schema.sql and the root's modules, but for the launchers (manage.py,
gunicorn.conf.py) and paygate.py, which composes the app; the product has these too, web/ and commands/. Tooling is
proofs/, .ci/ and docs/; local/ is counted beside them, without a limit."""

MAY_IMPORT = {
    "web": {"root", "web"},
    "commands": {"root", "web", "commands"},
    "local": {"settings", "db", "local"},
    "docs": {"root", "web", "commands", "local", "docs"},
    "paygate": {"root", "web"},
    "gunicorn.conf": {"root", "web"},
    "worker": {"root", "web.outbox"},
    "manage": {"root", "commands", "local"},
}
"""By folder or root module: folders and modules. Others import the root alone; tests/ and proofs/ import all."""

MADE = Path("web/static/docs.html")
"""By docs/render.py, for browsers."""
RUN = Path("requirements.txt")
FREE = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT", "PSF-2.0"}
"""Licences that ask for no more than to be named."""
COPYLEFT = {"certifi": "MPL-2.0", "tqdm": "MPL-2.0 AND MIT"}
COPYLEFT |= dict.fromkeys(("psycopg", "psycopg-binary", "psycopg-pool"), "LGPL-3.0-only")
"""Those that ask for more, of their own files alone: each is installed unchanged, and imported."""


def main() -> int:
    # Git stands elsewhere on each machine.
    listed = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout  # noqa: S607
    files = [path for path in map(Path, listed.split("\0")[:-1]) if path.exists()]
    problems = [
        *too_many_entries(files),
        *too_long(files),
        *too_much_code(files),
        *imports(files),
        *(problem for source in sorted(Path("requirements").glob("*.in")) for problem in out_of_step(source)),
        *differing_pins(),
        *licences(),
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


# How much there is to read


def too_many_entries(files: list[Path]) -> Iterator[str]:
    count = len({path.parts[0] for path in files})
    if count > ROOT_ENTRIES:
        yield f"the root has {count} entries, at most {ROOT_ENTRIES}"


def too_long(files: list[Path]) -> Iterator[str]:
    for path in files:
        if path == MADE:
            continue
        if path.suffix in (".py", ".sql", ".js", ".mjs", ".css", ".html", ".sh") or path.parts[0] == ".ci":
            count = len(path.read_text(encoding="utf-8").splitlines())
            if count > FILE_LINES:
                yield f"{path} has {count} lines, at most {FILE_LINES}"


def too_much_code(files: list[Path]) -> Iterator[str]:
    root = {path for path in files if len(path.parts) == 1}
    core = root - {Path("manage.py"), Path("gunicorn.conf.py"), Path("paygate.py")}
    product = root | {path for path in files if path.parts[0] in ("web", "commands")}
    tooling = {path for path in files if path.parts[0] in ("proofs", ".ci", "docs")}
    tooling -= {path for path in files if path.parts[:2] == ("docs", "receivers")}  # to copy, as text is to read
    local = sum(lines_of_code(path) for path in files if path.parts[0] == "local")
    print(f"{local:6,} lines of code: local")
    for name, part, most in (("core", core, CORE), ("product", product, PRODUCT), ("tooling", tooling, TOOLING)):
        count = sum(map(lines_of_code, part))
        print(f"{count:6,} lines of code: {name} (at most {most:,})")
        if count > most:
            yield f"the {name} has {count:,} lines of code, at most {most:,}"


def lines_of_code(path: Path) -> int:
    """Of Python and SQL (in a file or a string), without blank lines, comments and docstrings."""
    if path.suffix not in (".py", ".sql"):
        return 0
    text = path.read_text(encoding="utf-8")
    lines = {number for number, line in enumerate(text.splitlines(), 1) if not re.match(r"\s*(#|--|$)", line)}
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring, an attribute's too
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


# Who imports whom


def imports(files: list[Path]) -> Iterator[str]:
    modules = {name_of(path): path for path in files if path.suffix == ".py"}
    graph = {name: set(imported(path, modules)) for name, path in modules.items()}
    for name, others in sorted(graph.items()):
        folder = folder_of(modules[name])
        allowed = MAY_IMPORT.get(name if folder == "root" else folder, {"root"})
        for other in sorted(others):
            if folder not in ("tests", "proofs") and not {other, folder_of(modules[other])} & allowed:
                yield f"{modules[name]} imports {other}, and may not"
    yield from cycles(graph)


def name_of(path: Path) -> str:
    """As it is imported: the tests' own folder is on the path."""
    parts = path.with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "tests" else parts).removesuffix(".__init__")


def folder_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else "root"


def imported(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in inside]
        else:
            continue
        yield from (name for name in names if name in modules)


def cycles(graph: dict[str, set[str]]) -> Iterator[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"modules import each other: {' imports '.join(reversed(error.args[1]))}"


# What is installed


def out_of_step(source: Path) -> list[str]:
    """What `source` asks for and its lock does not have, and the other way round."""
    lock = RUN if source.stem == "run" else source.with_suffix(".txt")
    wanted = set(re.findall(r"^[a-z][\w-]*", source.read_text(), re.MULTILINE))
    entries = re.findall(r"^([a-z][\w-]*)(?:\[.*?\])?==.*?((?:\n    .*)+)", lock.read_text(), re.MULTILINE)
    locked = {name for name, why in entries if re.search(rf"-r {re.escape(str(source))}$", why, re.MULTILINE)}
    return [f"{lock} is out of step with {source} ({name}): make pins" for name in sorted(wanted ^ locked)]


def differing_pins() -> list[str]:
    """What paygate runs with is what it is tested, measured and broken with."""
    run = pins(RUN)
    pinned = [(lock, *pin) for lock in sorted(Path("requirements").glob("*.txt")) for pin in pins(lock).items()]
    return [f"{lock} pins {name} unlike {RUN}" for lock, name, version in pinned if run.get(name, version) != version]


def pins(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z][\w-]*)(?:\[.*?\])?==(\S+)", lock.read_text(), re.MULTILINE))


def licences() -> list[str]:
    """Where README's table of what runs differs from the lock, from what a package states, or from what we may use."""
    listed, problems = licences_listed(), []
    for name in pins(RUN):
        licence, stated = listed.pop(name, "none"), licence_stated(name)
        if stated not in (None, licence):
            problems.append(f"README.md gives {name} the licence {licence}, its package {stated}")
        if licence not in FREE and COPYLEFT.get(name) != licence:
            problems.append(f"the licence of {name} ({licence}) is none that .ci/check.py names: may we use it?")
    return [*problems, *(f"README.md lists {name}, which is not in {RUN}" for name in listed)]


def licences_listed() -> dict[str, str]:
    """By README's table of dependencies: a licence for each name before it, and one in brackets after a name."""
    text = Path("README.md").read_text(encoding="utf-8")
    table = text[text.index("| dependency | licence |") :].split("\n\n", 1)[0]
    listed: dict[str, str] = {}
    for names, licence, reason in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", table, re.MULTILINE)[1:]:
        listed |= dict.fromkeys(names.split(", "), licence)
        listed |= dict(re.findall(r"([a-z][\w-]*) \(([^)]+)\)", reason))
    return listed


def licence_stated(name: str) -> str | None:
    """None where the package states none, or is for another platform than this one and not installed."""
    try:
        facts = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    return facts["License-Expression"] or facts["License"]


if __name__ == "__main__":
    sys.exit(main())
