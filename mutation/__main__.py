"""`python -m mutation`: break the code that keeps the promises, one small break at a time; the tests must notice."""

import argparse
import hashlib
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import embedded
from mutation import mutants, runner, schema
from mutation.mutants import Change, Mutant

KNOWN = Path(__file__).with_name("known.toml")
ENOUGH = 0.9
OUTCOMES = ("caught", "timed out", "survived")


@dataclass(frozen=True)
class Attempt:
    """A break to be tried: the broken text of a file, and the lines that a test must run to notice."""

    file: str
    name: str
    text: str
    change: Change
    first: int
    last: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the sample (1)")
    parser.add_argument("--sample", type=int, default=200, help="how many mutants of the Python modules (200)")
    parser.add_argument("--only", default="", metavar="FILES", help="of these files alone, comma-separated")
    parser.add_argument("--numbers", default="", metavar="N,N-N", help="of the breaks only these, to look again")
    parser.add_argument("--again", action="store_true", help="only those of known.toml")
    parser.add_argument("--budget", type=float, default=runner.BUDGET_SECONDS, help="seconds of tests for each (120)")
    parser.add_argument("--trace", metavar="DIR", type=Path, help="keep here, or take from here, which test runs what")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(options)
    except schema.Gone as gone:
        print(f"the breaks in mutation/schema.py no longer fit schema.sql: {gone}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return 1


def run(options: argparse.Namespace) -> int:
    attempts = list(chosen(options.seed, options.sample, set(filter(None, options.only.split(",")))))
    known = {key_of(each["file"], Change(tuple(each["was"]), tuple(each["now"]))): each["why"] for each in read_known()}
    for (file, change), reason in known.items():
        if not set(change.was) <= {line.strip() for line in (runner.ROOT / file).read_text("utf-8").splitlines()}:
            print(f"known.toml has lines that {file} has not any more: {reason}")
    if options.again:
        attempts = [each for each in attempts if key_of(each.file, each.change) in known]
    numbers = {number for part in options.numbers.split(",") if part for number in numbers_of(part)}
    begun = time.monotonic()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutation-", dir=embedded.quick_folder())))
        folder.chmod(0o755)
        tree = folder / "tree"
        tree.mkdir()
        runner.copy_tree(tree)
        trace = runner.Trace.made((options.trace or folder / "trace").absolute(), tree)
        if trace.failed:
            print(f"{len(trace.failed)} tests fail without any break and are left out: {', '.join(trace.failed)}")
        bench = runner.Bench(tree, stack.enter_context(embedded.temporary()).url, trace, options.budget)
        print(
            f"{len(attempts)} breaks, seed {options.seed}; {len(trace.seconds)} tests, traced in "
            f"{time.monotonic() - begun:.0f} s",
            flush=True,
        )
        if words := bench.control():
            print(f"without any break the tests do not pass:\n{words}", file=sys.stderr)
            return 1
        for number, attempt in enumerate(attempts, 1):
            if numbers and number not in numbers:
                continue
            if attempt.file == "schema.sql" and (refused := bench.takes(attempt.text)):
                raise schema.Gone(f"{attempt.name}: {refused}")
            verdict = bench.try_mutant(attempt.file, attempt.text, attempt.first, attempt.last)
            why = known.get(key_of(attempt.file, attempt.change))
            outcome = "known" if why and verdict.outcome == "survived" else verdict.outcome
            counts[attempt.file][outcome] += 1
            tell(number, len(attempts), attempt, verdict, outcome, why)
    return report(counts, time.monotonic() - begun)


def numbers_of(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def chosen(seed: int, sample: int, only: set[str]) -> Iterator[Attempt]:
    """A sample of places in the Python modules, with one mutant of each; and every break of the schema."""
    drawn = sorted(
        (
            drawing
            for file in mutants.MODULES
            if not only or file in only
            for drawing in drawings(seed, file, mutants.mutants_of(runner.ROOT / file))
        ),
        key=lambda drawing: drawing[0],
    )
    for _, mutant in drawn[:sample]:
        text = mutant.make()
        change = Change.between((runner.ROOT / mutant.file).read_text(encoding="utf-8"), text)
        yield Attempt(
            mutant.file, f"{mutant.file}:{mutant.first} {mutant.kind}", text, change, mutant.first, mutant.last
        )
    if not only or "schema.sql" in only:
        whole = (runner.ROOT / "schema.sql").read_text(encoding="utf-8")
        for each, text in schema.all_of(whole):
            yield Attempt("schema.sql", f"schema.sql {each.name}", text, Change((), (each.name,)), 0, 0)


def drawings(seed: int, file: str, places: list[list[Mutant]]) -> Iterator[tuple[bytes, Mutant]]:
    """Each place's lot, and the mutant that would stand there. A lot depends on the place's own statement and nothing
    else, so a change of the code draws anew only what it touches."""
    lines = (runner.ROOT / file).read_text(encoding="utf-8").splitlines()
    seen: Counter[str] = Counter()
    for place in places:
        words = " ".join([str(seed), file, *(each.kind for each in place), *lines[place[0].first - 1 : place[0].last]])
        seen[words] += 1
        lot = hashlib.sha256(f"{words} {seen[words]}".encode()).digest()
        yield lot, place[int.from_bytes(lot) % len(place)]


def read_known() -> list[dict[str, str]]:
    return list(tomllib.loads(KNOWN.read_text(encoding="utf-8")).get("known", []))


def key_of(file: str, change: Change) -> tuple[str, Change]:
    return file, change


def tell(number: int, total: int, attempt: Attempt, verdict: runner.Verdict, outcome: str, why: str | None) -> None:
    print(f"{number}/{total} {attempt.name}: {outcome} ({verdict.seconds:.1f} s, {verdict.tests} tests)", flush=True)
    if outcome == "known":
        print(f"    known survivor: {why}", flush=True)
    elif outcome not in ("caught", "timed out"):
        print(attempt.change, flush=True)


def report(counts: dict[str, Counter[str]], seconds: float) -> int:
    total: Counter[str] = Counter()
    print(f"\n{'file':18}{'caught':>8}{'timed out':>11}{'survived':>10}{'known':>7}")
    for file, found in (*counts.items(), ("all", sum(counts.values(), Counter()))):
        total = found
        print(f"{file:18}{found['caught']:8}{found['timed out']:11}{found['survived']:10}{found['known']:7}")
    noticed = total["caught"] + total["timed out"]
    share = noticed / max(1, total.total())
    print(f"{noticed} of {total.total()} noticed ({share:.1%}), in {seconds / 60:.0f} minutes")
    return 0 if share >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
