"""What no linter looks at: how much code there is to read, and whether the requirements are in step with their lock."""

import ast
import re
import sys
from pathlib import Path

NOT_THE_PRODUCT = ("embedded.py", "sandbox.py")
AIM = 2000


def main() -> int:
    counts = {path.name: lines_of_python(path) for path in Path().glob("*.py") if path.name not in NOT_THE_PRODUCT}
    counts["schema.sql"] = lines_of_sql(Path("schema.sql"))
    for name, count in sorted(counts.items(), key=lambda pair: -pair[1]):
        print(f"{count:6,} {name}")
    print(f"{sum(counts.values()):6,} lines of code without blank lines, comments and docstrings; the aim is {AIM:,}")
    sources = ("requirements.in", "requirements-dev.in", "requirements-browser.in")
    problems = [*(problem for source in sources for problem in out_of_step(source)), *differing_pins()]
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


def out_of_step(source: str) -> list[str]:
    """What `source` asks for and its lock does not have, and the other way round."""
    lock = source.replace(".in", ".txt")
    wanted = set(re.findall(r"^[a-z][\w-]*", Path(source).read_text(), re.MULTILINE))
    locked = {
        name
        for name, origins in re.findall(
            r"^([a-z][\w-]*)(?:\[.*?\])?==.*?((?:\n    .*)+)", Path(lock).read_text(), re.MULTILINE
        )
        if re.search(rf"-r {re.escape(source)}$", origins, re.MULTILINE)
    }
    return [f"{lock} is out of step with {source} ({name}): make pins" for name in sorted(wanted ^ locked)]


def differing_pins() -> list[str]:
    run, dev = pins("requirements.txt"), pins("requirements-dev.txt")
    return [
        f"requirements-dev.txt pins {name} unlike requirements.txt: make pins"
        for name in run
        if dev.get(name) != run[name]
    ]


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z][\w-]*)(?:\[.*?\])?==(\S+)", Path(lock).read_text(), re.MULTILINE))


if __name__ == "__main__":
    sys.exit(main())
