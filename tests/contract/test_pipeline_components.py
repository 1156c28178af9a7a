"""The KFP wrapper of every stage: what it hands to the stage, what it writes, and that it stays thin."""

import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from components.artifacts import Manifest

PARENTS = {
    "ingest": [],
    "sideinfo": ["ingest"],
    "spectrum": ["ingest"],
    "features": ["ingest", "sideinfo", "spectrum"],
    "train": ["ingest", "features"],
    "evaluate": ["ingest", "sideinfo", "train"],
    "promote": ["train", "evaluate"],
    "serve": ["features", "promote"],
}
MOST_STATEMENTS = 8


def manifest(stage: str, root: Path) -> Manifest:
    return Manifest(
        stage=stage,
        version=1,
        fingerprint=f"of-{stage}",
        storage_root=str(root),
        config={},
        parents={},
        files={},
        facts={"debiased.ndcg@10": 0.25, "users_evaluated": 3, "strongest_baseline": "ease"},
        seconds=1.0,
        peak_memory_mb=1.0,
        created_at="2026-01-01T00:00:00+00:00",
    )


def component_of(stage: str) -> Any:
    return getattr(importlib.import_module(f"components.{stage}.component"), stage)


@pytest.mark.parametrize("stage", [*PARENTS, "batch"])
def test_a_component_calls_its_stage_with_the_manifests_of_its_parents_and_writes_the_result(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}

    def run(config: dict[str, Any], storage_root: str, **parents: Manifest) -> Manifest:
        called.update(config=config, storage_root=storage_root, parents=parents)
        return manifest(stage, tmp_path)

    module = ModuleType(f"components.{stage}.stage")
    module.run = run  # type: ignore[attr-defined]  # a stage of the test's own
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for parent in PARENTS.get(stage, []):
        manifest(parent, tmp_path).write(tmp_path / f"{parent}-in")
    artifact = tmp_path / stage / f"of-{stage}"
    artifact.mkdir(parents=True)
    (artifact / "report.html").write_text("<h1>Report</h1>")
    (artifact / "metrics.json").write_text("{}")
    outputs = {
        name: SimpleNamespace(path=str(tmp_path / f"{name}-out"), metadata={}) for name in ("manifest", "report", "metrics")
    }
    if stage != "evaluate":
        del outputs["metrics"]
    if stage not in ("evaluate", "sideinfo"):
        del outputs["report"]
    inputs = {parent: SimpleNamespace(path=str(tmp_path / f"{parent}-in")) for parent in PARENTS.get(stage, [])}

    component_of(stage).python_func(config={"a": 1}, storage_root=str(tmp_path), **inputs, **outputs)

    assert called["config"] == {"a": 1}
    assert called["storage_root"] == str(tmp_path)
    assert {name: parent.fingerprint for name, parent in called["parents"].items()} == {
        parent: f"of-{parent}" for parent in PARENTS.get(stage, [])
    }
    assert Manifest.read(outputs["manifest"].path).fingerprint == f"of-{stage}"
    if "report" in outputs:
        assert Path(outputs["report"].path).read_text() == "<h1>Report</h1>"
    if "metrics" in outputs:
        assert Path(outputs["metrics"].path).read_text() == "{}"
        assert outputs["metrics"].metadata == {"debiased.ndcg@10": 0.25, "users_evaluated": 3}


@pytest.mark.parametrize("stage", PARENTS)
def test_a_component_is_a_mapping_of_paths_to_a_call(stage: str) -> None:
    source = Path(importlib.import_module(f"components.{stage}.component").__file__ or "").read_text(encoding="utf-8")
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    statements = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    assert len(statements) <= MOST_STATEMENTS
    assert "packages_to_install" not in source
    assert "from __future__" not in source  # KFP reads the annotations, which must not be strings


@pytest.mark.parametrize("stage", PARENTS)
def test_a_stage_takes_what_its_component_gives(stage: str) -> None:
    names = list(inspect.signature(importlib.import_module(f"components.{stage}.stage").run).parameters)
    assert names[:2] == ["config", "storage_root"]
    assert sorted(names[2:]) == sorted(PARENTS[stage])


@pytest.mark.parametrize("stage", PARENTS)
def test_a_stage_goes_by_its_folders_name(stage: str) -> None:
    assert importlib.import_module(f"components.{stage}.stage").STAGE.name == stage
