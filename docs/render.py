"""Write pages/docs.html, the page that GET /docs answers, from pages/openapi.json: `python docs/render.py`."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

PAGES = Path(__file__).resolve().parent.parent / "pages"
LONGEST_PATTERN = 60  # a longer one explains nothing; its description does
Json = dict[str, Any]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: the API</title>
<link rel="stylesheet" href="/docs.css">
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<nav aria-label="Contents">
<p class="title">{title}</p>
{contents}
</nav>
<main id="content">
<h1>{summary}</h1>
{introduction}
{sections}
</main>
</body>
</html>
"""


def main() -> None:
    (PAGES / "docs.html").write_text(Page(read()).render(), encoding="utf-8")


def read() -> Json:
    return dict(json.loads((PAGES / "openapi.json").read_text(encoding="utf-8")))


class Page:
    """The page of one description. Whatever comes out of the description is escaped."""

    def __init__(self, description: Json) -> None:
        self.description = description
        self.components = description["components"]

    def render(self) -> str:
        info = self.description["info"]
        return fill(
            PAGE,
            title=info["title"],
            summary=info["summary"],
            introduction=prose(info["description"]),
            contents=self.contents(),
            sections=join(self.sections()),
        )

    def operations(self, tag: str) -> Iterator[tuple[str, str, Json]]:
        """Method, address and operation of all that bear a tag; the address of what we send is empty."""
        for address, methods in self.description["paths"].items():
            for method, operation in methods.items():
                if tag in operation["tags"]:
                    yield method.upper(), address, operation
        for methods in self.description["webhooks"].values():
            for method, operation in methods.items():
                if tag in operation["tags"]:
                    yield method.upper(), "", operation

    def contents(self) -> Markup:
        item = '<li><a href="#{id}">{text}</a></li>'
        lists = [
            fill("<p>{name}</p>\n<ul>\n{items}\n</ul>", name=tag["name"].capitalize(), items=join(items))
            for tag in self.description["tags"]
            if (
                items := [
                    fill(item, id=op["operationId"], text=op["summary"]) for *_, op in self.operations(tag["name"])
                ]
            )
        ]
        rest = [fill(item, id=id, text=text) for id, text in (("data", "Data"), ("errors", "Errors"))]
        return join([*lists, fill("<ul>\n{items}\n</ul>", items=join(rest))])

    def sections(self) -> Iterator[Markup]:
        for tag in self.description["tags"]:
            yield fill("<h2>{name}</h2>\n{text}", name=tag["name"].capitalize(), text=prose(tag["description"]))
            for method, address, operation in self.operations(tag["name"]):
                yield self.operation(method, address, operation)
        yield fill('<h2 id="data">Data</h2>\n{schemas}', schemas=join(self.schemas()))
        yield fill('<h2 id="errors">Errors</h2>\n{table}', table=self.errors())

    # One operation

    def operation(self, method: str, address: str, operation: Json) -> Markup:
        parts = [prose(operation.get("description", "")), self.who_may(operation)]
        if parameters := [self.followed(each) for each in operation.get("parameters", [])]:
            parts.append(table(("Parameter", "Rule"), [self.parameter(each) for each in parameters], "Parameters"))
        if "requestBody" in operation:
            parts += self.body(method, address, operation["requestBody"]["content"])
        parts.append(table(("Answer", "When"), self.answers(operation["responses"]), "Answers"))
        parts += self.examples(operation["responses"])
        return fill(
            '<article id="{id}" aria-labelledby="{id}-title">\n<h3 id="{id}-title">{summary}</h3>\n'
            '<p class="address"><b class="{kind}">{method}</b> <code>{address}</code></p>\n{parts}\n</article>',
            id=operation["operationId"],
            summary=operation["summary"],
            kind=method.lower(),
            method=method,
            address=address or "your NOTIFY_URL",
            parts=join(parts),
        )

    def who_may(self, operation: Json) -> Markup:
        for requirement in operation.get("security", []):
            for name in requirement:
                scheme = self.components["securitySchemes"][name]
                text = "`Authorization: Bearer TOKEN`. " + scheme["description"]
                return prose(text)
        return Markup("")

    def parameter(self, parameter: Json) -> tuple[Markup, Markup]:
        name = self.name(parameter["name"], is_required=parameter.get("required", False), where=parameter["in"])
        return name, self.rule(parameter["schema"], parameter.get("description", ""))

    def body(self, method: str, address: str, content: Json) -> Iterator[Markup]:
        for media_type, body in content.items():
            schema = self.followed(body["schema"])
            if "properties" in schema:
                yield table(("Field", "Rule"), self.fields(schema), f"Body, as {media_type}")
            else:
                yield fill("<p>Body, as {type}: {text}</p>", type=media_type, text=inline(schema["description"]))
            for example in body.get("examples", {}).values():
                is_ours = address == ""
                yield sample(
                    example.get("summary", "For example"), None if is_ours else curl(address, example["value"])
                )
                if is_ours:
                    yield code(example["value"])

    def answers(self, responses: Json) -> Iterator[tuple[Markup, Markup]]:
        for status, given in responses.items():
            response = self.followed(given)
            codes = [each["value"]["code"] for each in examples_of(response).values() if "code" in each["value"]]
            shown = [name for name in response.get("headers", {}) if name not in EVERYWHERE]
            notes = [
                Markup(", ").join(fill("<code>{name}</code>", name=name) for name in names) for names in (codes, shown)
            ]
            yield (
                fill("<code>{status}</code>", status=status),
                fill(
                    '{text} <span class="notes">{notes}</span>',
                    text=inline(response["description"]),
                    notes=Markup(" with ").join(notes) if shown else notes[0],
                ),
            )

    def examples(self, responses: Json) -> Iterator[Markup]:
        for status, given in responses.items():
            content = self.followed(given).get("content", {}).get("application/json", {})
            if "example" in content:
                yield sample(f"An answer {status}", None)
                yield code(content["example"])

    # Data

    def schemas(self) -> Iterator[Markup]:
        for name, schema in self.components["schemas"].items():
            if name in ("Payment", "Status", "Notification", "Problem"):
                yield fill("<h3>{name}</h3>\n{text}", name=name, text=prose(schema.get("description", "")))
                if "properties" in schema:
                    yield table(("Member", "Rule"), self.fields(schema), f"Members of {name}")
                else:
                    yield fill("<p>{rule}</p>", rule=self.rule(schema, ""))

    def fields(self, schema: Json, prefix: str = "") -> Iterator[tuple[Markup, Markup]]:
        for name, given in schema["properties"].items():
            field = self.followed(given)
            is_required = name in schema.get("required", [])
            yield self.name(prefix + name, is_required=is_required), self.rule(field, field.get("description", ""))
            if "properties" in field and "NotifiedPayment" not in given.get("$ref", ""):
                yield from self.fields(field, f"{prefix}{name}.")

    def name(self, name: str, *, is_required: bool, where: str = "") -> Markup:
        words = " ".join(
            word for word in (f"in the {where}," if where else "", "required" if is_required else "optional")
        )
        return fill('<code>{name}</code> <span class="notes">{words}</span>', name=name, words=words.strip())

    def rule(self, schema: Json, text: str) -> Markup:
        """What a value must be: in words where there are some, then the bounds that the schema sets."""
        return fill(
            '{text} <span class="notes">{facts}</span>',
            text=paragraphs(text),
            facts=Markup(" · ").join(facts(schema)),
        )

    def errors(self) -> Markup:
        rows = []
        for status, response in sorted(self.problems().items()):
            for example in examples_of(response).values():
                problem = example["value"]
                rows.append(
                    (
                        fill("<code>{code}</code>", code=problem["code"]),
                        fill("<code>{status}</code>", status=status),
                        fill("{message}", message=problem["message"]),
                    )
                )
        return table(("Code", "Status", "Message"), dict.fromkeys(rows), "All codes of errors")

    def problems(self) -> dict[str, Json]:
        """Each response of an error, by a key that begins with its status."""
        found = {"405": self.components["responses"]["MethodNotAllowed"]}
        for address in self.description["paths"].values():
            for operation in address.values():
                for status, given in operation["responses"].items():
                    if "$ref" in given:
                        found.setdefault(status, {"content": {"application/json": {"examples": {}}}})
                        examples_of(found[status]).update(examples_of(self.followed(given)))
        return found

    def followed(self, value: Json) -> Json:
        """What a `$ref` leads to."""
        while "$ref" in value:
            found: Any = self.description
            for name in value["$ref"].removeprefix("#/").split("/"):
                found = found[name]
            value = found
        return value


EVERYWHERE = ("X-Request-Id", "Cache-Control", "X-Content-Type-Options", "Referrer-Policy", "Content-Security-Policy")
"""Headers that tell a reader of one answer nothing."""


def facts(schema: Json) -> Iterator[Markup]:
    """The bounds that a schema sets, a few words each."""
    if kinds := schema.get("type"):
        yield escape(" or ".join([kinds] if isinstance(kinds, str) else kinds))
    for word in ("enum", "const"):
        if word in schema:
            values = schema[word] if word == "enum" else [schema[word]]
            yield Markup(", ").join(fill("<code>{value}</code>", value=json_text(value)) for value in values)
    if "format" in schema:
        yield escape(schema["format"])
    for word, text in BOUNDS.items():
        if word in schema:
            yield escape(text.format(schema[word]))
    if 0 < len(schema.get("pattern", "")) <= LONGEST_PATTERN:
        yield fill("<code>{pattern}</code>", pattern=schema["pattern"])


BOUNDS = {
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "maxProperties": "at most {} members",
}


def examples_of(response: Json) -> Json:
    content: Json = response.get("content", {}).get("application/json", {})
    examples: Json = content.get("examples", {})
    return examples


# HTML


def fill(template: str, **values: object) -> Markup:
    """A template of ours. What is put in its places is escaped, unless it is Markup itself."""
    return Markup(template).format(**values)  # noqa: S704  # a text of ours


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("\n").join(part for part in parts if part)


def inline(text: str) -> Markup:
    """`code` and [links](https://…) in a line of text."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\[([^]]+)\]\((https://[^)]+)\)", r'<a href="\2">\1</a>', marked))  # noqa: S704


def paragraphs(text: str) -> Markup:
    return Markup("<br>").join(inline(part) for part in text.split("\n\n") if part)


def prose(text: str) -> Markup:
    return join(fill("<p>{text}</p>", text=inline(part)) for part in text.split("\n\n") if part)


def table(titles: tuple[str, ...], rows: Iterable[tuple[Markup, ...]], caption: str) -> Markup:
    head = Markup("").join(fill('<th scope="col">{title}</th>', title=title) for title in titles)
    body = join(
        Markup("<tr>") + Markup("").join(fill("<td>{cell}</td>", cell=cell) for cell in row) + Markup("</tr>")
        for row in rows
    )
    return fill(
        '<div class="wide" role="group" aria-label="{caption}" tabindex="0"><table>\n<caption>{caption}</caption>\n'
        "<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>",
        caption=caption,
        head=head,
        body=body,
    )


def sample(title: str, command: str | None) -> Markup:
    heading = fill("<h4>{title}</h4>", title=title)
    return join([heading, preformatted(command)]) if command else heading


def code(value: object) -> Markup:
    return preformatted(json_text(value, indent=2))


def preformatted(text: str) -> Markup:
    return fill('<pre tabindex="0"><code>{text}</code></pre>', text=text)


def curl(address: str, body: Json) -> str:
    lines = [
        f"curl https://pay.example.com{address} \\",
        "  -H 'Content-Type: application/json' -H 'Idempotency-Key: order-1001' \\",
        f"  -d '{json_text(body, indent=2)}'",
    ]
    return "\n".join(lines)


def json_text(value: object, indent: int | None = None) -> str:
    """JSON with amounts as they are written: 50.00, which `json` writes as 50.0."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return re.sub(r'("(?:refunded_)?amount": [0-9]+\.[0-9])(?=[,\n}])', r"\g<1>0", text)


if __name__ == "__main__":
    main()
