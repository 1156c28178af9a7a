"""Errors meant for the person who runs the platform.

Every one of them names the value seen, the values allowed and the next action, and is shown as one line with exit code 2.
A programmer's mistake is an ``assert`` or an ordinary exception and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend.

    Args:
        message: what was seen and what is allowed, one line.
        hint: the next action, one line.
    """

    code = "user_error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ConfigError(UserError):
    """A setting that does not exist or whose value is not allowed."""

    code = "config_error"


class DataError(UserError):
    """Input data that cannot be used; rows that merely break a rule are quarantined, not raised."""

    code = "data_error"


class StorageError(UserError):
    """A place that cannot be read or written."""

    code = "storage_error"


class ArtifactError(UserError):
    """A stage's output that is missing, incomplete or not what its manifest says."""

    code = "artifact_error"


class ServingError(UserError):
    """The endpoint cannot start or cannot be reached."""

    code = "serving_error"


class LLMError(UserError):
    """A language model that cannot be reached, or of whose answers too few can be used."""

    code = "llm_error"


class ClusterError(UserError):
    """The cluster cannot be reached, refused a request, or its answer makes no sense."""

    code = "cluster_error"


class LaunchError(UserError):
    """A job that does a stage's work elsewhere could not be started, failed, took too long or vanished."""

    code = "launch_error"


def error_of(code: str, message: str, hint: str) -> UserError:
    """The error that another process told of by its code; a plain UserError for a code that is not known here."""
    kinds = {kind.code: kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, UserError)}
    return kinds.get(code, UserError)(message, hint)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop; the error's class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .")


def did_you_mean(seen: str, allowed: Iterable[str]) -> str:
    """Allowed values as text, the closest one to `seen` first: ``did you mean 'x'? Allowed: x, y.``"""
    names = sorted(allowed)
    close = difflib.get_close_matches(seen, names, n=1)
    return (f"Did you mean '{close[0]}'? " if close else "") + f"Allowed: {', '.join(names)}."
