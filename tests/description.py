"""The description of the API, and how its schemas are followed and tried."""

import json
from typing import Any

import jsonschema_rs

from shop import ROOT

DESCRIPTION: dict[str, Any] = json.loads((ROOT / "web/static/openapi.json").read_text())
SCHEMAS: dict[str, Any] = DESCRIPTION["components"]["schemas"]


def validator(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    """For a schema of the description, or one that refers to its components. Its patterns are JavaScript's, as the
    specification says; Python's `$` would let a line break pass."""
    whole = {**schema, "components": DESCRIPTION["components"]}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)


def followed(value: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in value:
        found: Any = DESCRIPTION
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        value = found
    return value
