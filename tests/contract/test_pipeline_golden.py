"""The compiled retraining pipeline, whole: compared with a golden file, so that no change of it goes unseen.

After a change that is meant: python -m tests.contract.test_pipeline_golden (writes the golden file), and read its diff.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import kuberay
from components.errors import ConfigError
from components.job import LaunchConfig
from pipelines.config import PlatformConfig, load, preset_names
from pipelines.placement import PlacementConfig
from pipelines.plan import CompiledPipeline, compile_pipeline
from pipelines.retraining import retraining
from tests.contract.test_pipeline_components import PARENTS

GOLDEN = Path(__file__).parents[1] / "golden" / "retraining.yaml"


@cache  # seconds each, and no test changes one
def compiled(preset: str) -> CompiledPipeline:
    return compile_pipeline(retraining(load(preset)))


def executors(pipeline: CompiledPipeline) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = pipeline.spec["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor["container"] for name, executor in found.items()}


def test_the_compiled_pipeline_is_the_golden_one() -> None:
    assert compiled("local").to_yaml() == GOLDEN.read_text(encoding="utf-8"), (
        "the compiled pipeline has changed; if it was meant to: python -m tests.contract.test_pipeline_golden"
    )


def test_parents_are_those_of_the_contract_and_stages_run_in_the_documented_order() -> None:
    pipeline = compiled("local")
    assert {stage: sorted(parents) for stage, parents in pipeline.parents().items()} == {
        stage: sorted(parents) for stage, parents in PARENTS.items()
    }
    assert all(name == producer for parents in pipeline.parents().values() for name, producer in parents.items())
    assert pipeline.stages() == list(PARENTS)


def test_the_pipelines_description_numbers_its_stages_in_order() -> None:
    description = compiled("local").spec["pipelineInfo"]["description"]
    numbered = [line.strip() for line in description.splitlines() if line.strip()[:1].isdigit()]
    assert [line.split(":")[0] for line in numbered] == [f"{place}. {stage}" for place, stage in enumerate(PARENTS, start=1)]


def test_every_stage_has_settings_a_placement_and_a_display_name() -> None:
    assert list(PlatformConfig().stages()) == list(PARENTS)
    assert set(PARENTS) < set(PlacementConfig.model_fields)
    tasks = compiled("local").spec["root"]["dag"]["tasks"]
    assert all(task["taskInfo"]["name"] != stage for stage, task in tasks.items())


@pytest.mark.parametrize("preset", preset_names())
def test_the_defaults_of_the_parameters_are_the_presets_settings(preset: str) -> None:
    parameters = compiled(preset).spec["root"]["inputDefinitions"]["parameters"]
    settings = load(preset)
    assert parameters["storage_root"]["defaultValue"] == settings.storage_root
    for stage, config in settings.stages().items():
        assert type(config).parse(parameters[f"{stage}_config"]["defaultValue"], stage) == config


def test_presets_differ_in_placement_and_settings_and_not_in_the_steps() -> None:
    local, cluster = compiled("local"), compiled("cluster")
    assert local.parents() == cluster.parents()
    assert executors(cluster)["evaluate"]["resources"] != executors(local)["evaluate"]["resources"]
    assert cluster.spec["root"]["dag"]["tasks"]["train"]["retryPolicy"]["maxRetryCount"] == 2
    assert "retryPolicy" not in local.spec["root"]["dag"]["tasks"]["train"]


@pytest.mark.parametrize("stage", ["sideinfo", "train"])
def test_a_gpu_is_asked_for_with_the_toleration_that_its_node_needs(stage: str) -> None:
    pipeline = compiled("gpu")
    accelerator = executors(pipeline)[stage]["resources"]["accelerator"]
    assert (accelerator["resourceType"], accelerator["resourceCount"]) == ("nvidia.com/gpu", "1")
    assert "accelerator" not in executors(pipeline)["ingest"]["resources"]
    assert pipeline.platforms is not None
    settings = pipeline.platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert settings[f"exec-{stage}"]["tolerations"] == [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}]
    assert "exec-ingest" not in settings


def test_spot_nodes_are_for_steps_that_are_tried_again_and_not_for_those_that_wait_or_decide() -> None:
    pipeline = compiled("cluster,spot")
    assert pipeline.platforms is not None
    settings = pipeline.platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    label = {"cllmr.example.com/capacity": "spot"}
    sent = {name.removeprefix("exec-") for name, one in settings.items() if one.get("nodeSelector", {}).get("labels") == label}
    assert sent == {"ingest", "spectrum", "features", "evaluate"}
    taint = {"effect": "NoSchedule", "key": "cllmr.example.com/capacity", "operator": "Equal", "value": "spot"}
    assert {name.removeprefix("exec-") for name, one in settings.items() if taint in one.get("tolerations", [])} == sent
    tasks = pipeline.spec["root"]["dag"]["tasks"]
    assert {tasks[name]["retryPolicy"]["maxRetryCount"] for name in [*sent, "sideinfo", "train"]} == {6}


def test_a_step_that_waits_for_a_ray_job_asks_for_none_of_its_gpus() -> None:
    for stage in ("sideinfo", "train"):
        assert "accelerator" in executors(compiled("gpu"))[stage]["resources"]
        assert "accelerator" not in executors(compiled("cluster,gpu"))[stage]["resources"]


def test_a_task_whose_work_a_rayjob_does_knows_its_run_its_pod_and_the_templates() -> None:
    pipeline = compiled("cluster")
    assert pipeline.platforms is not None
    settings = pipeline.platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert {name for name, one in settings.items() if "fieldPathAsEnv" in one} == {"exec-sideinfo", "exec-train"}
    for stage in ("sideinfo", "train"):
        (variable,) = executors(pipeline)[stage]["env"]
        assert variable["name"] == "CLLMR_LAUNCH"
        assert LaunchConfig.model_validate_json(variable["value"]) == LaunchConfig(backend="rayjob")
        assert {one["name"]: one["fieldPath"] for one in settings[f"exec-{stage}"]["fieldPathAsEnv"]} == {
            "CLLMR_RUN_ID": "metadata.labels['pipeline/runid']",
            kuberay.POD_NAME_VARIABLE: "metadata.name",
            kuberay.NAMESPACE_VARIABLE: "metadata.namespace",
        }
        (volume,) = settings[f"exec-{stage}"]["configMapAsVolume"]
        assert (volume["mountPath"], volume["configMapName"]) == (LaunchConfig().templates, "cllmr-rayjobs")


def test_every_task_of_a_cluster_runs_as_a_user_that_is_not_root() -> None:
    pipeline = compiled("cluster")
    assert pipeline.platforms is not None
    settings = pipeline.platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(settings) == {f"exec-{stage}" for stage in PARENTS}
    wanted = {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
    assert all(one["securityContext"] == wanted for one in settings.values())
    assert compiled("local").platforms is None


def test_a_task_whose_work_a_standing_cluster_does_has_its_token_from_a_secret() -> None:
    launch = "{backend: jobs, address: 'http://ray:8265', token_secret: ray-token}"
    pipeline = compile_pipeline(retraining(load(overrides=[f"placement.train.launch={launch}"])))
    assert pipeline.platforms is not None
    (settings,) = pipeline.platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    (secret,) = settings["secretAsEnv"]
    assert (secret["secretName"], secret["keyToEnv"]) == (
        "ray-token",
        [{"envVar": "RAY_AUTH_TOKEN", "secretKey": "auth_token"}],
    )
    assert "configMapAsVolume" not in settings
    variables = {one["name"]: one["value"] for one in executors(pipeline)["train"]["env"]}
    assert variables["RAY_AUTH_MODE"] == "token"


def test_every_task_has_the_variables_and_the_secrets_that_the_placement_names() -> None:
    overrides = ["placement.environment.AWS_REGION=eu-north-1", "placement.secrets.bucket=[KEY, TOKEN]"]
    pipeline = compile_pipeline(retraining(load(overrides=overrides)))
    assert pipeline.platforms is not None
    settings = pipeline.platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for stage, container in executors(pipeline).items():
        assert container["env"] == [{"name": "AWS_REGION", "value": "eu-north-1"}]
        (secret,) = settings[f"exec-{stage}"]["secretAsEnv"]
        assert (secret["secretName"], secret["optional"]) == ("bucket", True)
        assert secret["keyToEnv"] == [{"envVar": name, "secretKey": name} for name in ("KEY", "TOKEN")]


def test_launching_is_placement_and_changes_no_parameter() -> None:
    here, there = (load(overrides=[f"placement.train.launch.backend={backend}"]) for backend in ("here", "rayjob"))
    assert here.stages() == there.stages()
    with pytest.raises(ConfigError, match=r"unknown setting 'placement\.ingest\.launch'"):
        load(overrides=["placement.ingest.launch.backend=rayjob"])


def test_kfps_own_cache_is_off_because_it_would_not_see_another_champion() -> None:
    for task in compiled("local").spec["root"]["dag"]["tasks"].values():
        assert not task["cachingOptions"].get("enableCache", False)


def test_an_image_of_its_own_is_used_for_the_stage_that_names_one() -> None:
    settings = load(overrides=["placement.image=ours-python:2", "placement.serve.image=serving-python:3"])
    images = {stage: container["image"] for stage, container in executors(compile_pipeline(retraining(settings))).items()}
    assert images == dict.fromkeys(PARENTS, "ours-python:2") | {"serve": "serving-python:3"}


def test_the_tasks_install_nothing_when_they_start() -> None:
    for container in executors(compiled("cluster")).values():
        assert "pip install" not in yaml.safe_dump(container)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(compiled("local").to_yaml(), encoding="utf-8")
