"""The command line: exit codes, one-line errors, help; runs of the small fake pipeline in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.cluster import source_revision

REPOSITORY = Path(__file__).parents[2]
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
        (["recommend", "1", "--url", "http://127.0.0.1:9"], ["nothing listens at http://127.0.0.1:9.", "cllmr serve"]),
        (["explain", "1", "2", "--url", "no url"], ["no url cannot be asked", "Check the address"]),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy_and_exit_code_2(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    storage = [] if arguments[0] in ("recommend", "explain") else ["--storage", str(tmp_path / "root")]
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


def test_an_interrupted_run_ends_with_exit_code_130(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    process = start(tmp_path / "root", "wait", flag=str(flag))
    deadline = time.monotonic() + 180
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: nothing is left running."
