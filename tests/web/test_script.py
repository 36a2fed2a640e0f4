"""The pages' script is for every browser that there is: one that cannot parse it has no news at all."""

import re

import pytest

from web.pages import STATIC

NOT_CODE = re.compile(r"""//[^\n]*|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""")
NEWER_THAN_ES5 = re.compile(r"=>|\?\.|\?\?|\.\.\.|\*\*|`|\b(?:let|const|class|async|await|yield|of|import|export)\b")
YOUNG = re.compile(r"\b(?:fetch|Promise|replaceChildren|NodeList|Object\.assign|includes|append|closest)\b")


def newer(script: str) -> list[str]:
    code = NOT_CODE.sub('""', script)
    return NEWER_THAN_ES5.findall(code) + YOUNG.findall(code)


def test_the_script_is_parsed_by_browsers_of_2012() -> None:
    assert newer((STATIC / "paygate.js").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line", ["a?.b", "a ?? b", "x => x", "let a = 1", "`a`", "f(...a)", "async function f() {}", "for (a of b) {}"]
)
def test_a_line_that_they_cannot_parse_is_found(line: str) -> None:
    assert newer('var a = "//"; // a comment\n' + line) != []
