"""What no linter looks at: how much code there is to read, whether the requirements are in step with their lock, and
under which licences they come."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

NOT_THE_PRODUCT = ("embedded.py", "sandbox.py")
AIM = 2000
FREE = {"Apache-2.0", "BSD-3-Clause", "MIT", "PSF-2.0"}
"""Licences that ask for no more than to be named."""
COPYLEFT = {
    "certifi": "MPL-2.0",
    "psycopg": "LGPL-3.0-only",
    "psycopg-binary": "LGPL-3.0-only",
    "psycopg-pool": "LGPL-3.0-only",
    "tqdm": "MPL-2.0 AND MIT",
}
"""Those that ask for more, of their own files alone: each is installed unchanged, and imported."""


def main() -> int:
    counts = {path.name: lines_of_python(path) for path in Path().glob("*.py") if path.name not in NOT_THE_PRODUCT}
    counts["schema.sql"] = lines_of_sql(Path("schema.sql"))
    for name, count in sorted(counts.items(), key=lambda pair: -pair[1]):
        print(f"{count:6,} {name}")
    print(f"{sum(counts.values()):6,} lines of code without blank lines, comments and docstrings; the aim is {AIM:,}")
    steps = [problem for source in sorted(Path().glob("requirements*.in")) for problem in out_of_step(source)]
    problems = [*steps, *differing_pins(), *licences()]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def lines_of_python(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    lines = {number for number, line in enumerate(text.splitlines(), 1) if not re.match(r"\s*(#|$)", line)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring, an attribute's too
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def lines_of_sql(path: Path) -> int:
    return sum(not re.match(r"\s*(--|$)", line) for line in path.read_text(encoding="utf-8").splitlines())


def out_of_step(source: Path) -> list[str]:
    """What `source` asks for and its lock does not have, and the other way round."""
    lock = source.with_suffix(".txt")
    wanted = set(re.findall(r"^[a-z][\w-]*", source.read_text(), re.MULTILINE))
    locked = {
        name
        for name, origins in re.findall(
            r"^([a-z][\w-]*)(?:\[.*?\])?==.*?((?:\n    .*)+)", lock.read_text(), re.MULTILINE
        )
        if re.search(rf"-r {re.escape(source.name)}$", origins, re.MULTILINE)
    }
    return [f"{lock} is out of step with {source} ({name}): make pins" for name in sorted(wanted ^ locked)]


def differing_pins() -> list[str]:
    """What paygate runs with is what it is tested, compared and broken with: dev's lock has all of it."""
    run, found = pins("requirements.txt"), []
    for lock in sorted(path.name for path in Path().glob("requirements-*.txt")):
        other = pins(lock)
        common = run.keys() if lock == "requirements-dev.txt" else run.keys() & other.keys()
        found += [
            f"{lock} pins {name} unlike requirements.txt: make pins"
            for name in sorted(common)
            if other.get(name) != run[name]
        ]
    return found


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z][\w-]*)(?:\[.*?\])?==(\S+)", Path(lock).read_text(), re.MULTILINE))


def licences() -> list[str]:
    """Where README's table of what runs differs from the lock, from what a package states, or from what we may use."""
    listed, problems = licences_listed(), []
    for name in pins("requirements.txt"):
        licence, stated = listed.pop(name, "none"), licence_stated(name)
        if stated not in (None, licence):
            problems.append(f"README.md gives {name} the licence {licence}, its package {stated}")
        if licence not in FREE and COPYLEFT.get(name) != licence:
            problems.append(f"the licence of {name} ({licence}) is none that .ci/check.py names: may we use it?")
    return [*problems, *(f"README.md lists {name}, which is not in requirements.txt" for name in listed)]


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
    """None where the package is for another platform than this one, and not installed."""
    try:
        facts = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    return facts["License-Expression"] or facts["License"] or "unknown"


if __name__ == "__main__":
    sys.exit(main())
