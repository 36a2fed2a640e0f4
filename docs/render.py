"""Write web/static/docs.html, the page of GET /docs, from web/static/openapi.json: `python docs/render.py`."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "web" / "static"
LONGEST_PATTERN = 60  # a longer one explains nothing; its description does
EVERYWHERE = ("X-Request-Id", "Cache-Control", "X-Content-Type-Options", "Referrer-Policy", "Content-Security-Policy")
"""Headers that tell a reader of one answer nothing."""
BOUNDS = {
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "maxProperties": "at most {} members",
}
MARKED = re.compile(r"`([^`]+)`|\[([^]]+)\]\((https://[^)]+)\)")

Json = dict[str, Any]


def main() -> None:
    (PAGES / "docs.html").write_text(Page(read()).render(), encoding="utf-8")


def read() -> Json:
    return dict(json.loads((PAGES / "openapi.json").read_text(encoding="utf-8")))


class Page:
    """What `page.html` asks of one description. Whatever comes out of the description is escaped."""

    def __init__(self, description: Json) -> None:
        self.description = description

    def render(self) -> str:
        env = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        filters = (pieces, facts, codes, headers, curl, self.followed, self.fields)
        env.filters.update({each.__name__: each for each in filters}, json=json_text)
        tags = [{**tag, "operations": list(self.operations(tag["name"]))} for tag in self.description["tags"]]
        page = env.get_template("page.html")
        text = page.render(
            info=self.description["info"],
            components=self.description["components"],
            tags=tags,
            errors=dict.fromkeys(self.errors()),
        )
        return "\n".join(line for line in text.splitlines() if line.strip()) + "\n"

    def operations(self, tag: str) -> Iterator[Json]:
        """The operations that bear a tag, with their method and address; the address of what we send is empty."""
        for place in ("paths", "webhooks"):
            for address, methods in self.description[place].items():
                for method, operation in methods.items():
                    if tag in operation["tags"]:
                        yield {**operation, "method": method, "address": address if place == "paths" else ""}

    def fields(self, schema: Json, prefix: str = "") -> Iterator[tuple[str, bool, Json]]:
        """Each property of an object, and of the objects in it: its name, whether it is required, its schema."""
        for name, given in schema["properties"].items():
            field = self.followed(given)
            yield prefix + name, name in schema.get("required", []), field
            if "properties" in field and "NotifiedPayment" not in given.get("$ref", ""):
                yield from self.fields(field, f"{prefix}{name}.")

    def errors(self) -> Iterator[tuple[str, str, str]]:
        """Code, status and message of each error that an answer shows, by status."""
        named = {
            (status, given["$ref"]): self.followed(given)
            for address in self.description["paths"].values()
            for operation in address.values()
            for status, given in operation["responses"].items()
            if "$ref" in given
        }
        named["405", ""] = self.description["components"]["responses"]["MethodNotAllowed"]
        for (status, _), response in sorted(named.items(), key=lambda item: item[0][0]):
            for problem in examples(response):
                yield problem["code"], status, problem["message"]

    def followed(self, value: Json) -> Json:
        """What a `$ref` leads to."""
        while "$ref" in value:
            found: Any = self.description
            for name in value["$ref"].removeprefix("#/").split("/"):
                found = found[name]
            value = found
        return value


def pieces(text: str) -> Iterator[tuple[str, ...]]:
    """A line of text in parts: as it is, then `code`, or the words of a [link](https://…) and its address."""
    parts = [part or "" for part in MARKED.split(text)] + ["", "", ""]
    return zip(*(itertools.islice(parts, n, None, 4) for n in range(4)), strict=True)


def facts(schema: Json) -> Iterator[str]:
    """The bounds that a schema sets, a few words each."""
    if kinds := schema.get("type"):
        yield " or ".join([kinds] if isinstance(kinds, str) else kinds)
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        yield ", ".join(f"`{json.dumps(value, ensure_ascii=False)}`" for value in values)
    if "format" in schema:
        yield schema["format"]
    yield from (text.format(schema[word]) for word, text in BOUNDS.items() if word in schema)
    if 0 < len(schema.get("pattern", "")) <= LONGEST_PATTERN:
        yield f"`{schema['pattern']}`"


def codes(response: Json) -> list[str]:
    return [example["code"] for example in examples(response) if "code" in example]


def headers(response: Json) -> list[str]:
    return [name for name in response.get("headers", {}) if name not in EVERYWHERE]


def examples(response: Json) -> list[Json]:
    content = response.get("content", {}).get("application/json", {})
    return [example["value"] for example in content.get("examples", {}).values()]


def curl(address: str, body: Json) -> str:
    lines = [
        f"curl https://pay.example.com{address} \\",
        "  -H 'Content-Type: application/json' -H 'Idempotency-Key: order-1001' \\",
        f"  -d '{json_text(body)}'",
    ]
    return "\n".join(lines)


def json_text(value: object) -> str:
    """JSON with amounts as they are written: 50.00, which `json` writes as 50.0."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    return re.sub(r'("(?:refunded_)?amount": [0-9]+\.[0-9])(?=[,\n}])', r"\g<1>0", text)


if __name__ == "__main__":
    main()
