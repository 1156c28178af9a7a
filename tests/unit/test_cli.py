"""The command line: exit codes, one-line errors, help; runs of the small fake pipeline in processes of their own."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from components.registry import Registry, default_tracking_uri
from pipelines.cli import app
from pipelines.cluster import source_revision
from pipelines.options import filters_of
from serving.schemas import Range
from tests import REPOSITORY
from tests.bundles import stored_bundle, write_item_columns, write_random_bundle
from tests.waiting import wait_until

COMMANDS = [
    *("doctor", "validate", "run", "compile", "submit", "schedule", "runs", "wait"),
    *("serve", "recommend", "explain", "experiment", "batch", "promote", "rollback", "materialise", "clean"),
]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def fails_in_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_help_lists_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f" {name} " in result.stdout


def test_the_version_names_the_package_and_its_revision() -> None:
    result = call("--version")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"cllmr {version('cllmr-platform')} ({source_revision()})\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_shows_an_example(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    assert f"cllmr {name}" in result.stdout.replace("Usage:", "").split(f"{name} [OPTIONS]", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["run", "--preset", "locl"],
            ["unknown preset 'locl'. Did you mean 'local'? Allowed: cluster, gpu, incremental, local, paper, smollm2, spot."],
        ),
        (["run", "--set", "train.max_epoch=5"], ["unknown setting 'train.max_epoch'. Did you mean 'max_epochs'?"]),
        (["run", "--set", "train.max_epochs=-1"], ["setting 'train.max_epochs' = -1: Input should be greater than 0."]),
        (
            ["compile", "--kubernetes", "-n", "Bad Name"],
            ["setting 'cluster.namespace' = 'Bad Name': String should match pattern"],
        ),
        (["compile", "--set", "train"], ["'train' is not a setting. Write --set name=value"]),
        (["run", "--config", "nowhere.yaml"], ["config file 'nowhere.yaml' cannot be read: No such file or directory."]),
        (["run", "--items", "books.csv"], ["--items, --users and --column describe your own data. Give --interactions FILE"]),
        (
            ["validate", "--interactions", "a.csv", "--items", "b.csv", "--column", "user_id"],
            ["--column user_id: not a column. Write --column ours=yours, for example --column user_id=uid"],
        ),
        (
            ["validate", "--interactions", "a.csv", "--items", "b.csv", "--column", "usr_id=uid"],
            ["unknown setting 'ingest.columns.usr_id'. Did you mean 'user_id'?"],
        ),
        (["run", "--dry-run", "--from", "trian"], ["--from trian: no such stage. Did you mean 'train'?"]),
        (["run", "--dry-run", "--from", "train", "--until", "ingest"], ["--until ingest comes before --from train"]),
        (["recommend", "1", "--k", "0"], ["setting 'k' = 0: Input should be greater than or equal to 1."]),
        (["recommend", "1", "--debias", "2"], ["setting 'debias' = 2.0: Input should be less than or equal to 1."]),
        (
            ["recommend", "1", "--filter", "genres"],
            ["--filter genres: expected column=value. Write --filter genres=Comedy,Drama, or --filter year=1990..1999"],
        ),
        (["recommend", "1", "--filter", "genres= ,"], ["--filter genres= ,: expected column=value."]),
        (["recommend", "1", "--filter", "=War"], ["--filter =War: expected column=value."]),
        (["recommend", "1", "--filter", "year=.."], ["--filter year=..: a range needs min, max or both. Write --filter"]),
        (["recommend", "1", "--filter", "year=2..1"], ["--filter year=2..1: min = 2 is above max = 1. Write --filter"]),
        (
            ["recommend", "1", "--filter", "year=1..2", "--filter", "year=War"],
            ["--filter year=War: there is another filter on 'year'. Give one range, or values alone."],
        ),
        (
            ["recommend", "1", "--filter", "year=1..2", "--filter", "year=..9"],
            ["--filter year=..9: there is another filter on 'year'."],
        ),
        (["recommend", "1", "--url", "http://127.0.0.1:9"], ["nothing listens at http://127.0.0.1:9.", "cllmr serve"]),
        (
            ["experiment", "--suite", "quick", "--work", "/dev/null/work"],
            ["--work /dev/null/work cannot be written: "],
        ),
        (["explain", "1", "2", "--url", "no url"], ["no url cannot be asked", "Check the address"]),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy_and_exit_code_2(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    storage = [] if arguments[0] in ("recommend", "explain", "experiment") else ["--storage", str(tmp_path / "root")]
    fails_in_one_line(call(*arguments, *storage), *parts)
    assert not (tmp_path / "root").exists()


def test_a_storage_root_below_a_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = call("run", "--storage", str(tmp_path / "file" / "root"))
    fails_in_one_line(result, "cannot be written: Not a directory", "Choose a directory you can write with --storage.")
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [["rnu"], ["run", "--prest", "local"], ["recommend"]])
def test_a_typing_mistake_is_a_usage_error(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_compile_writes_the_pipeline_that_kfp_reads(tmp_path: Path) -> None:
    from kfp import components

    output = tmp_path / "new" / "retraining.yaml"
    result = call("compile", "--preset", "gpu", "--output", str(output), "--storage", "s3://bucket/cllmr")
    assert result.exit_code == 0, result.output
    assert components.load_component_from_file(str(output)).name == "cllmr-retraining"
    assert "s3://bucket/cllmr" in output.read_text()
    assert "note: the defaults do for no cluster: ingest.source 'sample' is a data set" in result.stderr


def test_compile_tells_which_defaults_no_cluster_could_run_with(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "retraining.yaml")]
    result = call("compile", "--preset", "local", *output)
    assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
    assert "note: the defaults do for no cluster: storage root '.cllmr' is a directory of this machine" in result.stderr
    own = [part for one in ("source=files", "interactions=s3://b/i.csv") for part in ("--set", f"ingest.{one}")]
    assert call("compile", "--preset", "cluster", *own, *output).stderr == ""


def test_compile_names_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    fails_in_one_line(call("compile", "--output", str(tmp_path)), f"--output {tmp_path} cannot be written: Is a directory.")


def test_a_dry_run_shows_every_stage_and_writes_nothing(tmp_path: Path) -> None:
    result = call("run", "--dry-run", "--storage", str(tmp_path / "root"))
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    stages = ["ingest", "sideinfo", "spectrum", "features", "train", "evaluate", "promote", "serve"]
    assert [name for name in rows if name in stages] == stages
    for name in stages[:6]:
        assert "to run" in rows[name]
    for name in stages[6:]:
        assert "decided at run time" in rows[name]
    assert not (tmp_path / "root").exists()


def own_data(folder: Path, num_users: int = 6, num_items: int = 8) -> list[str]:
    """Files of a user's own, every user with every item, as options."""
    pairs = [f"{user},{item},{1_700_000_000 + item}" for user in range(num_users) for item in range(num_items)]
    (folder / "clicks.csv").write_text("\n".join(["user_id,item_id,timestamp", *pairs]))
    (folder / "books.csv").write_text(
        "\n".join(["item_id,title,kind", *(f"{item},Book {item},a" for item in range(num_items))])
    )
    return ["--interactions", str(folder / "clicks.csv"), "--items", str(folder / "books.csv")]


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("spectrum.rank=7", "setting 'spectrum.rank' = 7: at most 6 with 6 users and 8 items. Choose a smaller rank: --set"),
        ("train.filter_columns=[kid]", "train.filter_columns names 'kid', which is no text column of the items. Did you mean"),
        ("ingest.split.ratios=[3, 1, 0]", "data set 'own-data' has no test interactions: 36 are in the training split."),
    ],
)
def test_validate_finds_what_a_later_stage_would_refuse(setting: str, part: str, tmp_path: Path) -> None:
    options = [*own_data(tmp_path), "--set", "spectrum.rank=6"]
    assert call("validate", *options).exit_code == 0
    result = call("validate", *options, "--set", setting)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {part}")


def test_validate_tells_warnings_in_the_lines_of_a_run(tmp_path: Path) -> None:
    settings = ["--set", "spectrum.rank=6", "--set", "evaluate.baselines=[ease]", "--set", "ingest.min_rating=null"]
    result = call("validate", *own_data(tmp_path)[:2], *settings)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stdout
    ingest, promote = result.stderr.strip().splitlines()
    assert ingest.startswith("ingest     warning: there is no table of items (--items): their ids are their titles")
    assert promote.startswith("promote    warning: promote.min_over_popularity needs popularity among evaluate.baselines")


def test_doctor_shows_every_check_and_fails_when_the_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = tmp_path / "checks.json"
        result = call("doctor", "--storage", str(tmp_path), "--set", f"serve.port={port}", "--json", str(file))
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(file.read_text())}
    assert checks["port"]["state"] == "problem"
    assert checks["port"]["seen"] == f"127.0.0.1:{port}: Address already in use"
    assert checks["storage"]["state"] == "ok"
    assert {"Python", "cores", "memory", "disk", "shared memory", "sample data", "packages: train"} <= set(checks)


def test_a_reader_that_has_gone_takes_no_result_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    file = tmp_path / "checks.json"
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        app(["doctor", "--storage", str(tmp_path), "--set", "serve.port=0", "--json", str(file)], standalone_mode=False)
    assert {check["name"] for check in json.loads(file.read_text())} >= {"Python", "storage"}


def test_doctor_wants_vllm_where_the_settings_do_and_nowhere_else(tmp_path: Path) -> None:
    def seen(*settings: str) -> tuple[int, dict[str, str]]:
        file = tmp_path / "checks.json"
        result = call("doctor", "--storage", str(tmp_path), "--set", "serve.port=0", *settings, "--json", str(file))
        (check,) = [check for check in json.loads(file.read_text()) if check["name"] == "packages: llm"]
        return result.exit_code, check

    code, check = seen()
    assert (code, check["state"]) == (0, "ok")
    assert check["seen"] == "vllm is missing; only sideinfo.backend=vllm needs it"
    code, check = seen("--set", "sideinfo.backend=vllm", "--set", "sideinfo.model=any")
    assert (code, check["state"]) == (1, "problem")
    assert "make llm" in check["fix"]


def test_promote_lists_nothing_before_the_first_run_and_rollback_says_so(tmp_path: Path) -> None:
    assert "no model is registered yet: cllmr run" in call("promote", "--storage", str(tmp_path)).stdout
    fails_in_one_line(
        call("rollback", "--storage", str(tmp_path)), "model 'cllmr' has no champion: there is nothing to roll back to."
    )
    fails_in_one_line(call("recommend", "1", "--storage", str(tmp_path)), "no model is champion below", "Make one: cllmr run")


@pytest.mark.parametrize(
    ("texts", "filters"),
    [
        ([], {}),
        (["genres=War"], {"genres": ["War"]}),
        (["genres=War, Comedy", "genres=Drama"], {"genres": ["War", "Comedy", "Drama"]}),
        (['genres="Comedy, black",War'], {"genres": ["Comedy, black", "War"]}),
        (["title=Mr. ...", "part=a=b"], {"title": ["Mr. ..."], "part": ["a=b"]}),
        (["year=1990..1999"], {"year": Range(min=1990, max=1999)}),
        (["year=1990.."], {"year": Range(min=1990)}),
        (["debt= .. -2.5"], {"debt": Range(max=-2.5)}),
        (["year=1990..199x"], {"year": ["1990..199x"]}),  # refused by the model, which knows that it has numbers
    ],
)
def test_filters_are_values_or_a_range(texts: list[str], filters: dict[str, object]) -> None:
    assert filters_of(texts) == filters


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with a champion whose items have columns."""
    root = tmp_path_factory.mktemp("champion")

    def write(bundle: Path) -> None:
        write_random_bundle(bundle, num_items=60, feature_fingerprint=None)
        genres, years = ["Comedy, Drama", "Drama", "War"] * 20, [str(1960 + row) for row in range(60)]
        write_item_columns(bundle, genres=genres, year=years)

    train = stored_bundle(str(root), write)
    models = Registry(default_tracking_uri(str(root)), "cllmr")
    models.register(train.fingerprint, str(root), f"train/{train.fingerprint}/bundle", {})
    models.promote(train.fingerprint)
    return root


def test_promote_and_rollback_write_what_they_did(champion: Path, tmp_path: Path) -> None:
    models = Registry(default_tracking_uri(str(champion)), "cllmr")
    (first,) = models.versions()
    models.register("f" * 16, str(champion), "train/second/bundle", {"debiased.ndcg@10": 0.25})
    file = tmp_path / "result.json"

    def told(*arguments: str) -> Any:
        result = call(*arguments, "--storage", str(champion), "--json", str(file))
        assert result.exit_code == 0, result.output
        return json.loads(file.read_text())

    listed = told("promote")
    assert [version["fingerprint"] for version in listed] == ["f" * 16, first.fingerprint]
    assert (listed[0]["metrics"], listed[0]["aliases"]) == ({"debiased.ndcg@10": 0.25}, ["challenger"])
    second = told("promote", "f" * 16)
    assert (second["version"], second["fingerprint"], second["promoted_over"]) == ("2", "f" * 16, first.fingerprint)
    assert told("rollback")["fingerprint"] == first.fingerprint
    fails_in_one_line(call("rollback", "--storage", str(champion), "--json", str(file)), "there is nothing to roll back to")


def test_a_model_whose_storage_root_was_renamed_is_served_again_once_it_is_promoted(champion: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(champion, old)
    models = Registry(default_tracking_uri(str(old)), "cllmr")
    (version,) = [one for one in models.versions() if "champion" in one.aliases]
    models.relocate(version.fingerprint, str(old), version.bundle)
    old.rename(new)
    remedy = f"cllmr promote {version.fingerprint} --storage WHERE"
    fails_in_one_line(call("recommend", "new", "--storage", str(new)), f"is not below '{old}'", remedy)
    promoted = call(*remedy.removeprefix("cllmr ").replace("WHERE", str(new)).split())
    assert promoted.exit_code == 0, promoted.output
    assert call("recommend", "new", "--storage", str(new)).exit_code == 0


def test_a_result_that_cannot_be_written_is_told_before_anything_is_done(champion: Path, tmp_path: Path) -> None:
    models = Registry(default_tracking_uri(str(champion)), "cllmr")
    before = models.versions()
    listed = call("promote", before[0].fingerprint, "--storage", str(champion), "--json", "/dev/null/result.json")
    fails_in_one_line(listed, "--json /dev/null/result.json cannot be written: File exists. Choose another path.")
    fails_in_one_line(
        call("rollback", "--storage", str(champion), "--json", str(tmp_path)), "cannot be written: Is a directory."
    )
    assert models.versions() == before
    file = tmp_path / "folder" / "result.json"
    fails_in_one_line(call("promote", "0" * 16, "--storage", str(champion), "--json", str(file)), "has no version")
    assert not file.exists(), "a command that fails leaves no empty file"
    file.write_text("of an earlier run")
    fails_in_one_line(call("promote", "0" * 16, "--storage", str(champion), "--json", str(file)), "has no version")
    assert file.read_text() == "of an earlier run"
    experiment = call("experiment", "--suite", "quick", "--work", str(tmp_path / "work"), "--report", "/dev/null/report")
    fails_in_one_line(experiment, "--report /dev/null/report/report.html cannot be written: Not a directory.")
    assert not (tmp_path / "work").exists()


def test_recommend_filters_the_items(champion: Path, tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    filters = ["--filter", "genres=Comedy,War", "--filter", "year=1970..1979"]
    result = call("recommend", "new", "--k", "60", *filters, "--storage", str(champion), "--json", str(file))
    assert result.exit_code == 0, result.output
    found = {item["item_id"] for item in json.loads(file.read_text())["results"][0]["items"]}
    assert found == {f"i{row}" for row in range(10, 20) if row % 3 != 1}
    result = call("recommend", "new", "--filter", "genres=War", "--filter", "year=..1960", "--storage", str(champion))
    assert "no item is left: none passes the filters, or the user knows them all" in result.stdout


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("genre=War", ["items cannot be filtered by 'genre'. Did you mean 'genres'? Allowed: genres, year."]),
        ("genres=Wra", ["no item has 'genres' = 'Wra'. Did you mean 'War'? Allowed: Comedy, Drama, War."]),
        ("genres=1..2", ["'genres' has values, no numbers.", "Drama, Comedy, War"]),
        ("year=1990", ["'year' has numbers, 1960 to 2019, no values.", "or with cllmr --filter year=1960..2019."]),
    ],
)
def test_a_filter_that_the_model_does_not_know_is_told_with_what_there_is(champion: Path, given: str, parts: list[str]) -> None:
    fails_in_one_line(call("recommend", "u1", "--filter", given, "--storage", str(champion)), *parts)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["recommend", "1"], ["explain", "1", "2"], ["serve"], ["promote"], ["promote", "0123456789abcdef"], ["rollback"]),
        *(["materialise"], ["clean"], ["batch"], ["batch", "--model", "0123456789abcdef"]),
    ],
    ids=" ".join,
)
def test_a_mistyped_storage_root_is_one_line_and_is_not_made(arguments: list[str], tmp_path: Path) -> None:
    root = tmp_path / "typo"
    fails_in_one_line(call(*arguments, "--storage", str(root)), f"there is no storage directory '{root}'. Check --storage")
    assert not root.exists()


def test_doctor_does_not_make_the_storage_root_and_says_that_it_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "checks.json"
    call("doctor", "--storage", str(tmp_path / "typo"), "--set", "serve.port=0", "--json", str(file))
    (storage,) = [check for check in json.loads(file.read_text()) if check["name"] == "storage"]
    assert storage["seen"] == f"{tmp_path / 'typo'} does not exist yet; a run makes it"
    assert not (tmp_path / "typo").exists()


def test_a_storage_root_with_too_long_a_name_is_told(tmp_path: Path) -> None:
    root, file = tmp_path / ("x" * 300) / "root", tmp_path / "checks.json"
    fails_in_one_line(call("clean", "--storage", str(root)), f"'{root}' cannot be read: File name too long. Check --storage.")
    assert call("doctor", "--storage", str(root), "--set", "serve.port=0", "--json", str(file)).exit_code == 1
    checks = {check["name"]: check for check in json.loads(file.read_text())}
    assert checks["storage"]["state"] == "problem"
    assert checks["storage"]["seen"] == f"{root} cannot be read: File name too long"
    assert checks["disk"]["seen"].endswith(" GiB free")


@pytest.mark.parametrize(("days", "told"), [("1000000", "36500"), ("inf", "older-than"), ("nan", "older-than")])
def test_an_age_that_no_calendar_has_is_refused(days: str, told: str) -> None:
    result = call("clean", "--older-than", days)
    assert result.exit_code == 2
    assert told in result.stderr


def test_doctor_says_that_a_store_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    file = tmp_path / "checks.json"
    root = "s3://bucket/cllmr?scheme=http&region=eu-central-1&endpoint_override=127.0.0.1:9"  # tried for 6 s
    result = call("doctor", "--storage", root, "--set", "serve.port=0", "--json", str(file))
    assert result.exit_code == 1
    (storage,) = [check for check in json.loads(file.read_text()) if check["name"] == "storage"]
    assert storage["state"] == "problem"
    assert "cannot be read: " in storage["seen"]
    assert "Could not connect to server" in storage["seen"]
    assert "try again" in storage["fix"]


def test_moving_the_champion_where_there_is_none_makes_no_registry(tmp_path: Path) -> None:
    fails_in_one_line(
        call("promote", "0123456789abcdef", "--storage", str(tmp_path)),
        "model 'cllmr' has no version with fingerprint '0123456789abcdef'. None is registered: cllmr run makes one.",
    )
    fails_in_one_line(
        call("rollback", "--storage", str(tmp_path)), "model 'cllmr' has no champion", "cllmr promote FINGERPRINT"
    )
    assert list(tmp_path.iterdir()) == []


# -- the command as a process, with the fake pipeline ----------------------------------------------------------------------

WITH_FAKES = """
import sys
from types import SimpleNamespace
from tests.fake_pipeline import fake_pipeline
from tests.fakes import STAGES, FakeConfig, FakePlatform
for name, stage in STAGES.items():
    sys.modules[f"components.{name}.stage"] = SimpleNamespace(STAGE=stage)
from pipelines import cli, plan
settings = FakePlatform(storage_root=sys.argv.pop(1), spectrum=FakeConfig(behaviour=sys.argv.pop(1), flag=sys.argv.pop(1)))
cli.load_config = lambda *ignored: settings
plan.compiled = lambda settings: fake_pipeline(settings)
cli.app(["run", *sys.argv[1:]])
"""


def start(root: Path, behaviour: str, *arguments: str, flag: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WITH_FAKES, str(root), behaviour, flag, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_tells_its_steps_and_writes_its_summary(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    process = start(tmp_path / "root", "work", "--json", str(file))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "train      done in " in err
    assert "built" in out
    summary = json.loads(file.read_text())
    assert list(summary["stages"]) == ["ingest", "sideinfo", "spectrum", "train", "promote"]
    assert summary["stages"]["train"]["reused"] is False
    assert summary["stages"]["train"]["peak_memory_mb"] > 1
    assert summary["everything_reused"] is False
    assert summary["versions"]["python"].startswith("3.")
    assert summary["hardware"]["cores"] == os.cpu_count()

    process = start(tmp_path / "root", "work", "--json", str(file))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "nothing changed: all 5 stages were reused" in err
    assert json.loads(file.read_text())["everything_reused"] is True


def test_a_refused_input_ends_with_one_line_and_exit_code_2_without_a_traceback(tmp_path: Path) -> None:
    process = start(tmp_path / "root", "refuse")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.splitlines()[-1] == (
        "error: spectrum: column 'rating' is missing; seen: user, item. Name it with --column rating=stars"
    )
    assert "Traceback" not in err + out


def test_a_crash_ends_with_the_stage_the_last_log_lines_the_log_and_exit_code_1(tmp_path: Path) -> None:
    process = start(tmp_path / "root", "crash")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "RuntimeError: the matrix fell over" in err
    last = err.splitlines()[-1]
    assert last.startswith("error: stage spectrum crashed. The whole log: ")
    assert "the matrix fell over" in Path(last.rsplit(" ", 1)[1]).read_text()


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=lambda by: by.name)
def test_an_interrupted_run_ends_with_exit_code_130(tmp_path: Path, by: signal.Signals) -> None:
    flag = tmp_path / "flag"
    process = start(tmp_path / "root", "wait", flag=str(flag))
    wait_until("the stage that waits", flag.exists)
    process.send_signal(by)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: nothing is left running."
    assert "Traceback" not in err


@pytest.mark.ray
def test_an_endpoint_that_is_terminated_ends_as_by_ctrl_c_and_prints_no_stack(champion: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", "pipelines.cli", "serve", "--storage", str(champion), "--port", "0"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            told, _, _ = select.select([process.stdout], [], [], 300)
            if not told:
                process.send_signal(signal.SIGABRT)
                pytest.fail(f"nothing is told of the endpoint. Where its threads are: {process.communicate(timeout=60)}")
            assert process.stdout.readline().startswith("serving at http://127.0.0.1:")
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=180)
        finally:
            process.kill()  # or leaving the block would wait for one that hangs, without end
    assert process.returncode == 0, err
    assert out == "the endpoint has ended\n"
    assert "Traceback" not in err
    assert "SIGTERM received" not in err  # by Ray
