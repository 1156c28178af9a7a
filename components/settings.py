"""What all stages' settings have in common: they are frozen, hold no secret, and an error names the setting that is wrong."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from components.errors import ConfigError, did_you_mean

_NULL = "null"
_SECRET = "secret"
_INSTEAD_OF_SECRETS = {
    "http": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "https": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "postgresql": "PGPASSWORD or a pgpass file",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


class StageConfig(BaseModel):
    """Base of every stage's settings: frozen; an unknown key is an error with a suggestion, and no number is infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """What of this config decides the stage's output; part of the fingerprint."""
        return self.model_dump(mode="json")

    def identity_below(self, storage_root: str) -> dict[str, Any]:
        """Likewise of a run below `storage_root`, for a stage that reads something there that is no artifact."""
        return self.identity()

    def check_reuse(self, facts: Mapping[str, Any]) -> None:
        """Raises what the stage itself would, when an output of the same identity is refused by a setting outside of it.

        Args:
            facts: of the output's manifest.
        """

    def as_parameter(self) -> dict[str, Any]:
        """These settings as the value of a KFP parameter, which `parse` reads: its structs carry no null, so None is a word."""
        parameter: dict[str, Any] = _replaced(self.model_dump(mode="json"), None, _NULL)
        return parameter

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validates `values`; raises ConfigError naming the setting (`where` is its prefix), the value and the allowed ones."""
        try:
            return cls.model_validate(_replaced(dict(values), _NULL, None))
        except ValidationError as error:
            raise config_error(cls, error, where) from None


def config_error(model: type[BaseModel], error: ValidationError, where: str = "") -> ConfigError:
    """The first problem of a pydantic validation as one line for the user."""
    problem = min(error.errors(), key=lambda one: one["type"] == "missing")  # what is missing may be there, misspelt
    location = [str(part) for part in problem["loc"]]
    name = ".".join(([where] if where else []) + location)
    owner: Any = model
    for part in location[:-1]:
        field = owner.model_fields.get(part) if hasattr(owner, "model_fields") else None
        owner = field.annotation if field else None
    fields = owner.model_fields if owner is not None and hasattr(owner, "model_fields") else {}
    if problem["type"] == "extra_forbidden":
        return ConfigError(f"unknown setting '{name}'.", did_you_mean(location[-1], list(fields)))
    message = problem["msg"].removeprefix("Value error, ")
    # where people put secrets by mistake
    hidden = problem["type"] == _SECRET or (location and location[-1] in fields and not fields[location[-1]].repr)
    seen = "(not shown)" if hidden and problem["input"] is not None else repr(problem["input"])
    return ConfigError(f"setting '{name}' = {seen}: {message}.", "Correct it in the preset or with --set.")


def refuse_secret(uri: str, *, instead: str = "") -> str:
    """`uri`, unless it carries a password or key: settings are written to logs, manifests and compiled pipelines.

    A user name is none, but for s3 and http, where it can be a key or a token; nor is a query, but for http.

    Args:
        uri: a URI, or a path, which is let through.
        instead: where the secret belongs; empty: the environment variables that are read for this kind of URI.

    Raises:
        PydanticCustomError: there is a secret, which `config_error` does not show.
    """
    scheme, _, rest = uri.partition("://")
    kind = scheme.lower().partition("+")[0]
    named = re.match(r"[^/@:?#]*(?::([^@]*))?@", rest)  # a password may hold any other character, as databases' clients read it
    is_key = kind == "s3" or kind.startswith("http")
    asks = re.search(r"[?&][^=&]*(password|secret|token)[^=&]*=", rest) or (kind.startswith("http") and "?" in rest)
    if asks or (named and (is_key or named[1])):
        instead = instead or _INSTEAD_OF_SECRETS.get(kind, "the environment of what reads it")
        reason = (
            f"a password, key or query in an address would be written to logs and compiled pipelines: use {instead} instead"
        )
        raise PydanticCustomError(_SECRET, reason)
    return uri


Uri = Annotated[str, AfterValidator(refuse_secret)]
"""Of a setting: a path or URI without a secret."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def _replaced(value: Any, old: Any, new: Any) -> Any:
    """`value` with `old` replaced by `new` in all its mappings and lists."""
    if isinstance(value, dict):
        return {key: _replaced(inner, old, new) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(inner, old, new) for inner in value]
    return new if value == old else value
