"""Backbones, side encoders and effects by name: a new one is a file and nothing else.

Names are read from the folder and not by import: settings are checked where torch is not installed.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any


def names(package: str) -> tuple[str, ...]:
    """What a package beside this module offers, in alphabetical order: its files but `base`."""
    files = iter_modules([str(Path(__file__).parent / package)])
    return tuple(sorted(file.name for file in files if file.name != "base"))


def classes(package: str, base: type) -> dict[str, Any]:
    """Name -> the one subclass of `base` that the file of that name defines.

    Raises:
        TypeError: a file defines none, or several.
    """
    found: dict[str, Any] = {}
    for name in names(package):
        module = import_module(f"{__package__}.{package}.{name}")
        defined = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
        ]
        if len(defined) != 1:
            said = ", ".join(one.__name__ for one in defined) or "none"
            raise TypeError(f"{module.__name__} defines {said}: a file here defines one {base.__name__}")
        found[name] = defined[0]
    return found
