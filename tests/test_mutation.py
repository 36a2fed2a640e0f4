"""The breaks that `make mutation` makes by hand fit the code as it stands."""

import tomllib

from mutation import schema
from shop import ROOT


def test_every_break_of_the_schema_finds_what_it_breaks() -> None:
    whole = (ROOT / "schema.sql").read_text()
    broken = [text for _, text in schema.all_of(whole)]
    assert len(set(broken)) == len(schema.breaks()) > 100
    assert whole not in broken


def test_every_known_survivor_is_of_lines_that_are_still_there() -> None:
    for each in tomllib.loads((ROOT / "mutation" / "known.toml").read_text()).get("known", []):
        there = [line.strip() for line in (ROOT / each["file"]).read_text().splitlines()]
        assert set(each["was"]) <= set(there), each
        assert each["why"]
