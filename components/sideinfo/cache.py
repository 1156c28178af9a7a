"""Answers that were paid for, kept below the storage root and shared by all runs: the same question is never asked twice.

``answers/<space>/`` holds the answers of one model to one prompt: Parquet shards that are only ever added, each counted once
its marker (``.json``, written last) is there. Between two shards every answer is a line in a local journal, so that a killed
process loses none; the next one on that machine finds the journal without an owner and makes a shard of it. Where the machine
goes as well, the answers since the last shard are lost, at most a minute's.
"""

import fcntl
import hashlib
import io
import json
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from components.artifacts import Store
from components.errors import StorageError, first_line
from components.progress import emit
from components.sideinfo.backends import Answer, Space

DIRECTORY = "answers"
SHARD_ANSWERS = 2000
SHARD_SECONDS = 60.0

_SCHEMA = pa.schema(
    {"key": pa.string(), "text": pa.string(), "finish_reason": pa.string(), "tokens_in": pa.int64(), "tokens_out": pa.int64()}
)


class AnswerCache:
    """The answers below one storage root.

    Args:
        root: storage root, local or remote.
        writable: whether answers are added; otherwise nothing is written, also not the journals of killed runs.
    """

    def __init__(self, root: str, writable: bool) -> None:
        self._store = Store(root)
        self._shelf = self._store.shelf(DIRECTORY)
        self._writable = writable

    def find(self, space: Space, wanted: Callable[[list[str]], Collection[str]]) -> Iterator[Answer]:
        """The answers that are there, a shard at a time; a damaged one is named and left out, so its answers are asked again.

        Args:
            space: of the answers.
            wanted: told the keys of a shard; those of them whose answers are looked for, and have not come from another one.
        """
        if self._writable:
            self._adopt_journals()
        for name in self._committed(space.name):
            if (table := self._read(name)) is None:
                continue
            keys = pa.array(sorted(wanted(table["key"].to_pylist())), pa.string())
            yield from (Answer(**row) for row in table.filter(pc.is_in(table["key"], keys)).to_pylist())

    def is_asked_anew(self, space: Space) -> bool:
        """Whether the model has answered this prompt, but only with other tags or settings: nothing is in the space."""
        if self._committed(space.name):
            return False
        one_of_each = {name.partition("/")[0]: name for name in self._committed("")}
        for name in one_of_each.values():
            with suppress(OSError, ValueError, KeyError, TypeError), self._shelf.open_input_stream(f"{name}.json") as stream:
                about = json.loads(stream.read())
                if (about["prompt"], about["decoding"]["model"]) == (space.prompt.name, space.decoding.model):
                    return True
        return False

    def digest(self) -> str:
        """A hash of which shards there are, whosever answers they hold: none is ever changed, and no two have the same name.

        Raises StorageError when they cannot be listed.
        """
        try:
            found = self._shelf.get_file_info(pafs.FileSelector("", allow_not_found=True, recursive=True))
        except OSError as error:
            reason = first_line(error)
            raise StorageError(f"the answers below '{self._store.root}' cannot be listed: {reason}.", "Check it.") from None
        names = sorted(info.path for info in found if info.path.endswith(".json"))
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    @contextmanager
    def recorder(self, space: Space) -> Iterator[Callable[[Answer], None]]:
        """Keeps the answers it is told, as they come; those that came before an exception are kept as well."""
        if not self._writable:
            yield lambda answer: None
            return
        path = self._journals() / f"{uuid.uuid4().hex}.jsonl"
        unlocked = path.with_suffix(".new")
        with unlocked.open("x", encoding="utf-8") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            unlocked.rename(path)  # from now on others see it, and that it has an owner
            recorder = Recorder(self, space, journal)
            recorder.begin()
            try:
                yield recorder.keep
            finally:
                recorder.commit()
                path.unlink()

    def add(self, space_name: str, about: dict[str, Any], answers: Collection[Answer]) -> None:
        """One shard more: the data first, the marker last."""
        if not answers:
            return
        rows = [{name: getattr(answer, name) for name in _SCHEMA.names} for answer in answers]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), buffer, compression="zstd")
        now = datetime.now(UTC)
        name = f"{space_name}/{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}"
        marker = {
            **about,
            "answers": len(rows),
            "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
            "created_at": now.isoformat(timespec="seconds"),
        }
        self._shelf.create_dir(space_name, recursive=True)
        text = json.dumps(marker, indent=2, sort_keys=True)
        for suffix, content in ((".parquet", buffer.getvalue()), (".json", text.encode())):
            with self._shelf.open_output_stream(f"{name}{suffix}.part") as stream:
                stream.write(content)
            self._shelf.move(f"{name}{suffix}.part", f"{name}{suffix}")

    def _committed(self, space_name: str) -> list[str]:
        """Shards with a marker, oldest first; of all spaces where none is named."""
        found = self._shelf.get_file_info(pafs.FileSelector(space_name, allow_not_found=True, recursive=True))
        return sorted(info.path.removesuffix(".json") for info in found if info.path.endswith(".json"))

    def _read(self, name: str) -> pa.Table | None:
        try:
            with self._shelf.open_input_stream(f"{name}.json") as stream:
                expected = json.loads(stream.read())["sha256"]
            with self._shelf.open_input_stream(f"{name}.parquet") as stream:
                content = stream.read()
            if (seen := hashlib.sha256(content).hexdigest()) != expected:
                raise ValueError(f"sha256 {seen}, expected {expected}")
            return pq.read_table(pa.BufferReader(content), schema=_SCHEMA)
        except (OSError, ValueError, KeyError, TypeError) as error:
            emit("shard refused", shard=f"{DIRECTORY}/{name}", reason=first_line(error))
            return None

    def _journals(self) -> Path:
        return self._store.directory(DIRECTORY, "journals")

    def _adopt_journals(self) -> None:
        """Makes shards of what killed runs had not yet committed."""
        for path in sorted(self._journals().glob("*.jsonl")):
            with suppress(FileNotFoundError), path.open(encoding="utf-8") as journal:  # another run may be as quick
                try:
                    fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # its run is alive
                    continue
                space_name, about, answers = _read_journal(journal)
                self.add(space_name, about, answers)
                path.unlink()


@dataclass
class Recorder:
    """Adds answers to one space."""

    cache: AnswerCache
    space: Space
    journal: IO[str]
    pending: list[Answer] = field(default_factory=list)
    committed: float = field(default_factory=time.monotonic)

    @property
    def about(self) -> dict[str, Any]:
        """What the marker says of the answers: who was asked what, and how."""
        prompt = self.space.prompt
        return {
            "prompt": prompt.name,
            "prompt_version": prompt.version,
            "prompt_hash": prompt.hash,
            "decoding": asdict(self.space.decoding),
            "engine": self.space.engine,
        }

    def begin(self) -> None:
        """Starts the journal anew: it then holds nothing but whose answers it will hold."""
        self.journal.truncate(0)
        self.journal.seek(0)
        self._write([self.space.name, self.about])

    def keep(self, answer: Answer) -> None:
        """Kept when this returns, also if the process is then killed."""
        self._write(asdict(answer))
        self.pending.append(answer)
        if len(self.pending) >= SHARD_ANSWERS or time.monotonic() - self.committed >= SHARD_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Makes a shard of what the journal holds."""
        self.cache.add(self.space.name, self.about, self.pending)
        self.pending = []
        self.committed = time.monotonic()
        self.begin()

    def _write(self, value: Any) -> None:
        self.journal.write(json.dumps(value) + "\n")
        self.journal.flush()


def _read_journal(journal: IO[str]) -> tuple[str, dict[str, Any], list[Answer]]:
    """Whose answers a journal holds, and the answers; a last line that was cut off is left out."""
    lines: list[Any] = []
    for line in journal:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    if not lines:
        return "", {}, []
    return lines[0][0], lines[0][1], [Answer(**line) for line in lines[1:]]
