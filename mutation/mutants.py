"""Every small break of a Python module that its tests should notice, each a text to put in its place.

Three kinds: mutmut's operators on Python's nodes (https://mutmut.readthedocs.io), which leave statements and the SQL in
strings alone; our own on statements, a guard or a call that is left out; and our own on SQL.
"""

import ast
import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

MODULES: dict[str, tuple[str, ...]] = {
    "db.py": ("*",),
    "checkout.py": ("*",),
    "paystack.py": ("*",),
    "money.py": ("*",),
    "orders.py": ("*",),
    "worker.py": ("*",),
    "notifications.py": ("*",),
    "paygate.py": (
        "Payments",
        "PaymentById",
        "PaystackWebhook",
        "read_json",
        "read_event_body",
        "read_body",
        "VISIBLE_ASCII",
        "QUOTED_KEY",
        "parse_idempotency_key",
        "answer_of",
        "envelope",
        "problem_of",
    ),
    "books.py": (
        "Proof",
        "last_settled_event",
        "_writers",
        "TRAILS",
        "TRAILED",
        "broken_trail",
        "event_hash",
        "RANKS",
        "may_follow",
        "rank",
        "RULES",
        "DIFFERENCES",
        "differences",
    ),
}
"""The modules that keep the promises, and what of them is broken here: all, or what bears one of these names."""
LEFT_ALONE = {"metrics"}
"""What keeps none of them."""


@dataclass(frozen=True)
class Mutant:
    """A break of `file`, in the statement of the lines `first` to `last`: a test must run it to notice."""

    file: str
    kind: str
    first: int
    last: int
    make: Callable[[], str] = field(repr=False, compare=False)
    """The whole text of the broken file."""


@dataclass(frozen=True)
class Change:
    """What a mutant changes, as lines without their margins: what was there, and what is in its place."""

    was: tuple[str, ...]
    now: tuple[str, ...]

    @classmethod
    def between(cls, before: str, after: str) -> "Change":
        lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
        return cls(
            tuple(line[1:].strip() for line in lines if line.startswith("-")),
            tuple(line[1:].strip() for line in lines if line.startswith("+")),
        )

    def __str__(self) -> str:
        return "\n".join([*(f"    - {line}" for line in self.was), *(f"    + {line}" for line in self.now)])


def mutants_of(path: Path) -> list[list[Mutant]]:
    """The mutants of a module, those of one place together."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    wanted = [span_of(node) for node in tree.body if is_wanted(node, MODULES[path.name])]
    kept = [(first, last) for first, last in wanted if last >= first]
    spans = list(statements(tree))
    places: dict[tuple[object, ...], list[Mutant]] = {}
    for place, mutant in (
        *of_nodes(path.name, text),
        *of_statements(path.name, text, tree),
        *of_sql(path.name, text, tree),
    ):
        if any(first <= mutant.first <= last for first, last in kept):
            first, last = statement_at(spans, mutant.first)
            places.setdefault(place, []).append(replace(mutant, first=first, last=last))
    return list(places.values())


def statements(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """The lines of each statement; of a compound one those of its head. Few of the lines of a long one are ever traced:
    none inside of a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None) or getattr(node, "cases", None)
            first, last = span_of(node)
            yield first, max(first, head_end(body[0]) if body else last)


def head_end(first_of_body: ast.stmt | ast.match_case) -> int:
    return (first_of_body.pattern if isinstance(first_of_body, ast.match_case) else first_of_body).lineno - 1


def statement_at(spans: list[tuple[int, int]], line: int) -> tuple[int, int]:
    """The shortest statement that holds a line."""
    holding = [(first, last) for first, last in spans if first <= line <= last]
    return min(holding, key=lambda span: span[1] - span[0], default=(line, line))


def span_of(node: ast.stmt) -> tuple[int, int]:
    return node.lineno, node.end_lineno or node.lineno


def is_wanted(node: ast.stmt, names: tuple[str, ...]) -> bool:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name not in LEFT_ALONE and (names == ("*",) or name in names)
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return names == ("*",) or name in names
    return False


Placed = tuple[tuple[object, ...], Mutant]


# Python's nodes

LEFT_OUT = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom)
TOLD = re.compile(r"^(log\.(event|failure)|print)$")
"""Calls whose arguments tell a person something, and change nothing."""


def of_nodes(file: str, text: str) -> Iterator[Placed]:
    wrapper = MetadataWrapper(cst.parse_module(text))
    finder = Finder(file, wrapper)
    wrapper.visit(finder)
    yield from finder.found


class Finder(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, file: str, wrapper: MetadataWrapper) -> None:
        super().__init__()
        self.file = file
        self.wrapper = wrapper
        self.found: list[Placed] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, LEFT_OUT) or (isinstance(node, cst.Call) and TOLD.match(self.code_of(node.func))):
            return False
        span = self.get_metadata(PositionProvider, node, None)
        for kind, operator in mutation_operators:
            if span is not None and isinstance(node, kind):
                for number, broken in enumerate(operator(node)):
                    mutant = Mutant(
                        self.file, operator.__name__, span.start.line, span.end.line, self.with_node(node, broken)
                    )
                    place = (span.start.line, span.start.column, span.end.line, span.end.column)
                    if is_telling(node, broken, self.code_of(node), number):
                        self.found.append((place, mutant))
        return True

    def code_of(self, node: cst.CSTNode) -> str:
        return self.wrapper.module.code_for_node(node)

    def with_node(self, node: cst.CSTNode, broken: cst.CSTNode) -> Callable[[], str]:
        def make() -> str:
            replaced = self.wrapper.module.deep_replace(node, broken)
            assert isinstance(replaced, cst.Module)
            return replaced.code

        return make


def is_telling(node: cst.CSTNode, broken: cst.CSTNode, code: str, number: int) -> bool:
    """Whether a mutant says something of the tests.

    Of a string mutmut makes three; one is enough, and none of a sentence, which is for a person. Of a call only those
    without one of its keywords: without another argument Python itself refuses nearly every one.
    """
    if isinstance(node, cst.SimpleString):
        return number == 0 and " " not in code
    if isinstance(node, cst.Call) and isinstance(broken, cst.Call) and len(node.args) > len(broken.args):
        return {each.keyword and each.keyword.value for each in node.args} != {
            each.keyword and each.keyword.value for each in broken.args
        }
    return not (isinstance(node, cst.Call) and isinstance(broken, cst.Call) and node.func is broken.func)


# Statements


def of_statements(file: str, text: str, tree: ast.Module) -> Iterator[Placed]:
    """A guard that never holds, and a call or a `raise` that is left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and not node.orelse and ends(node.body[-1]):
            yield placed(file, "guard", text, node.test, "False")
        elif isinstance(node, ast.If):
            yield placed(file, "condition", text, node.test, "True")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if not TOLD.match(ast.unparse(node.value.func)):
                yield placed(file, "call", text, node, "pass")
        elif isinstance(node, ast.Raise):
            yield placed(file, "raise", text, node, "pass")


def ends(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Return | ast.Raise | ast.Continue | ast.Break)


def placed(file: str, kind: str, text: str, node: ast.stmt | ast.expr, instead: str) -> Placed:
    start, end = offsets(text, node)
    first, last = node.lineno, node.end_lineno or node.lineno
    return (kind, start, end), Mutant(file, kind, first, last, lambda: text[:start] + instead + text[end:])


def offsets(text: str, node: ast.stmt | ast.expr) -> tuple[int, int]:
    """Where a node stands; Python counts the bytes of a line."""

    def offset(line: int, column: int) -> int:
        begin = starts[line - 1]
        return begin + len(text[begin : starts[line]].encode()[:column].decode())

    starts = [0, *(match.end() for match in re.finditer("\n", text)), len(text)]
    return offset(node.lineno, node.col_offset), offset(node.end_lineno or 0, node.end_col_offset or 0)


# SQL

STATEMENT = re.compile(r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM)\b")
FLIPPED = {"<=": "<", ">=": ">", "<": "<=", ">": ">=", "<>": "=", "=": "<>"}
OTHER_WORD = {
    "pending": "failed",
    "failed": "processed",
    "expired": "failed",
    "review": "completed",
    "completed": "review",
    "partially_refunded": "refunded",
    "refunded": "completed",
    "received": "noted",
    "applied": "noted",
    "noted": "applied",
    "unanswered": "refused",
    "processed": "pending",
    "processing": "pending",
    "needs-attention": "pending",
    "refused": "unanswered",
    "not_made": "refused",
    "paygate": "dashboard",
    "dashboard": "paygate",
    "accepted": "charge",
    "second_charge": "mismatch",
    "refunded_too_much": "mismatch",
}
"""For each word of the schema another one that stands in the same column."""

TERM = re.compile(r"\b(WHERE|HAVING|AND|OR)\b\s+")
TERM_ENDS = re.compile(r"\b(AND|OR|ORDER|GROUP|HAVING|RETURNING|LIMIT|FOR|THEN|UNION|ON CONFLICT|WHERE|END|AS)\b|[;)]")

Edit = tuple[int, int, str]
"""From where to where in a statement, and what comes there instead."""


def of_sql(file: str, text: str, tree: ast.Module) -> Iterator[Placed]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and STATEMENT.search(node.value):
            start, end = offsets(text, node)
            statement = text[start:end]
            for kind, (first, last, instead) in edits(statement):
                line = node.lineno + statement.count("\n", 0, first)
                mutant = Mutant(file, f"sql {kind}", line, line, replaced(text, start + first, start + last, instead))
                yield (kind, start + first, start + last), mutant


def replaced(text: str, start: int, end: int, instead: str) -> Callable[[], str]:
    return lambda: text[:start] + instead + text[end:]


def edits(statement: str) -> Iterator[tuple[str, Edit]]:
    def swap(kind: str, pattern: str, instead: str | Callable[[re.Match[str]], str]) -> Iterator[tuple[str, Edit]]:
        for match in re.finditer(pattern, statement):
            yield kind, (*match.span(), match.expand(instead) if isinstance(instead, str) else instead(match))

    yield from swap("lock dropped", r"\s+FOR UPDATE( OF \w+)?( SKIP LOCKED)?", "")
    yield from swap("skip dropped", r" SKIP LOCKED", "")
    yield from swap("conflict", r"\s+ON CONFLICT( \([^)]*\))? DO NOTHING", "")
    yield from swap("comparison", r"(?<= )(<=|>=|<>|<|>)(?= )", lambda match: FLIPPED[match[1]])
    yield from swap(
        "comparison", r"(\b(?:WHERE|AND|OR|ON|WHEN|NOT)\s+\(*[\w.%()]+ )=(?= )", lambda match: match[1] + "<>"
    )
    yield from swap("null", r"IS NOT NULL", "IS NULL")
    yield from swap("null", r"IS NULL", "IS NOT NULL")
    yield from swap("distinct", r"IS DISTINCT FROM", "IS NOT DISTINCT FROM")
    yield from swap("not", r"\bNOT (?=EXISTS|\(|IN\b|[\w.]+ = ANY)", "")
    yield from swap("word", rf"'({'|'.join(OTHER_WORD)})'", lambda match: f"'{OTHER_WORD[match[1]]}'")
    yield from swap("interval", r"interval '(\d+) (\w+)'", lambda match: f"interval '{int(match[1]) * 3} {match[2]}'")
    yield from swap("order", r" DESC\b", "")
    yield from swap("order", r" NULLS LAST\b", " NULLS FIRST")
    yield from swap("function", r"\b(greatest|least)\(", lambda match: "least(" if match[1][0] == "g" else "greatest(")
    yield from swap("function", r"\b(min|max)\(", lambda match: "min(" if match[1] == "max" else "max(")
    yield from swap("number", r"(?<=[+-] )1\b", "2")
    yield from swap("truth", r"= true\b", "= false")
    yield from swap("case", r"CASE WHEN ((?:(?!CASE|THEN).)+?) THEN", r"CASE WHEN NOT (\1) THEN")
    for edit in terms(statement):
        yield "term dropped", edit
    for edit in assignments(statement):
        yield "assignment dropped", edit


def terms(statement: str) -> Iterator[Edit]:
    """Each condition of a WHERE, an AND or an OR, as if it had not been written."""
    for match in TERM.finditer(statement):
        end = end_of_term(statement, match.end())
        if match[1] == "AND" and re.search(r"\bBETWEEN \S+\s+$", statement[: match.start()]):
            continue
        if match[1] in ("WHERE", "HAVING"):
            yield match.end(), end, "true "
        else:
            yield match.start(), end, ""


def end_of_term(statement: str, start: int) -> int:
    depth, at = 0, start
    while at < len(statement):
        if depth == 0 and (TERM_ENDS.match(statement, at) or statement.startswith('"""', at)):
            return at
        depth += {"(": 1, ")": -1}.get(statement[at], 0)
        at += 1
    return at - (statement[-1] in "\"'")


def assignments(statement: str) -> Iterator[Edit]:
    """Each column that an UPDATE of several sets, left as it was."""
    for match in re.finditer(r"\bSET\s+(?=\w+ = )", statement):
        begin, parts, depth = match.end(), [], 0
        for at in range(match.end(), len(statement)):
            character = statement[at]
            is_end = depth == 0 and re.match(r"\s(?:FROM|WHERE|RETURNING)\b|\)|\"", statement[at:])
            if depth == 0 and (character == "," or is_end):
                parts.append((begin, at))
                begin = at + 1
            if is_end:
                break
            depth += {"(": 1, ")": -1}.get(character, 0)
        for number, (first, last) in enumerate(parts):
            if len(parts) > 1:
                yield (first, last + 1, "") if number == 0 else (first - 1, last, "")
