"""Reading order and parents from the compiled pipeline, cutting it, and planning a run: nothing is run here."""

from pathlib import Path

import pytest
import yaml

from components.artifacts import Manifest, Store
from components.errors import ConfigError
from pipelines.plan import CompiledPipeline, check_order, nothing_to_train, plan
from tests.fake_pipeline import fake_pipeline
from tests.fakes import STAGES, FakeConfig, FakePlatform


@pytest.fixture(scope="module")
def pipeline() -> CompiledPipeline:
    return fake_pipeline(FakePlatform())


def commit(root: Path, stage: str, fingerprint: str, parents: dict[str, str]) -> None:
    manifest = Manifest(
        stage=stage,
        version=1,
        fingerprint=fingerprint,
        storage_root=str(root),
        config={},
        parents=parents,
        files={},
        facts={},
        seconds=1.0,
        peak_memory_mb=1.0,
        created_at="2026-01-01T00:00:00+00:00",
    )
    with Store(str(root)).staging(stage) as built:
        Store(str(root)).commit(built, manifest)


def planned_fingerprints(pipeline: CompiledPipeline, root: Path, settings: FakePlatform) -> dict[str, str | None]:
    stages = plan(pipeline, settings.stages(), str(root), stage_of=STAGES.__getitem__)
    return {stage.name: stage.fingerprint for stage in stages}


def test_order_and_parents_come_from_the_compiled_tasks(pipeline: CompiledPipeline) -> None:
    assert pipeline.parents() == {
        "ingest": {},
        "sideinfo": {"ingest": "ingest"},
        "spectrum": {"ingest": "ingest"},
        "train": {"sideinfo": "sideinfo", "spectrum": "spectrum"},
        "promote": {"train": "train"},
    }
    assert pipeline.stages() == ["ingest", "sideinfo", "spectrum", "train", "promote"]


def test_a_cut_pipeline_holds_only_what_its_tasks_need_and_leaves_the_whole_one_alone(pipeline: CompiledPipeline) -> None:
    before = pipeline.to_yaml()
    spec = yaml.safe_load(pipeline.until("spectrum").to_yaml())
    assert sorted(spec["root"]["dag"]["tasks"]) == ["ingest", "sideinfo", "spectrum"]
    assert sorted(spec["components"]) == ["comp-ingest", "comp-sideinfo", "comp-spectrum"]
    assert sorted(spec["deploymentSpec"]["executors"]) == ["exec-ingest", "exec-sideinfo", "exec-spectrum"]
    assert pipeline.to_yaml() == before
    assert pipeline.until(None) is pipeline


def test_a_cut_drops_the_outputs_that_the_whole_pipeline_hands_out() -> None:
    spec = {
        "root": {
            "dag": {
                "tasks": {"ingest": {"componentRef": {"name": "c"}}, "train": {"componentRef": {"name": "d"}}},
                "outputs": {"artifacts": {"report": {}}},
            },
            "outputDefinitions": {"artifacts": {"report": {}}},
        },
        "components": {"c": {"executorLabel": "e"}, "d": {"executorLabel": "f"}},
        "deploymentSpec": {"executors": {"e": {}, "f": {}}},
    }
    platforms = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {"e": {"pullPolicy": "Always"}, "f": {}}}}}}
    cut = CompiledPipeline(spec, platforms).until("ingest")
    assert "outputs" not in cut.spec["root"]["dag"]
    assert "outputDefinitions" not in cut.spec["root"]
    assert cut.platforms == {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {"e": {"pullPolicy": "Always"}}}}}}


def test_a_changed_setting_changes_the_fingerprints_of_its_stage_and_of_those_after_it(
    pipeline: CompiledPipeline, tmp_path: Path
) -> None:
    before = planned_fingerprints(pipeline, tmp_path, FakePlatform())
    after = planned_fingerprints(pipeline, tmp_path, FakePlatform(sideinfo=FakeConfig(text="other")))
    assert {name for name in before if before[name] != after[name]} == {"sideinfo", "train"}
    assert before["promote"] is None


def test_a_plan_writes_nothing(pipeline: CompiledPipeline, tmp_path: Path) -> None:
    planned_fingerprints(pipeline, tmp_path / "root", FakePlatform())
    assert not (tmp_path / "root").exists()


def test_done_stages_are_told_from_those_to_run_and_from_makes_them_to_run_again(
    pipeline: CompiledPipeline, tmp_path: Path
) -> None:
    settings = FakePlatform()
    fingerprints = planned_fingerprints(pipeline, tmp_path, settings)
    for name in ("ingest", "sideinfo", "spectrum"):
        commit(tmp_path, name, str(fingerprints[name]), {})
    states = [s.state for s in plan(pipeline, settings.stages(), str(tmp_path), stage_of=STAGES.__getitem__)]
    assert states == ["done", "done", "done", "to run", "decided at run time"]
    again = plan(pipeline, settings.stages(), str(tmp_path), "spectrum", stage_of=STAGES.__getitem__)
    assert [s.state for s in again] == ["done", "done", "to run", "to run", "decided at run time"]


class WarmConfig(FakeConfig):
    """Settings of a train stage that begins with the champion."""

    warm_start: str = "champion"


def test_what_training_with_a_champions_table_writes_is_decided_at_run_time(pipeline: CompiledPipeline, tmp_path: Path) -> None:
    settings = FakePlatform(train=WarmConfig())
    planned = plan(pipeline, settings.stages(), str(tmp_path), stage_of=STAGES.__getitem__)
    assert [stage.state for stage in planned][-2:] == ["decided at run time", "decided at run time"]
    for stage in planned[:3]:
        commit(tmp_path, stage.name, str(stage.fingerprint), {})
    planned = plan(pipeline, settings.stages(), str(tmp_path), stage_of=STAGES.__getitem__)
    assert not nothing_to_train(planned)


def test_a_run_that_would_end_before_it_begins_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--until a comes before --from b: nothing would run\. The order is a -> b\."):
        check_order(["a", "b"], "b", "a")
    check_order(["a", "b"], "b", "b")
