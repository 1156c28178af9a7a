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


def mappings(package: str, attribute: str, but: tuple[str, ...]) -> dict[str, Any]:
    """What the dicts of that name in a package's files hold together; the files of `but` have none.

    Raises:
        TypeError: another file has none either, or two have the same name in it.
    """
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for file in (file for file in names(package) if file not in but):
        module = import_module(f"{__package__}.{package}.{file}")
        offered = getattr(module, attribute, {})
        if not offered:
            raise TypeError(f"{module.__name__} offers nothing: a file here has {attribute}, by name what it offers")
        if twice := next((name for name in offered if name in owners), None):
            both = f"{owners[twice]} and {module.__name__} both offer '{twice}'"
            raise TypeError(f"{both}: give it another name in the {attribute} of one of them")
        found |= offered
        owners |= dict.fromkeys(offered, module.__name__)
    return found


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
