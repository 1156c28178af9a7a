"""Checks custom resources as an API server does: defaults first, then unknown fields, the OpenAPI schema, and the CEL rules.

The definitions are other projects' and not part of this one. ``CLLMR_CRDS`` names their folder, by default shared/crds beside
the checkout; where neither is at hand, the tests that need them are skipped.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import cel
import pytest
import yaml
from jsonschema import Draft202012Validator

from tests import REPOSITORY

Schema = dict[str, Any]

DIRECTORY = Path(os.environ.get("CLLMR_CRDS") or REPOSITORY.parent / "shared" / "crds")
FOUND = DIRECTORY.is_dir()
needs_crds = pytest.mark.skipif(not FOUND, reason=f"no custom resource definitions at {DIRECTORY}: set CLLMR_CRDS")


@cache
def schema(api_version: str, kind: str) -> Schema:
    """The schema of a custom resource's kind."""
    group, version = api_version.split("/")
    for file in DIRECTORY.rglob(f"{group}_*.yaml"):
        text = file.read_text(encoding="utf-8")
        if f"kind: {kind}\n" not in text:  # to read all of a group takes seconds
            continue
        spec = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]
        if spec["names"]["kind"] == kind:
            return next(one["schema"]["openAPIV3Schema"] for one in spec["versions"] if one["name"] == version)
    raise LookupError(f"no file {group}_*.yaml below {DIRECTORY} defines {kind}: add its definition there.")


def problems(item: dict[str, Any]) -> list[str]:
    """What an API server would say against a custom resource, by path."""
    return broken(item, schema(item["apiVersion"], item["kind"]))


def broken(item: dict[str, Any], schema: Schema) -> list[str]:
    """What of an object its schema forbids, by path; rules about a change (oldSelf) are left out."""
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
