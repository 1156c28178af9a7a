"""Feast imported without what its import costs and nobody here uses."""

import sys
import threading
from typing import Any

_IMPORTING = threading.Lock()


def import_feast() -> None:
    """Imports Feast in three seconds instead of twelve and, where torch is not imported yet, in 130 MB less.

    Feast imports torch where it is installed, which neither the features nor an endpoint need, and lets typeguard rewrite its
    classes to check every call, which is meant for its own development: each decorated method has its module parsed again.
    To be called before anything else imports Feast.
    """
    import typeguard

    with _IMPORTING:
        checked, torch = typeguard.typechecked, "torch"
        hide_torch = torch not in sys.modules
        if hide_torch:
            sys.modules[torch] = None  # type: ignore[assignment]  # Python's own way to say: cannot be imported
        typeguard.typechecked = _unchecked
        try:
            import feast  # noqa: F401
        finally:
            typeguard.typechecked = checked
            if hide_torch:
                del sys.modules[torch]


def _unchecked(target: Any = None, **options: Any) -> Any:
    return target if target is not None else lambda decorated: decorated
