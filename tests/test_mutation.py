"""The breaks that `make mutation` makes by hand fit the code as it stands."""

from mutation import runner, schema
from shop import ROOT


def test_every_break_of_the_schema_finds_what_it_breaks() -> None:
    whole = (ROOT / "schema.sql").read_text()
    broken = [text for _, text in schema.all_of(whole)]
    assert len(set(broken)) == len(schema.breaks()) > 100
    assert whole not in broken


def test_the_tests_that_are_to_notice_are_there() -> None:
    assert len(runner.TRACED) > 10
    assert [name for name in runner.TRACED if not (ROOT / name).exists()] == []
