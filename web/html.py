"""HTML pages from Jinja2 templates. Values are escaped; a missing name is an error."""

from pathlib import Path

import jinja2

import money

TEMPLATES = Path(__file__).with_name("templates")


def templates() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    env.filters["grouped"] = money.grouped
    return env
