"""The contract between stages: an output is whole or does not exist, wherever it lies and whatever happens to it."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from components import artifacts
from components.artifacts import UNUSED_SECONDS, Manifest, Store, hold, sha256_file, write_json
from components.errors import ArtifactError, ConfigError, DataError, StorageError
from components.settings import StageConfig
from components.stages import Stage, fingerprint, run_stage
from tests import REPOSITORY

STAGE = Stage("planting", version=1)
Build = Callable[[Path], dict[str, Any]]


class Soil(BaseModel):
    """A setting with settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int = 3
    kind: str | None = None


class Planting(StageConfig):
    """Settings of the tests' stage."""

    seeds: int = 5
    soil: Soil = Soil()


def build(directory: Path) -> dict[str, Any]:
    (directory / "deep").mkdir()
    (directory / "deep/data.bin").write_bytes(bytes(range(256)))
    write_json(directory / "figures.json", {"b": 1, "a": [1.5, "é"]})
    return {"rows": 2}


def never(directory: Path) -> dict[str, Any]:
    raise AssertionError("this output exists and must be reused")


def run(root: object, work: Build = build, **parents: Manifest) -> Manifest:
    return run_stage(STAGE, Planting(), str(root), parents, work)


def leftovers(root: Path) -> list[str]:
    """Everything below a stage's folder that is not a committed output."""
    return sorted(
        path.name
        for path in (root / STAGE.name).glob("*")
        if path.name.startswith(".") or not (path / "manifest.json").exists()
    )


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage root that is a URI, and a cache of its own."""
    monkeypatch.setenv("CLLMR_CACHE", str(tmp_path / "cache"))
    return f"file://{tmp_path / 'bucket'}"


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("CLLMR_EVENTS", str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


def test_a_manifest_names_every_file_with_its_hash_and_size(tmp_path: Path) -> None:
    manifest = run(tmp_path)
    assert set(manifest.files) == {"deep/data.bin", "figures.json"}
    assert manifest.files["deep/data.bin"].bytes == 256
    # printf of all bytes 0 to 255 through sha256sum
    assert manifest.files["deep/data.bin"].sha256 == "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"
    assert manifest.path() == tmp_path / "planting" / manifest.fingerprint
    assert (manifest.path() / "figures.json").read_text(
        encoding="utf-8"
    ) == '{\n  "a": [\n    1.5,\n    "é"\n  ],\n  "b": 1\n}\n'
    assert manifest.facts == {"rows": 2}
    assert manifest.peak_memory_mb > 1
    assert leftovers(tmp_path) == []
    assert run(tmp_path, never) == manifest


def test_a_fingerprint_is_made_of_stage_version_settings_and_parents_and_of_nothing_else() -> None:
    base = fingerprint(STAGE, {"a": 1, "b": 2}, {"x": "1", "y": "2"})
    assert len(base) == 16
    assert base == fingerprint(STAGE, {"b": 2, "a": 1}, {"y": "2", "x": "1"})
    others = [
        fingerprint(Stage("planting", 2), {"a": 1, "b": 2}, {"x": "1", "y": "2"}),
        fingerprint(Stage("sowing", 1), {"a": 1, "b": 2}, {"x": "1", "y": "2"}),
        fingerprint(STAGE, {"a": 1, "b": 3}, {"x": "1", "y": "2"}),
        fingerprint(STAGE, {"a": 1, "b": 2}, {"x": "1", "y": "3"}),
        fingerprint(STAGE, {"a": 1, "b": 2}, {"x": "2", "y": "1"}),
    ]
    assert len({base, *others}) == 6


def test_a_changed_parent_makes_another_output(tmp_path: Path) -> None:
    parent = run_stage(Stage("soil", 1), Planting(), str(tmp_path), {}, build)
    other = run_stage(Stage("soil", 2), Planting(), str(tmp_path), {}, build)
    first, second = run(tmp_path, soil=parent), run(tmp_path, soil=other)
    assert first.fingerprint != second.fingerprint
    assert first.parents == {"soil": parent.fingerprint}


def test_a_directory_without_a_manifest_does_not_exist_and_is_replaced(tmp_path: Path) -> None:
    manifest = run(tmp_path)
    (manifest.path() / "manifest.json").unlink()
    (manifest.path() / "stray").write_text("of a run that was killed")
    assert Store(str(tmp_path)).find("planting", manifest.fingerprint) is None
    assert Store(str(tmp_path)).outputs("planting") == []
    again = run(tmp_path)
    assert not (again.path() / "stray").exists()
    assert again.files == manifest.files


def test_an_output_appears_all_at_once(tmp_path: Path) -> None:
    def watched(directory: Path) -> dict[str, Any]:
        facts = build(directory)
        assert Store(str(tmp_path)).outputs("planting") == []
        assert [path.name[:5] for path in (tmp_path / "planting").iterdir()] == [".tmp-"]
        return facts

    run(tmp_path, watched)
    assert len(Store(str(tmp_path)).outputs("planting")) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from components.stages import Stage, run_stage
from components.settings import StageConfig

def build(directory):
    (directory / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)

run_stage(Stage("planting", 1), StageConfig(), sys.argv[1], {}, build)
"""


def test_a_killed_stage_leaves_no_output(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=REPOSITORY, capture_output=True)
    assert killed.returncode == -9
    assert Store(str(tmp_path)).outputs("planting") == []
    run_stage(STAGE, StageConfig(), str(tmp_path), {}, build)
    assert len(Store(str(tmp_path)).outputs("planting")) == 1


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", [damage, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_a_damaged_file_is_noticed_named_and_built_again(
    tmp_path: Path, how: Callable[[Path], None], events: Callable[[], list[dict[str, Any]]]
) -> None:
    manifest = run(tmp_path / "store")
    how(tmp_path / "store" / "planting" / manifest.fingerprint / "deep/data.bin")
    with pytest.raises(ArtifactError, match=r"data\.bin is not what its manifest says: .*cllmr run --from planting"):
        manifest.path()
    again = run(tmp_path / "store")
    assert again.files == manifest.files
    assert again.path().is_dir()
    refused = [event for event in events() if event["event"] == "artifact refused"]
    assert len(refused) == 1
    assert refused[0]["fingerprint"] == manifest.fingerprint
    assert "data.bin" in refused[0]["reason"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "planting"}', b"\xff\xfe\x00"])
def test_a_damaged_manifest_counts_as_none_and_is_built_again(tmp_path: Path, content: str | bytes) -> None:
    manifest = run(tmp_path)
    path = manifest.path() / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match=r"manifest .*manifest\.json cannot be read: .*Run the stage again"):
        Manifest.read(path)
    assert Store(str(tmp_path)).find("planting", manifest.fingerprint) is None
    assert run(tmp_path).files == manifest.files


def test_a_manifest_that_the_store_does_not_give_is_an_error_and_not_none(
    tmp_path: Path, events: Callable[[], list[dict[str, Any]]]
) -> None:
    manifest = run(tmp_path)
    path = manifest.path() / "manifest.json"
    path.unlink()
    path.mkdir()  # as a store that refuses or is out of reach: nobody can say what is there
    with pytest.raises(StorageError, match=r"manifest\.json' cannot be read: .*try again, or choose another with --storage"):
        Store(str(tmp_path)).find("planting", manifest.fingerprint)
    with pytest.raises(StorageError):
        run(tmp_path, never)
    assert (events()[-1]["event"], events()[-1]["code"]) == ("stage failed", "storage_error")
    assert (manifest.path() / "figures.json").exists()


def test_a_listing_that_the_store_does_not_give_is_an_error_and_not_empty(tmp_path: Path) -> None:
    (tmp_path / "planting").write_text("no directory")
    store = Store(str(tmp_path))
    for listing in (store.outputs, store.files, store.folders):
        with pytest.raises(StorageError, match=r"/planting' cannot be read: .*try again, or choose another with --storage"):
            listing("planting")


def test_a_damaged_manifest_is_replaced_by_the_one_built_again(tmp_path: Path) -> None:
    path = run(tmp_path).path() / "manifest.json"
    path.write_text("{")
    manifest = run(tmp_path)
    assert Manifest.read(path) == manifest
    assert run(tmp_path, never) == manifest


def test_an_output_that_filled_something_which_is_gone_is_built_again(tmp_path: Path) -> None:
    calls: list[Path] = []

    def counted(directory: Path) -> dict[str, Any]:
        calls.append(directory)
        return build(directory)

    for is_live in (True, True, False):
        run_stage(STAGE, Planting(), str(tmp_path), {}, counted, is_live=lambda manifest, live=is_live: live)
    assert len(calls) == 2


def test_a_moved_store_is_read_where_it_lies_now(tmp_path: Path) -> None:
    manifest = run(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    found = run(tmp_path / "new", never)
    assert found.storage_root == str(tmp_path / "new")
    assert found.path() == tmp_path / "new" / "planting" / manifest.fingerprint


def test_a_remote_store_gives_back_what_was_written(remote: str, tmp_path: Path) -> None:
    manifest = run(remote)
    assert manifest.uri == f"{remote}/planting/{manifest.fingerprint}/{manifest.folder}"
    assert run(remote, never) == manifest
    local = manifest.path()
    assert local.is_relative_to(tmp_path / "cache")
    assert {name: sha256_file(local / name) for name in manifest.files} == {
        name: entry.sha256 for name, entry in manifest.files.items()
    }
    bucket = tmp_path / "bucket" / "planting"
    assert sorted(path.name for path in bucket.iterdir()) == [manifest.fingerprint]
    assert not list((tmp_path / "cache").rglob(".*")), "staging or fetching left something"


def test_what_is_told_of_an_output_in_a_remote_store_says_where_its_files_are(
    remote: str, events: Callable[[], list[dict[str, Any]]]
) -> None:
    """Thus a person gets at serve.yaml."""
    files = set(run(remote).files)
    run(remote, never)
    done, reused = [event["uri"] for event in events() if event["event"] in ("stage done", "stage reused")]
    assert done == reused
    folder = Path(done.removeprefix("file://"))
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == files
    text = (REPOSITORY / "k8s" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"aws s3 cp (\S+) k8s/overlays/prod/serve\.yaml", text) == ["URI/serve.yaml"]


def test_a_remote_output_without_a_manifest_does_not_exist(remote: str, tmp_path: Path) -> None:
    manifest = run(remote)
    (tmp_path / "bucket/planting" / manifest.fingerprint / "manifest.json").unlink()
    assert Store(remote).find("planting", manifest.fingerprint) is None
    assert run(remote).files == manifest.files


def test_a_remote_file_damaged_before_it_is_fetched_is_noticed_and_built_again(remote: str, tmp_path: Path) -> None:
    manifest = run(remote)
    damage(tmp_path / "bucket" / manifest.place / "deep/data.bin")
    with pytest.raises(ArtifactError, match=r"data\.bin is not what its manifest says"):
        manifest.path()
    assert run(remote).path().is_dir()


def test_a_refused_download_is_not_left_in_the_cache(remote: str, tmp_path: Path) -> None:
    manifest = run(remote)
    damage(tmp_path / "bucket" / manifest.place / "deep/data.bin")
    with pytest.raises(ArtifactError, match=r"data\.bin is not what its manifest says"):
        manifest.path()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_parts_of_outputs_are_fetched_alone_and_dropped_when_nobody_holds_them(remote: str, tmp_path: Path) -> None:
    made = [run_stage(STAGE, Planting(seeds=seeds), remote, {}, build) for seeds in range(3)]
    first, whole = made[0].path("deep"), made[0].path()
    assert [path.name for path in first.rglob("*") if path.is_file()] == ["data.bin"]
    long_ago = time.time() - 2 * UNUSED_SECONDS

    def age(*copies: Path) -> None:
        for copy in copies:
            os.utime(copy, (long_ago, long_ago))

    killed = first.parent / ".fetch-killed-deep"
    killed.mkdir()
    age(first, whole, killed)
    hold(remote, "planting", made[0].fingerprint, "deep")  # as an endpoint does whose model stays
    second = made[1].path("deep")
    assert (first.is_dir(), second.is_dir(), killed.exists()) == (True, True, False)
    age(first, second)
    assert made[1].path("deep") == second  # is used from now on: it was opened again
    made[2].path("deep")
    assert (first.exists(), second.is_dir()) == (False, True)
    assert whole.is_dir(), "a run may read it hours later"
    assert made[0].path("deep") == first, "fetched again"
    assert (first / "deep/data.bin").read_bytes()
    other = run_stage(STAGE, Planting(seeds=9), remote, {}, build)
    copies = [other.path(), other.path("deep")]
    Store(remote).remove(f"planting/{other.fingerprint}")
    assert not any(copy.exists() for copy in copies), "nor is there a copy of what was removed"
    assert all((tmp_path / "bucket" / one.place / "deep/data.bin").is_file() for one in made)


def test_a_part_that_the_store_has_lost_is_told_of(remote: str, tmp_path: Path) -> None:
    manifest = run(remote)
    shutil.rmtree(tmp_path / "bucket" / manifest.place / "deep")
    with pytest.raises(ArtifactError, match=r"deep/data.bin is not what its manifest says: sha256 no file"):
        manifest.path("deep")


def test_nothing_of_a_local_store_is_ever_dropped(tmp_path: Path) -> None:
    manifest = run(tmp_path)
    os.utime(manifest.path(), (0, 0))
    hold(str(tmp_path), "planting", manifest.fingerprint, "deep")
    assert manifest.path("deep") == manifest.path()
    assert manifest.path().stat().st_mtime == 0


def test_a_copy_damaged_in_the_cache_is_fetched_again(remote: str) -> None:
    manifest = run(remote)
    damage(manifest.path() / "deep/data.bin")
    assert run(remote).path().is_dir()
    assert sha256_file(manifest.path() / "deep/data.bin") == manifest.files["deep/data.bin"].sha256


def other(directory: Path) -> dict[str, Any]:
    """Times and hosts are in some outputs, so building again need not give the same bytes."""
    (directory / "figures.json").write_text("{}")
    return {"rows": 0}


def lost(directory: Path) -> dict[str, Any]:
    """As when the run that was first has removed what both were working with."""
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), ".work-0/checkpoint")


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize(
    ("then", "told"), [(build, ["stage done"]), (lost, ["warning", "stage reused"])], ids=["builds", "fails"]
)
def test_what_another_run_has_committed_meanwhile_is_kept_and_handed_on(
    tmp_path: Path, remote: str, then: Build, told: list[str], is_remote: bool, events: Callable[[], list[dict[str, Any]]]
) -> None:
    root, first = remote if is_remote else str(tmp_path / "store"), []

    def slow(directory: Path) -> dict[str, Any]:
        first.append(run(root, other))
        return then(directory)

    assert run(root, slow) == first[0]
    assert (first[0].path() / "figures.json").read_text() == "{}"
    assert [event["event"] for event in events()] == ["stage started", "stage started", "stage done", *told]


@pytest.mark.parametrize("is_remote", [False, True])
def test_what_is_asked_for_again_takes_the_place_of_what_is_there_when_it_is_built(
    tmp_path: Path, remote: str, is_remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "before"
    run(f"file://{before}" if is_remote else before)
    before.rename(tmp_path / "bucket")  # its manifest tells another root, as that of any store that was moved
    root = remote if is_remote else str(tmp_path / "bucket")
    first = run(root, never)

    def failing(directory: Path) -> dict[str, Any]:
        assert first.path().is_dir()
        raise DataError("3 rows are no interactions.", "Correct them.")

    monkeypatch.setenv("CLLMR_AGAIN", "plant,sowing")
    run(root, never)
    monkeypatch.setenv("CLLMR_AGAIN", "sowing,planting")
    with pytest.raises(DataError):
        run(root, failing)
    assert Store(root).find("planting", first.fingerprint) == first
    assert (first.path() / "deep/data.bin").exists()
    second = run(root, other)
    assert second.fingerprint == first.fingerprint
    assert (second.path() / "figures.json").read_text() == "{}"
    assert set(second.files) == {"figures.json"}
    monkeypatch.delenv("CLLMR_AGAIN")
    assert run(root, never) == second
    assert is_remote or leftovers(tmp_path / "bucket") == []


def test_an_upload_that_is_broken_off_leaves_what_is_there_whole_for_every_reader(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, copy = run(remote), artifacts.pafs.copy_files
    monkeypatch.setenv("CLLMR_AGAIN", "planting")

    def other_at_first(directory: Path) -> dict[str, Any]:
        (directory / "deep").mkdir()
        (directory / "deep/data.bin").write_bytes(b"other")
        return other(directory)

    def killed(source: str, target: str, **options: Any) -> None:
        shutil.rmtree(Path(source) / "deep")
        copy(source, target, **options)  # one file of two
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.pafs, "copy_files", killed)
        with pytest.raises(KeyboardInterrupt):
            run(remote, other_at_first)
    store = Store(remote)
    assert store.find("planting", first.fingerprint) == first
    assert sha256_file(first.path() / "figures.json") == first.files["figures.json"].sha256, "by a reader without a copy"

    run(remote, other_at_first)
    second = store.find("planting", first.fingerprint)
    assert second is not None
    assert (second.path() / "deep/data.bin").read_bytes() == b"other", "by a reader with a copy of the first"
    being_read = second.path()
    assert sha256_file(first.path() / "deep/data.bin") == first.files["deep/data.bin"].sha256, "by who has its manifest"
    assert (being_read / "deep/data.bin").read_bytes() == b"other", "by who was reading the second"
    described = {folder.path: folder.has_manifest for folder in store.folders("planting")}
    assert described.keys() >= {first.place, second.place, f"planting/{first.fingerprint}"}
    assert [place for place, has_manifest in described.items() if has_manifest] == [f"planting/{first.fingerprint}"]
    assert len(described) == 4, "and what the broken-off upload has left"
    store.remove(f"planting/{first.fingerprint}")
    assert store.folders("planting") == []


def test_what_was_replaced_is_removed_when_the_new_output_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes a while, and a run may be killed in it."""
    run(tmp_path)
    monkeypatch.setenv("CLLMR_AGAIN", "planting")
    remove, seen = TemporaryDirectory.cleanup, []

    def watched(directory: "TemporaryDirectory[str]") -> None:
        seen.append([one.facts for one in Store(str(tmp_path)).outputs("planting")])
        remove(directory)

    monkeypatch.setattr(TemporaryDirectory, "cleanup", watched)
    run(tmp_path, other)
    assert seen == [[{"rows": 0}]]


def test_an_output_built_again_with_other_bytes_replaces_its_copy_in_the_cache(remote: str) -> None:
    first = run(remote)
    first.path()
    Store(remote).discard("planting", first.fingerprint)
    second = run(remote, other)
    assert second.fingerprint == first.fingerprint
    assert (second.path() / "figures.json").read_text() == "{}"


def test_discarding_an_output_forgets_it(tmp_path: Path) -> None:
    manifest = run(tmp_path)
    store = Store(str(tmp_path))
    store.discard("planting", manifest.fingerprint)
    assert store.find("planting", manifest.fingerprint) is None
    store.discard("planting", manifest.fingerprint)  # twice is no error
    store.discard("planting", "0" * 16)


@pytest.mark.parametrize("is_remote", [False, True])
def test_two_runs_of_the_same_stage_at_once_both_end_with_one_whole_output(
    tmp_path: Path, remote: str, is_remote: bool
) -> None:
    root = remote if is_remote else str(tmp_path / "store")
    together, results, failures = threading.Barrier(4), [], []

    def slow(directory: Path) -> dict[str, Any]:
        facts = build(directory)
        together.wait(120)  # all are built before the first is committed
        return facts

    def work() -> None:
        try:
            results.append(run(root, slow))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert len({manifest.fingerprint for manifest in results}) == 1
    assert [manifest.path().is_dir() for manifest in results] == [True] * 4
    assert len(Store(root).outputs("planting")) == 1
    if not is_remote:
        assert leftovers(tmp_path / "store") == []


def test_an_output_committed_while_this_run_was_building_it_is_kept(tmp_path: Path) -> None:
    committed: list[int] = []

    def slow(directory: Path) -> dict[str, Any]:
        committed.append(run(tmp_path).path().stat().st_ino)
        return build(directory)

    assert run(tmp_path, slow).path().stat().st_ino == committed[0]
    assert leftovers(tmp_path) == []


def test_an_output_committed_where_a_remnant_was_being_removed_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = run(tmp_path / "other").path().name
    remnant = tmp_path / STAGE.name / target
    remnant.mkdir(parents=True)
    (remnant / "half").touch()
    take, committed = artifacts._taken_away, []

    def too_late(directory: Path, is_good: Callable[[Path], bool]) -> AbstractContextManager[None]:
        monkeypatch.setattr(artifacts, "_taken_away", take)
        committed.append(run(tmp_path).path().stat().st_ino)  # by another run, since this one saw a remnant
        return take(directory, is_good)

    monkeypatch.setattr(artifacts, "_taken_away", too_late)
    assert run(tmp_path, build).path().stat().st_ino == committed[0]
    assert leftovers(tmp_path) == []


def test_outputs_and_their_remnants_may_be_listed_verified_and_removed_by_many_at_once(tmp_path: Path) -> None:
    """Four processes that build, forget, list, verify and remove the same output as fast as they can."""
    code = (
        "import sys, time; from contextlib import suppress\n"
        "from components.errors import ArtifactError; from components.artifacts import Store\n"
        "from tests.unit.test_artifacts import run, STAGE\n"
        "root = sys.argv[1]; store = Store(root); end = time.monotonic() + 4\n"
        "while time.monotonic() < end:\n"
        "    made = run(root)\n"
        "    with suppress(ArtifactError):\n        made.path()\n"
        "    store.outputs(STAGE.name), store.folders(STAGE.name)\n"
        "    store.write_note('x', 'notes', 'one'), store.remove_note('notes', 'one')\n"
        "    store.discard(STAGE.name, made.fingerprint)\n"
        "    store.remove(f'{STAGE.name}/{made.fingerprint}')\n"
    )
    environment = {**os.environ, "CLLMR_EVENTS": os.devnull}
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    at_work = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=120)[1] for process in at_work] == [""] * 4
    assert leftovers(tmp_path / "store") == []
    assert run(tmp_path / "store").path().is_dir()


def test_many_readers_of_a_remote_output_fetch_it_at_once_and_none_loses_it(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = run(remote)
    copy, together = artifacts.pafs.copy_files, threading.Barrier(4)

    def at_once(*args: Any, **options: Any) -> None:
        copy(*args, **options)
        together.wait(120)

    monkeypatch.setattr(artifacts.pafs, "copy_files", at_once)
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(manifest.path().stat().st_ino)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(seen) == 4
    assert len(set(seen)) == 1, "what one reader was given is not replaced under it"


FAILURES = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    DataError("3 rows are no interactions.", "Correct them."),
    RuntimeError("a programmer's mistake"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("is_remote", [False, True])
def test_a_failure_leaves_nothing_half_written(tmp_path: Path, remote: str, failure: BaseException, is_remote: bool) -> None:
    def failing(directory: Path) -> dict[str, Any]:
        build(directory)
        raise failure

    root = remote if is_remote else str(tmp_path / "store")
    with pytest.raises(type(failure)) as caught:
        run(root, failing)
    assert caught.value is failure
    assert Store(root).outputs("planting") == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert run(root).path().is_dir()


@pytest.mark.parametrize(("failure", "code"), [(FAILURES[0], "storage_error"), (FAILURES[2], "data_error")])
def test_what_the_user_can_mend_is_told_as_an_event(
    tmp_path: Path, events: Callable[[], list[dict[str, Any]]], failure: Exception, code: str
) -> None:
    def failing(directory: Path) -> dict[str, Any]:
        raise failure

    with pytest.raises(type(failure)):
        run(tmp_path / "store", failing)
    told = events()[-1]
    assert (told["event"], told["code"]) == ("stage failed", code)
    assert told["hint"]


def test_a_full_disk_while_the_output_is_committed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda self, content: full())
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, lambda directory: {})
    assert Store(str(tmp_path)).outputs("planting") == []
    assert leftovers(tmp_path) == []


def test_a_storage_root_below_a_file_is_refused_with_the_next_action(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"'.*file/store/planting' cannot be written: .*choose another with --storage"):
        run(tmp_path / "file" / "store")


def test_a_cache_that_cannot_be_written_is_named_and_not_the_storage_root(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLLMR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"^cache '.*file/cache/.*' cannot be written: .* Set CLLMR_CACHE to a"):
        run(remote)


def test_an_unknown_scheme_is_refused_with_the_ones_allowed() -> None:
    with pytest.raises(StorageError, match=r"storage root 'nowhere://x' is not usable: .*local path or an s3://, gs://"):
        run("nowhere://x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seds": 1}, r"unknown setting 'planting\.seds'\. Did you mean 'seeds'\? Allowed: seeds, soil\."),
        ({"xyz": 1}, r"unknown setting 'planting\.xyz'\. Allowed: seeds, soil\."),
        ({"soil": {"dept": 1}}, r"unknown setting 'planting\.soil\.dept'\. Did you mean 'depth'\? Allowed: depth, kind\."),
        ({"seeds": "many"}, r"setting 'planting\.seeds' = 'many': .*integer.*Correct it in the preset or with --set"),
    ],
)
def test_a_wrong_setting_is_one_line_with_the_ones_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Planting.parse(values, "planting")
    assert "\n" not in str(caught.value)


def test_settings_survive_a_pipeline_parameter() -> None:
    """Its structs have no null and no integers."""
    settings = Planting(seeds=7, soil=Soil(depth=1, kind=None))
    parameter = json.loads(json.dumps(settings.as_parameter()))
    assert parameter["soil"]["kind"] == "null"
    parameter["seeds"] = 7.0
    assert Planting.parse(parameter, "planting") == settings


def test_json_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
