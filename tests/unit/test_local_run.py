"""The local runner with small real stages: every test runs kfp.local and its processes."""

import errno
import json
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from components.artifacts import Store
from components.errors import ConfigError, DataError, StorageError, UserError
from components.job import Job
from components.progress import emit
from pipelines import local
from pipelines.display import Lines
from pipelines.doctor import check_disk
from pipelines.local import PlatformRun, StageCrashed
from pipelines.plan import plan
from pipelines.terminal import events_told
from tests import REPOSITORY
from tests.fake_pipeline import fake_pipeline
from tests.fakes import STAGES, FakeConfig, FakePlatform
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _tests_can_be_imported_by_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def run_fakes(root: Path, settings: FakePlatform | None = None, **options: str | None) -> PlatformRun:
    settings = settings or FakePlatform()
    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115  # lives as long as the run
    return local.run(
        fake_pipeline(settings),
        str(root),
        lambda stages: Lines(console),
        **options,  # type: ignore[arg-type]  # the two options of the command line
    )


def reused(result: PlatformRun) -> dict[str, bool]:
    return {name: stage.reused for name, stage in result.stages.items()}


def test_a_second_run_reuses_every_stage_and_from_rebuilds_one_and_all_after_it(tmp_path: Path) -> None:
    first = run_fakes(tmp_path)
    assert reused(first) == dict.fromkeys(STAGES, False)
    assert json.loads((first.manifest("train").path() / "out.json").read_text())["parents"] == ["sideinfo", "spectrum"]
    assert first.manifest("promote").parents == {"train": first.manifest("train").fingerprint}
    assert first.manifest("ingest").peak_memory_mb > 1

    second = run_fakes(tmp_path)
    assert second.all_reused
    assert {name: stage.manifest for name, stage in second.stages.items()} == {
        name: stage.manifest for name, stage in first.stages.items()
    }

    third = run_fakes(tmp_path, from_stage="train")
    assert reused(third) == {"ingest": True, "sideinfo": True, "spectrum": True, "train": False, "promote": False}


def test_a_changed_setting_rebuilds_its_stage_and_what_depends_on_it_only(tmp_path: Path) -> None:
    run_fakes(tmp_path, until="train")
    changed = run_fakes(tmp_path, FakePlatform(spectrum=FakeConfig(text="other")), until="train")
    assert reused(changed) == {"ingest": True, "sideinfo": True, "spectrum": False, "train": False}


def test_the_fingerprints_of_the_plan_are_those_of_the_run_although_kfp_turns_ints_into_floats(tmp_path: Path) -> None:
    settings = FakePlatform()
    pipeline = fake_pipeline(settings)
    before = {stage.name: stage for stage in plan(pipeline, settings.stages(), str(tmp_path), stage_of=STAGES.__getitem__)}
    result = run_fakes(tmp_path)
    for name in ("ingest", "sideinfo", "spectrum", "train"):
        assert before[name].fingerprint == result.manifest(name).fingerprint
        assert before[name].state == "to run"
    assert before["promote"].state == "decided at run time"
    after = plan(pipeline, settings.stages(), str(tmp_path), stage_of=STAGES.__getitem__)
    assert [stage.state for stage in after] == ["done"] * 4 + ["decided at run time"]


def test_until_ends_after_the_stage_and_what_tasks_leave_is_in_the_runs_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    monkeypatch.setenv("TMPDIR", str(shared))
    done = run_fakes(tmp_path / "a root", until="sideinfo")
    assert list(done.stages) == ["ingest", "sideinfo"]
    assert len(list(done.directory.glob("*/ephemeral_component.py"))) == 2
    assert not list(shared.iterdir())


def test_until_before_from_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--until ingest comes before --from train: nothing would run\. The order is ingest -> "
    ):
        run_fakes(tmp_path / "root", from_stage="train", until="ingest")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"from_stage": "trian"}, r"--from trian: no such stage\. Did you mean 'train'\? Stages, in order: ingest, sideinfo, "),
        ({"until": "deploy"}, r"--until deploy: no such stage\. Stages, in order: ingest"),
    ],
)
def test_a_stage_that_does_not_exist_is_named_with_the_closest_one(
    tmp_path: Path, option: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_fakes(tmp_path, **option)


def test_a_refused_input_becomes_the_stages_own_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^ingest: column 'rating' is missing; seen: user, item\. Name it with --column"
    ) as error:
        run_fakes(tmp_path, FakePlatform(ingest=FakeConfig(behaviour="refuse")))
    assert error.value.hint == "Name it with --column rating=stars"
    assert list((tmp_path / "ingest").iterdir()) == []


def test_a_full_disk_is_told_as_an_error_of_the_storage(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"ingest: \[Errno 28\] No space left on device"):
        run_fakes(tmp_path, FakePlatform(ingest=FakeConfig(behaviour="full disk")), until="ingest")


def test_a_crash_names_the_stage_shows_the_end_of_the_log_and_keeps_finished_stages(tmp_path: Path) -> None:
    with pytest.raises(StageCrashed) as error:
        run_fakes(tmp_path, FakePlatform(spectrum=FakeConfig(behaviour="crash")))
    assert error.value.stage == "spectrum"
    assert error.value.tail[-1].endswith("RuntimeError: the matrix fell over")
    assert "the matrix fell over" in error.value.log.read_text()
    assert len(list((tmp_path / "ingest").glob("*/manifest.json"))) == 1


def test_a_stage_killed_by_the_system_is_named_and_the_next_run_does_only_what_is_left(tmp_path: Path) -> None:
    settings = FakePlatform(train=FakeConfig(behaviour="die once", flag=str(tmp_path / "died")))
    with pytest.raises(StageCrashed, match="stage train crashed"):
        run_fakes(tmp_path / "root", settings)
    result = run_fakes(tmp_path / "root", settings)
    assert reused(result) == {"ingest": True, "sideinfo": True, "spectrum": True, "train": False, "promote": False}


def test_what_is_built_again_stays_until_the_new_output_is_there(tmp_path: Path) -> None:
    root, flag = tmp_path / "root", tmp_path / "died"
    settings = FakePlatform(train=FakeConfig(behaviour="die once", flag=str(flag)))
    flag.touch()
    first = run_fakes(root, settings)
    place = first.manifest("train").path()
    before = place.stat().st_ino
    flag.unlink()
    with pytest.raises(StageCrashed, match="stage train crashed"):
        run_fakes(root, settings, from_stage="train")
    assert [Store(str(root)).outputs(name) for name in STAGES] == [[first.manifest(name)] for name in STAGES]
    assert first.manifest("train").path().stat().st_ino == before
    again = run_fakes(root, settings, from_stage="train")
    assert reused(again) == {"ingest": True, "sideinfo": True, "spectrum": True, "train": False, "promote": False}
    assert again.manifest("train").path() == place
    assert place.stat().st_ino != before
    assert run_fakes(root, settings).all_reused


def test_a_job_elsewhere_builds_again_what_its_launcher_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("cllmr-train-1", "1", "train", "{}")
    assert job.environment() == {"CLLMR_LAUNCH_REQUEST": "{}", "CLLMR_RUN_ID": "1"}, "on a cluster nothing is built again"
    monkeypatch.setenv("CLLMR_AGAIN", "train,promote")
    assert job.environment()["CLLMR_AGAIN"] == "train,promote"


def test_a_storage_root_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"storage root '.*file/root' cannot be written: Not a directory .*--storage"):
        run_fakes(tmp_path / "file" / "root")


@pytest.mark.parametrize("is_named", [True, False])
def test_logs_of_runs_on_a_remote_store_lie_in_the_cache_which_is_named_when_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    if is_named:
        monkeypatch.setenv("CLLMR_CACHE", str(tmp_path / "file" / "cache"))
    else:
        monkeypatch.delenv("CLLMR_CACHE", raising=False)
    with pytest.raises(
        StorageError,
        match=r"^cache '.*/file/.*cache.*' cannot be written: Not a directory .* Set CLLMR_CACHE to",
    ):
        local.make_run_directory("s3://bucket/cllmr", "")
    monkeypatch.setenv("CLLMR_CACHE", str(tmp_path / "cache"))
    assert local.make_run_directory("s3://bucket/cllmr", "").parent == tmp_path / "cache" / "runs"


def test_a_user_without_a_home_folder_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLLMR_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as of a container's user whom its image does not know
    with pytest.raises(StorageError, match=r"has no place: this user has no home folder\. Set CLLMR_CACHE"):
        local.make_run_directory("s3://bucket/cllmr", "")
    check = check_disk("s3://bucket/cllmr")
    assert (check.state, check.fix) == ("problem", "Set CLLMR_CACHE to a folder you can write.")


def test_an_event_that_was_torn_is_passed_over_and_the_next_one_begins_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tell() -> None:
        emit("warning", stage="train", message="before")
        with open(file, "a", encoding="utf-8") as torn:
            torn.write('{"event": "warning", "sta')
        emit("warning", stage="train", message="after")

    file = tmp_path / "events.jsonl"
    monkeypatch.setenv("CLLMR_EVENTS", str(file))
    tell()
    with open(file, encoding="utf-8") as told:
        assert [event["message"] for event in local._new_events(told)] == ["before", "after"]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    file = tmp_path / "other.jsonl"
    with events_told(file):
        tell()
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == ["before", "after"]


SCRIPT = """
import sys
from tests.unit.test_local_run import FakeConfig, FakePlatform, run_fakes
from pathlib import Path
run_fakes(Path(sys.argv[1]), FakePlatform(train=FakeConfig(behaviour="wait", flag=sys.argv[2])))
"""


def start_and_wait_for_train(root: Path, flag: Path) -> tuple["subprocess.Popen[bytes]", psutil.Process]:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), str(flag)], cwd=REPOSITORY)

    def train_pid() -> str:
        assert process.poll() is None, "the run ended before train"
        return flag.read_text() if flag.exists() else ""

    return process, psutil.Process(int(wait_until("train to start", train_pid)))


def test_a_disk_that_is_full_is_told_of_before_a_run_and_after_one_that_could_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(
            StorageError, match=r"storage root '.*/root' cannot be written: No space left .*/root/runs/.*--storage"
        ):
            run_fakes(tmp_path / "root")
    (tmp_path / "log.txt").touch()
    for free, tail in (
        (2**30, []),
        (4096, [f"No room is left for '{tmp_path}': 4,096 bytes are free. Make room and run the same again."]),
    ):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        failure = local._failure([{"event": "stage started", "stage": "train"}], ["train"], tmp_path / "log.txt")
        assert isinstance(failure, StageCrashed)
        assert failure.tail == tail


def wait_for_end(process: psutil.Process) -> None:
    wait_until("the end of train", lambda: local.is_alive(process), lambda alive: not alive, 60)


def test_a_run_killed_in_the_middle_leaves_no_process_and_the_next_one_goes_on_from_there(tmp_path: Path) -> None:
    root, flag = tmp_path / "root", tmp_path / "flag"
    process, task = start_and_wait_for_train(root, flag)
    process.kill()
    process.wait()
    wait_for_end(task)
    result = run_fakes(root)
    # train and not spectrum was killed: kfp does sideinfo and spectrum, which do not need each other, in any order
    assert reused(result) == {"ingest": True, "sideinfo": True, "spectrum": True, "train": False, "promote": False}


@pytest.mark.parametrize("whose", ["the run's end", "the runner's end"])
def test_what_ends_a_run_ends_its_tasks(tmp_path: Path, whose: str) -> None:
    process, task = start_and_wait_for_train(tmp_path / "root", tmp_path / "flag")
    if whose == "the run's end":
        process.send_signal(signal.SIGINT)
    else:
        psutil.Process(os.getpgid(task.pid)).kill()
    assert process.wait(timeout=120) == (-signal.SIGINT if whose == "the run's end" else 1)
    wait_for_end(task)


def test_a_user_error_of_an_unknown_kind_is_still_a_user_error(tmp_path: Path) -> None:
    events = [
        {"event": "stage started", "stage": "train"},
        {"event": "stage failed", "stage": "train", "code": "not_ours", "message": "m.", "hint": "h."},
    ]
    failure = local._failure(events, ["ingest", "train"], tmp_path / "log.txt")
    assert isinstance(failure, UserError)
    assert str(failure) == "train: m. h."


def test_what_fails_after_a_stage_has_written_its_output_is_told_in_its_own_words_and_a_try_that_failed_before_is_not(
    tmp_path: Path,
) -> None:
    failed = {"event": "stage failed", "stage": "batch", "code": "storage_error", "message": "no room.", "hint": "h."}
    done = {"event": "stage done", "stage": "batch"}
    assert str(local._failure([done, failed], ["batch"], tmp_path / "log.txt")) == "batch: no room. h."
    (tmp_path / "log.txt").write_text("Killed")
    assert "no room" not in str(local._failure([failed, done], ["batch"], tmp_path / "log.txt"))
