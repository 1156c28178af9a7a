"""Schemas of other projects' Kubernetes objects: data that are not part of this one, for tests that can have them.

``CLLMR_CRDS`` names the folder; without it the tests that validate by them are skipped, with that as the reason.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

Json = dict[str, Any]


def folder() -> Path:
    """Where the schemas are; skips the test when they are not at hand."""
    named = os.environ.get("CLLMR_CRDS")
    if not named or not Path(named).is_dir():
        pytest.skip(f"CLLMR_CRDS ({named}) is not a folder of custom resource definitions")
    return Path(named)


@cache
def schema(file: str, version: str) -> Json:
    """The schema of one version of a custom resource; a field that it does not name is an error, as with --validate=strict."""
    definition = yaml.safe_load((folder() / file).read_text(encoding="utf-8"))
    (found,) = (one for one in definition["spec"]["versions"] if one["name"] == version)
    return closed(found["schema"]["openAPIV3Schema"], root=True)


def closed(node: Any, root: bool = False) -> Any:
    """A structural schema as JSON schema that refuses unknown fields."""
    if isinstance(node, list):
        return [closed(one) for one in node]
    if not isinstance(node, dict):
        return node
    done = {key: closed(value) for key, value in node.items() if key not in ("format", "x-kubernetes-validations")}
    if node.get("x-kubernetes-int-or-string"):
        done.pop("type", None)
        done["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in node and isinstance(node["properties"], dict) and not isinstance(node["properties"].get("type"), str):
        done["properties"] = {key: closed(value) for key, value in node["properties"].items()}
        if root:
            done["properties"]["metadata"] = {"type": "object"}
        if not node.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in node:
            done["additionalProperties"] = False
    return done


def defaulted(value: Any, schema: Json) -> Any:
    """`value` as an API server would store it: defaults filled in, fields that are null left out."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        filled = {key: one["default"] for key, one in known.items() if "default" in one and value.get(key) is None}
        kept = {key: one for key, one in value.items() if one is not None}
        inner = schema.get("additionalProperties")
        return {
            key: defaulted(one, known.get(key) or (inner if isinstance(inner, dict) else {}))
            for key, one in {**filled, **kept}.items()
        }
    if isinstance(value, list):
        return [defaulted(one, schema.get("items", {})) for one in value]
    return value


def problems(value: Json, schema: Json) -> list[str]:
    """What an API server would refuse, by path."""
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(defaulted(value, schema))]
