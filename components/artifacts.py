"""The contract between stages: a manifest, a content-addressed directory, an atomic commit.

A stage writes its data under ``storage_root/<stage>/<fingerprint>/`` and hands on a small manifest. The fingerprint is known
before the stage runs (its name, version, config and its parents' fingerprints), the manifest is written last, and a
directory without one does not exist. So a stage whose manifest exists is skipped (`components.stages`): that is resume, caching
and idempotent retry, with one mechanism.

``storage_root`` is a local path or a URI that pyarrow reads (``s3://bucket/prefix``, ``gs://...``, ``file:///...``); data of a
remote store are fetched into a local cache, checked against the manifest and then read as files. No folder can be renamed in
one, so every upload has a folder of its own below the output's, which the manifest names: writing that is the switch.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple, Self
from uuid import uuid4

import pyarrow.fs as pafs
from pydantic import BaseModel, ConfigDict

from components.errors import ArtifactError, StorageError, first_line
from components.progress import emit

MANIFEST = "manifest.json"
REUSED = "reused"
"""Beside a manifest: was written when a run last took this output instead of building it."""
FINGERPRINT_LENGTH = 16  # hex digits: 64 bits, no clash in any history of runs
UNUSED_SECONDS = 3600.0
CACHE_HINT = "Set CLLMR_CACHE to a folder you can write."
STORAGE_HINT = "Check that the storage root exists, is writable and has room, or choose another with --storage."
WORK = ".work-"
"""Begins the name of what an unfinished output keeps beside the finished ones."""
TEMPORARY = ".tmp-"
"""Begins the name of what is being built, or removed, beside them."""
DATA = "data-"
"""Begins the name of an upload's folder in a remote store."""
_OURS = re.compile(rf"[0-9a-f]{{{FINGERPRINT_LENGTH}}}|{re.escape(WORK)}.+|{re.escape(TEMPORARY)}.+")


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What a stage hands on: where its data lie and what they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int
    fingerprint: str
    storage_root: str
    config: dict[str, Any]
    """The stage's own settings, as used."""
    parents: dict[str, str]
    """Fingerprint of every input, by stage name."""
    folder: str = ""
    """Where the files lie below the artifact's own folder: in one per upload to a remote store, else in itself."""
    files: dict[str, FileEntry]
    """Every file, by its path inside the artifact."""
    facts: dict[str, Any]
    """Small figures worth knowing without opening the data: counts, metrics, names."""
    seconds: float
    """Wall-clock seconds the stage took when it ran."""
    peak_memory_mb: float
    """Largest proportional memory (PSS) of the stage's process and all its children, MiB."""
    created_at: str

    @property
    def place(self) -> str:
        """The directory of the artifact's files, relative to the storage root."""
        return "/".join(filter(None, (self.stage, self.fingerprint, self.folder)))

    @property
    def uri(self) -> str:
        """The directory of the artifact's files, as a path or URI below the storage root."""
        return _join(self.storage_root, self.place)

    def path(self, *parts: str) -> Path:
        """The artifact as a local directory, fetched when the store is remote.

        Args:
            parts: the folders and files that are needed, none: all; of a remote store there is nothing else then, and for a
                while only, see `hold`.

        Raises ArtifactError when a file is missing or is not what the manifest says.
        """
        return Store(self.storage_root).local_path(self, *parts)

    def _files_of(self, parts: tuple[str, ...]) -> dict[str, FileEntry]:
        return {name: entry for name, entry in self.files.items() if not parts or name in parts or name.split("/")[0] in parts}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the manifest as the file of a KFP artifact."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.model_dump_json(indent=2), encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a manifest file; raises ArtifactError when it is missing or damaged."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"manifest {path} cannot be read: {first_line(error)}.", "Run the stage again.") from None


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON that is the same bytes for the same value."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The contents of a JSON file; what is missing or damaged raises as it comes, OSError or ValueError."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


class StoredFile(NamedTuple):
    """A file below the storage root."""

    path: str
    """Below the root."""
    bytes: int
    written: datetime


class StoredFolder(NamedTuple):
    """A folder of an output, finished or not, or of one of its uploads to a remote store."""

    path: str
    """Below the root."""
    bytes: int
    newest: datetime
    """When its newest file was written."""
    has_manifest: bool
    """Readable or not."""


class Store:
    """Artifacts below one storage root."""

    def __init__(self, root: str) -> None:
        self.root = str(root)
        self.is_remote = "://" in self.root
        try:
            if self.is_remote:
                self._fs, self._base = pafs.FileSystem.from_uri(self.root)
            else:
                self._fs, self._base = pafs.LocalFileSystem(), str(Path(self.root).absolute())
        except (OSError, ValueError) as error:
            raise StorageError(
                f"storage root '{root}' is not usable: {first_line(error)}.",
                "Use a local path or an s3://, gs://, abfs:// or file:// URI.",
            ) from None

    def _remote(self, *parts: str) -> str:
        return "/".join([self._base.rstrip("/"), *parts])

    def shelf(self, *parts: str) -> pafs.FileSystem:
        """What lies below the root at `parts`, as a file system of its own: for what runs share and no fingerprint names."""
        return pafs.SubTreeFileSystem(self._remote(*parts), self._fs)

    def directory(self, stage: str, name: str) -> Path:
        """A local directory for `stage` that survives a killed run, on this machine; created on first use."""
        return self._make_directory(stage, f"{WORK}{name}")

    def work(self, stage: str, name: str) -> tuple[pafs.FileSystem, str]:
        """Where in the store `stage` keeps what survives a killed run and its machine (checkpoints): file system and path."""
        return self._fs, self._remote(stage, f"{WORK}{name}")

    def remove_work(self, stage: str, name: str) -> None:
        """Removes what lies at `work`, if anything does."""
        self.remove(f"{stage}/{WORK}{name}")

    def find(self, stage: str, name: str) -> Manifest | None:
        """The committed manifest of one output, or None; a damaged manifest counts as none and is reported.

        Raises StorageError when the store does not say whether there is one: it is out of reach, or refuses.
        """
        try:
            with self._fs.open_input_stream(self._remote(stage, name, MANIFEST)) as stream:
                return Manifest.model_validate_json(stream.read()).model_copy(update={"storage_root": self.root})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(error, stage, name, MANIFEST) from None
        except ValueError as error:
            emit("manifest refused", stage=stage, fingerprint=name, reason=first_line(error))
            return None

    def write_note(self, text: str, *path: str) -> None:
        """Writes a small file that is no artifact, below the root."""
        self._fs.create_dir(self._remote(*path[:-1]), recursive=True)
        with self._fs.open_output_stream(self._remote(*path)) as stream:
            stream.write(text.encode())

    def read_note(self, *path: str) -> str | None:
        """What `write_note` wrote; None: nothing."""
        try:
            with self._fs.open_input_stream(self._remote(*path)) as stream:
                return str(stream.read().decode())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove_note(self, *path: str) -> None:
        """Removes what `write_note` wrote, if it is there."""
        self._remove_file(self._remote(*path))

    def note_reuse(self, manifest: Manifest) -> None:
        """Notes that a run needs an output from now on, however old it is: for a clean-up, which has no other way to know."""
        note = self._remote(manifest.stage, manifest.fingerprint, REUSED)
        # what lies where nothing can be written is not cleaned up from here either, nor is the folder made of what is gone
        with suppress(OSError), self._fs.open_output_stream(note) as stream:
            stream.write(datetime.now(UTC).isoformat(timespec="seconds").encode())

    def reuses(self, stage: str) -> dict[str, datetime]:
        """When outputs of a stage were last reused, by fingerprint; raises StorageError as `find` does."""
        noted = [(file.path.split("/"), file.written) for file in self.files(stage)]
        return {parts[1]: written for parts, written in noted if parts[2:] == [REUSED]}

    def outputs(self, stage: str) -> list[Manifest]:
        """Every committed output of `stage`, oldest first; raises StorageError as `find` does."""
        found = self._listed(stage)
        names = sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)
        manifests = [self.find(stage, name) for name in names if _OURS.fullmatch(name) and not name.startswith(".")]
        return sorted((manifest for manifest in manifests if manifest), key=lambda manifest: manifest.created_at)

    def files(self, *parts: str) -> list[StoredFile]:
        """Every file below a place; raises StorageError as `find` does."""
        found = self._listed(*parts, recursive=True)
        base = len(self._remote(""))
        return [StoredFile(info.path[base:], info.size, info.mtime) for info in found if info.type == pafs.FileType.File]

    def _listed(self, *parts: str, recursive: bool = False) -> list[pafs.FileInfo]:
        """What lies below a place, nothing if that is not there; raises StorageError as `find` does."""
        try:
            found: list[pafs.FileInfo] = self._fs.get_file_info(
                pafs.FileSelector(self._remote(*parts), allow_not_found=True, recursive=recursive)
            )
        except OSError as error:
            raise self._unreadable(error, *parts) from None
        return found

    def _unreadable(self, error: OSError, *parts: str) -> StorageError:
        return StorageError(
            f"'{_join(self.root, *parts)}' cannot be read: {first_line(error)}.",
            "Check that the storage root can be reached and read, then try again, or choose another with --storage.",
        )

    def folders(self, stage: str) -> list[StoredFolder]:
        """Every folder of a stage, finished or not; beside one that has a manifest, each of its uploads.

        What has another name than a stage gives is somebody else's and not among them: a project may have a "train" of its own.
        """
        files, found = self.files(stage), dict[str, StoredFolder]()
        with_manifest = {file.path.removesuffix(f"/{MANIFEST}") for file in files if file.path.endswith(f"/{MANIFEST}")}
        for file in files:
            parts = file.path.split("/")
            if not _OURS.fullmatch(parts[1]):
                continue
            folder = "/".join(parts[:2])
            if folder in with_manifest and parts[2].startswith(DATA):
                folder = "/".join(parts[:3])
            before = found.get(folder, StoredFolder(folder, 0, file.written, folder in with_manifest))
            found[folder] = before._replace(bytes=before.bytes + file.bytes, newest=max(before.newest, file.written))
        return list(found.values())

    def remove(self, path: str) -> None:
        """Removes a file or folder by its path below the root, and this machine's copy; nothing happens if it is not there."""
        target = self._remote(path)
        match self._fs.get_file_info(target).type:
            case pafs.FileType.Directory if not self.is_remote:
                with _taken_away(Path(target)):
                    pass
            case pafs.FileType.Directory:
                with suppress(FileNotFoundError):  # another process may be as quick
                    self._fs.delete_dir(target)
            case pafs.FileType.File:
                self._remove_file(target)
        if self.is_remote:
            stage, *name = path.split("/")
            copy = _cache(self.root) / stage / "-".join(name)
            for one in (copy, *copy.parent.glob(f"{copy.name}-*")):  # the whole, and parts
                shutil.rmtree(one, ignore_errors=True)

    def discard(self, stage: str, name: str) -> None:
        """Forgets one output: without its manifest it does not exist, and the next run builds it again."""
        self._remove_file(self._remote(stage, name, MANIFEST))

    def _remove_file(self, target: str) -> None:
        if self._fs.get_file_info(target).type != pafs.FileType.NotFound:
            with suppress(FileNotFoundError):  # another process may be as quick
                self._fs.delete_file(target)

    def local_path(self, manifest: Manifest, *parts: str) -> Path:
        """See Manifest.path."""
        source = self._remote(manifest.place)
        if not self.is_remote:
            _verify(Path(source), manifest, parts)
            return Path(source)
        # one of its own for each upload, whose readers may be at work; and for parts, which never take the place of the whole
        name = "-".join(filter(None, (manifest.fingerprint, manifest.folder)))
        target = _cache(self.root) / manifest.stage / f"{name}{_suffix(parts)}"
        with suppress(OSError):  # a copy that another user made can be read all the same
            os.utime(target)  # before it is looked at: it may be about to be dropped, see `hold`
        if not _is_as_told(target, manifest, parts):  # not fetched yet, or damaged
            self._fetch(source, target, manifest, parts)
        return target

    def _fetch(self, source: str, target: Path, manifest: Manifest, parts: tuple[str, ...]) -> None:
        """Replaces the local copy `target` by what lies in the store; raises ArtifactError when that is damaged itself."""
        self._make_directory(manifest.stage)
        if parts:
            _drop_unused(target.parent, parts)
        staging = Path(mkdtemp(dir=target.parent, prefix=".fetch-", suffix=_suffix(parts)))
        try:
            for part in parts or ("",):
                place, local = "/".join(filter(None, (source, part))), staging / part
                if part not in manifest.files:
                    local.mkdir(exist_ok=True)
                with suppress(FileNotFoundError):  # told below, if the manifest names it
                    pafs.copy_files(
                        place, str(local), source_filesystem=self._fs, destination_filesystem=pafs.LocalFileSystem()
                    )
            _verify(staging, manifest, parts)
            _put_in_place(staging, target, lambda directory: _is_as_told(directory, manifest, parts))
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _make_directory(self, *parts: str) -> Path:
        """A directory on this machine, of the store itself or of its cache; raises StorageError, which says of which."""
        path = (_cache(self.root) if self.is_remote else Path(self._base)).joinpath(*parts)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK):
                raise PermissionError(f"Permission denied: '{path}'")
        except OSError as error:
            what, hint = (f"cache '{path}'", CACHE_HINT) if self.is_remote else (f"'{path}'", STORAGE_HINT)
            raise StorageError(f"{what} cannot be written: {first_line(error)}.", hint) from None
        return path

    @contextmanager
    def staging(self, stage: str) -> Iterator[Path]:
        """An empty local directory to build an output in; removed if it is not committed."""
        path = Path(mkdtemp(dir=self._make_directory(stage), prefix=TEMPORARY))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def commit(self, built: Path, manifest: Manifest, instead_of: Manifest | None = None) -> Manifest:
        """Makes `built` the output that `manifest` describes: data first, manifest last.

        What another process has put there first is kept, unless it is `instead_of`; the manifest of what lies there now. In a
        remote store replaced data stay for those who have the manifest before: a clean-up removes them.
        """
        (built / MANIFEST).unlink(missing_ok=True)
        if self.is_remote:
            there = self.find(manifest.stage, manifest.fingerprint)
            if there is not None and there != instead_of and is_whole(there):
                return there
            manifest = manifest.model_copy(update={"folder": f"{DATA}{uuid4().hex}"})
            target = self._remote(manifest.place)
            self._fs.create_dir(target, recursive=True)
            pafs.copy_files(str(built), target, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self._fs)
            self.write_note(manifest.model_dump_json(indent=2), manifest.stage, manifest.fingerprint, MANIFEST)
            return manifest
        target = self._remote(manifest.stage, manifest.fingerprint)
        (built / MANIFEST).write_bytes(manifest.model_dump_json(indent=2).encode())
        _put_in_place(built, Path(target), lambda directory: _has_manifest(directory, instead_of))
        return self.find(manifest.stage, manifest.fingerprint) or manifest  # None: removed again by another process


def hold(storage_root: str, stage: str, name: str, *parts: str) -> None:
    """Says that this machine's copies of parts of an output are in use; nothing happens where there is none.

    An endpoint fetches parts of one model after another for as long as it lives, so a fetch of parts drops the copies of these
    parts of other outputs that nobody has opened or held for `UNUSED_SECONDS`: who reads from one later holds it more often.
    Copies of whole outputs are those of runs, which may read them hours later, and stay.
    """
    if "://" in storage_root:
        for copy in (_cache(storage_root) / stage).glob(f"{name}*{_suffix(parts)}"):
            with suppress(OSError):  # dropped, or another user's, which can be read all the same
                os.utime(copy)


def _suffix(parts: tuple[str, ...]) -> str:
    return "".join(f"-{part}" for part in parts)


def cache_home() -> Path:
    """This machine's cache: copies of outputs of remote stores, and logs of runs that write to one.

    ``CLLMR_CACHE``, else ``cllmr`` in the user's cache folder. Raises StorageError when neither has a place.
    """
    if named := os.environ.get("CLLMR_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cllmr"
    except RuntimeError:
        raise StorageError("this machine's cache has no place: this user has no home folder.", CACHE_HINT) from None


def _cache(storage_root: str) -> Path:
    return cache_home() / hashlib.sha256(storage_root.encode()).hexdigest()[:12]


def _drop_unused(copies: Path, parts: tuple[str, ...]) -> None:
    """See `hold`; what a killed fetch has left goes too."""

    def is_used(copy: Path) -> bool:
        with suppress(FileNotFoundError):  # another process is at it too
            return time.time() - copy.stat().st_mtime < UNUSED_SECONDS
        return False

    for copy in list(copies.glob(f"*{_suffix(parts)}")):
        if not is_used(copy):
            with _taken_away(copy, is_used):  # it may have been opened since
                pass


def _verify(directory: Path, manifest: Manifest, parts: tuple[str, ...] = ()) -> None:
    for name, entry in manifest._files_of(parts).items():
        path = directory / name
        try:
            seen = sha256_file(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            seen = "no file"
        if seen != entry.sha256:
            raise ArtifactError(
                f"{path} is not what its manifest says: sha256 {seen}, expected {entry.sha256}.",
                f"Build it again: cllmr run --from {manifest.stage}",
            )


def is_whole(manifest: Manifest) -> bool:
    """Whether an output is still what it was; a damaged one is named."""
    try:
        manifest.path()
    except ArtifactError as error:
        emit("artifact refused", stage=manifest.stage, fingerprint=manifest.fingerprint, reason=error.message)
        return False
    return True


# A local directory changes by renaming alone, so that whoever reads it sees all of the old or all of the new. Other processes
# rename at the same time: what each does is decided by what its own rename has met or moved, never by an earlier look.


def _put_in_place(source: Path, target: Path, is_good: Callable[[Path], bool]) -> None:
    """Renames a directory to `target`, unless what lies there is good; anything else that does is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.chmod(0o755)
    with ExitStack() as replaced:  # whose removal takes a while: when `source` is in its place
        while True:
            try:
                source.rename(target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if is_good(target):  # another process was first
                return
            replaced.enter_context(_taken_away(target, is_good))


@contextmanager
def _taken_away(target: Path, is_good: Callable[[Path], bool] = lambda taken: False) -> Iterator[None]:
    """Renames a directory to where nobody looks, and removes it at the end; one that turns out to be good is put back."""
    with TemporaryDirectory(dir=target.parent, prefix=TEMPORARY) as aside:
        taken = Path(aside) / target.name
        with suppress(FileNotFoundError):  # another process has taken it away
            target.rename(taken)
        if is_good(taken):
            _put_in_place(taken, target, is_good)
        yield


def _has_manifest(directory: Path, other_than: Manifest | None) -> bool:
    """Whether a directory is a committed output, and another one; one whose manifest cannot be read is not."""
    try:
        found = Manifest.read(directory / MANIFEST)
    except ArtifactError:
        return False
    # the store may have been moved since
    return other_than is None or found != other_than.model_copy(update={"storage_root": found.storage_root})


def _is_as_told(directory: Path, manifest: Manifest, parts: tuple[str, ...]) -> bool:
    """Whether a directory holds what the manifest says."""
    try:
        _verify(directory, manifest, parts)
    except ArtifactError:
        return False
    return True


def _join(*parts: str) -> str:
    return "/".join([parts[0].rstrip("/"), *parts[1:]])
