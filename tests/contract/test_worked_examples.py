"""The documented examples of a new backbone, encoder and effect, followed word for word in a copy of the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

from components.cllmr import backbones, effects, encoders
from components.experiment.planted import write_blocks
from tests import REPOSITORY


def example_of(package: ModuleType) -> dict[str, str]:
    """Path -> text of the files in a package's docstring; each begins with its path as a comment."""
    assert package.__doc__ is not None
    block = package.__doc__.partition("::\n")[2]
    lines = dedent("\n".join(line for line in block.splitlines() if not line or line.startswith("    "))).strip().splitlines()
    files: dict[str, str] = {}
    for line in lines:
        if line.startswith("# ") and line.endswith(".py"):
            path = line.removeprefix("# ")
            files[path] = ""
        else:
            files[path] += line + "\n"
    return files


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("components", "pipelines", "tests"):
        shutil.copytree(REPOSITORY / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path / "copy")
    return tmp_path / "copy"


def python(folder: Path, *arguments: str) -> str:
    """What a command says that must succeed, run in the copy alone."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_examples_pass_the_inherited_suites_and_the_harness_knows_them(copy: Path, tmp_path: Path) -> None:
    added: dict[ModuleType, tuple[str, str]] = {}
    suites = []
    for package in (backbones, encoders, effects):
        (new, text), (suite, test) = example_of(package).items()
        assert not (copy / new).exists()
        (copy / new).write_text(text)
        with (copy / suite).open("a") as file:
            file.write("\n\n" + test)
        added[package] = Path(new).stem, test.partition("class ")[2].partition("(")[0]
        suites.append(suite)
    cases = [case for _, case in added.values()]
    asked = " or ".join([*cases, "registered", "setting", "left_out"])
    said = python(copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", *suites, "-k", asked)
    assert [case for case in cases if f"{case}::test_" not in said] == []
    data = write_blocks(tmp_path / "blocks", users_per_block=4, items_per_block=4)
    backbone, encoder, effect = (name for name, _ in added.values())
    for flags, told in (
        (["--backbone", backbone, "--encoder", encoder, "--baseline", "popularity"], "CLLMR"),
        (["--suite", "bias", "--set", f"study.formulations=[{effect}]"], effect),
    ):
        for_all = ["--dataset", str(data), "--seeds", "1", "--dim", "4", "--work", str(tmp_path / "work")]
        assert told in python(copy, "-m", "pipelines.cli", "experiment", *for_all, *flags)
