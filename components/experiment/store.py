"""What experiments have measured, one file per unit of work, named by the hash of all that decides it.

A file is written beside its place and then renamed, so a killed run leaves finished units and nothing else; what cannot be
read counts as not there.
"""

import json
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from components.errors import StorageError, first_line
from components.progress import emit

Arrays = dict[str, npt.NDArray[Any]]
_FACTS = "facts"


@dataclass(frozen=True)
class Outcome:
    """What one unit of work found."""

    facts: dict[str, Any]
    """Figures and settings, as JSON knows them."""
    arrays: Arrays
    """Values per user."""


class Results:
    """Outcomes below one folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """Where the outcome of one unit is, or will be."""
        return self.folder / "units" / f"{key}.npz"

    def find(self, key: str) -> Outcome | None:
        """The outcome of a unit that was done, else None; a damaged file is reported and counts as none."""
        path = self.path(key)
        try:
            with np.load(path, allow_pickle=False) as file:
                facts = json.loads(bytes(file[_FACTS]))
                return Outcome(facts, {name: file[name] for name in file.files if name != _FACTS})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = first_line(error)
            emit("warning", stage="experiment", message=f"{path} cannot be read ({reason}): it is measured again")
            return None

    def keep(self, key: str, outcome: Outcome) -> None:
        """Writes an outcome; raises StorageError when the folder cannot be written."""
        facts = np.frombuffer(json.dumps(outcome.facts, sort_keys=True, allow_nan=False).encode(), dtype=np.uint8)
        arrays: Mapping[str, Any] = {_FACTS: facts, **outcome.arrays}
        write_atomically(self.path(key), lambda file: np.savez(file, **arrays))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file that is there as a whole or not at all; raises StorageError when that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".tmp-{secrets.token_hex(8)}")  # not of tempfile: others may read it, as the umask has it
        with open(beside, "xb") as file:
            try:
                write(file)
                file.flush()
                os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StorageError(
            f"'{path}' cannot be written: {error.strerror or error}.", "Choose a folder you can write with --work."
        ) from None
