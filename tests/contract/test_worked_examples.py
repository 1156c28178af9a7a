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


@pytest.mark.parametrize(
    ("package", "asked"),
    [
        (backbones, ["--backbone", "{name}", "--baseline", "popularity"]),
        (encoders, ["--encoder", "{name}", "--baseline", "popularity"]),
        (effects, ["--suite", "bias", "--set", "study.formulations=[{name}]"]),
    ],
    ids=["backbone", "encoder", "effect"],
)
def test_an_example_passes_the_inherited_suite_and_the_harness_knows_it(
    package: ModuleType, asked: list[str], copy: Path, tmp_path: Path
) -> None:
    (new, text), (suite, test) = example_of(package).items()
    assert not (copy / new).exists()
    (copy / new).write_text(text)
    with (copy / suite).open("a") as file:
        file.write("\n\n" + test)
    name, case = Path(new).stem, test.partition("class ")[2].partition("(")[0]
    said = python(
        copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", suite, "-k", f"{case} or registered or setting or left_out"
    )
    assert f"{case}::test_" in said
    data = write_blocks(tmp_path / "blocks", users_per_block=4, items_per_block=4)
    for_all = ["--dataset", str(data), "--seeds", "1", "--dim", "4", "--work", str(tmp_path / "work")]
    told = python(copy, "-m", "pipelines.cli", "experiment", *for_all, *(part.format(name=name) for part in asked))
    assert (name if package is effects else "CLLMR") in told
