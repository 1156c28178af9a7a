"""Checks custom resources as an API server does: defaults first, then unknown fields, the OpenAPI schema, and the CEL rules."""

from functools import cache
from pathlib import Path
from typing import Any

import cel
import yaml
from jsonschema import Draft202012Validator

Schema = dict[str, Any]


@cache
def schemas(directory: Path) -> dict[tuple[str, str], Schema]:
    """The schema of every kind, by apiVersion and kind."""
    found = {}
    for file in sorted(directory.rglob("*.yaml")):
        for crd in yaml.load_all(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader):
            if crd and crd["kind"] == "CustomResourceDefinition":
                kind = crd["spec"]["names"]["kind"]
                for version in crd["spec"]["versions"]:
                    found[f"{crd['spec']['group']}/{version['name']}", kind] = version["schema"]["openAPIV3Schema"]
    return found


def problems(item: dict[str, Any], schema: Schema) -> list[str]:
    """What an API server would say against an object, by path; rules about a change (oldSelf) are left out."""
    body = {key: value for key, value in item.items() if key not in ("apiVersion", "kind", "metadata")}
    body = with_defaults(body, schema)
    unknown = list(unknown_fields(body, schema, ""))
    wrong = [
        f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}"
        for error in Draft202012Validator(schema).iter_errors(body)
    ]
    return unknown + wrong + list(broken_rules(body, schema, ""))


def with_defaults(value: Any, schema: Schema) -> Any:
    """`value` without nulls and with the schema's defaults, at every depth."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        filled = {name: item for name, item in value.items() if item is not None}
        for name, part in known.items():
            if "default" in part:
                filled.setdefault(name, part["default"])
        rest = schema.get("additionalProperties")
        rest = rest if isinstance(rest, dict) else {}
        return {name: with_defaults(item, known.get(name, rest)) for name, item in filled.items()}
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


def unknown_fields(value: Any, schema: Schema, path: str) -> Any:
    """Fields that the API server would drop without a word."""
    if schema.get("x-kubernetes-preserve-unknown-fields") or not schema:
        return
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        for name, item in value.items():
            if name in known:
                yield from unknown_fields(item, known[name], f"{path}.{name}")
            elif isinstance(rest, dict):
                yield from unknown_fields(item, rest, f"{path}.{name}")
            elif not rest and schema.get("type") == "object" and known:
                yield f"{path}.{name}".lstrip(".") + ": unknown field"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, schema.get("items", {}), f"{path}[{index}]")


def broken_rules(value: Any, schema: Schema, path: str) -> Any:
    """CEL rules of the schema that the value breaks."""
    for validation in schema.get("x-kubernetes-validations", []):
        rule = validation["rule"]
        if "oldSelf" not in rule and not cel.evaluate(rule, {"self": value}):
            yield f"{path.lstrip('.')}: {validation.get('message', rule)}"
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        rest = rest if isinstance(rest, dict) else {}
        for name, item in value.items():
            yield from broken_rules(item, known.get(name, rest), f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from broken_rules(item, schema.get("items", {}), f"{path}[{index}]")
