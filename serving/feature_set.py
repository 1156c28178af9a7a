"""A feature set as serving names and opens it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import Store
from components.errors import ArtifactError

JOIN_KEY = "user_id"


@dataclass(frozen=True)
class FeatureSet:
    """The features that one bundle was trained on."""

    storage_root: str
    fingerprint: str


_IMPORTING = threading.Lock()


@contextmanager
def lean_import() -> Iterator[None]:
    """Lets Feast be imported in one second instead of six, and in 130 MB less.

    Feast imports torch where it is installed, which an endpoint has no use for, and lets typeguard rewrite its classes to
    check every call, which is meant for its own development.
    """
    import typeguard

    with _IMPORTING:
        checked, torch = typeguard.typechecked, "torch"
        hide_torch = torch not in sys.modules
        if hide_torch:
            sys.modules[torch] = None  # type: ignore[assignment]  # Python's own way to say: cannot be imported
        typeguard.typechecked = _unchecked
        try:
            yield
        finally:
            typeguard.typechecked = checked
            if hide_torch:
                del sys.modules[torch]


def _unchecked(target: Any = None, **options: Any) -> Any:
    return target if target is not None else lambda decorated: decorated


def find_feature_set(storage_root: str, fingerprint: str) -> Path:
    """Where a feature set lies; Feast, which opens it, is imported on the way, see `lean_import`.

    Raises:
        ArtifactError: there is no such feature set.
    """
    manifest = Store(storage_root).find("features", fingerprint)
    if manifest is None:
        raise ArtifactError(
            f"feature set {fingerprint} is not below '{storage_root}'.", "Build it again: cllmr run --from features"
        )
    with lean_import():
        import feast  # noqa: F401  # here, before anything else imports it the slow way
    return manifest.path()
