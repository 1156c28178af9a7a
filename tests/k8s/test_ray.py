"""Ray resources against the operator's rules and Serve's, each shown to fail; what is served is what the serve stage writes."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest
import yaml

from components.serve.stage import serve_document
from pipelines.config import load as load_settings
from serving.app import ENCODER, HISTORY, REGISTRY, AppArgs
from tests.k8s.manifests import (
    K8S,
    OVERLAYS,
    Object,
    named,
    needs_kubectl,
    of_kind,
    overlay,
    quantity,
    ray_cluster,
    templates,
    title,
)
from tests.k8s.rules import QUEUE_LABEL, ray_kinds, ray_problems, serve_problems

pytestmark = needs_kubectl


def launched(template: Object) -> Object:
    """A template as a pipeline step launches it: with a name made of run and stage."""
    name = f"{template['metadata']['name']}-0123456789abcdef"
    return {**template, "metadata": {**template["metadata"], "name": name}}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_operator_has_nothing_against_any_ray_resource(name: str) -> None:
    found = {title(item): ray_problems(item) for item in ray_kinds(overlay(name))}
    assert found == {"RayService/serving": [], "RayJob/train": [], "RayJob/sideinfo": []}


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_launched_job_is_accepted(name: str) -> None:
    for template in templates(overlay(name)):
        assert ray_problems(launched(template)) == []


def test_templates_are_rendered_files_that_are_up_to_date() -> None:
    command = [sys.executable, str(K8S / "rayjobs" / "render.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_there_is_a_template_for_every_stage_that_is_launched() -> None:
    for name in OVERLAYS:
        assert sorted(named(overlay(name), "ConfigMap", "cllmr-rayjobs")["data"]) == ["sideinfo.yaml", "train.yaml"]


def test_with_kueue_a_job_waits_for_a_queue_that_exists_and_without_it_runs_at_once() -> None:
    objects = overlay("prod")
    for job in templates(objects):
        assert job["spec"]["suspend"] is True
        labels = job["metadata"]["labels"]
        assert named(objects, "LocalQueue", labels[QUEUE_LABEL])
        assert named(objects, "WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"])
    for job in templates(overlay("dev")):
        assert "suspend" not in job["spec"]
        assert QUEUE_LABEL not in job["metadata"]["labels"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_on_the_cluster_is_the_ray_of_the_images(name: str) -> None:
    for item in ray_kinds(overlay(name)):
        assert ray_cluster(item)["rayVersion"] == version("ray")


def worker(item: Object) -> Object:
    group: Object = ray_cluster(item)["workerGroupSpecs"][0]
    return group


def head(item: Object) -> Object:
    group: Object = ray_cluster(item)["headGroupSpec"]
    return group


def variable(item: Object, name: str) -> None:
    head(item)["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": "1"})


def deletion(item: Object, *rules: tuple[str, int], **settings: object) -> None:
    for name in ("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "suspend"):
        item["spec"].pop(name)
    described = [{"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": ttl}} for policy, ttl in rules]
    item["spec"].update(deletionStrategy={"deletionRules": described}, **settings)


def incremental(item: Object, **options: object) -> None:
    defaults = {"stepSizePercent": 10, "maxSurgePercent": 50, "intervalSeconds": 60, "gatewayClassName": "istio"}
    item["spec"]["upgradeStrategy"] = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": defaults | options}


JOB, SERVICE = ("RayJob", "train"), ("RayService", "serving")

BROKEN: list[tuple[tuple[str, str], Callable[[Object], object], str]] = [
    (JOB, lambda item: item["metadata"].update(name="t" * 48), "48 characters, RayJob may have 47"),
    (JOB, lambda item: item["metadata"].update(name="1train"), "no DNS-1035 label"),
    (JOB, lambda item: item["metadata"].update(name=None, generateName="t" * 44), "49 characters"),
    (JOB, lambda item: item["spec"].update(submissionMode="K8sJobmode"), "submissionMode K8sJobmode is none of"),
    (JOB, lambda item: item["spec"].update(submissionMode="SidecarMode"), "submitterPodTemplate in SidecarMode"),
    (JOB, lambda item: item["spec"].pop("submitterPodTemplate"), "refused by the profile restricted"),
    (JOB, lambda item: item["spec"].update(activeDeadlineSeconds=9), "activeDeadlineSeconds has no effect"),
    (JOB, lambda item: item["spec"].pop("preRunningDeadlineSeconds"), "no preRunningDeadlineSeconds"),
    (JOB, lambda item: item["spec"].pop("shutdownAfterJobFinishes"), "without shutdownAfterJobFinishes"),
    (JOB, lambda item: item["spec"].update(submissionMode="InteractiveMode"), "backoffLimit with"),
    (JOB, lambda item: deletion(item, ("DeleteSelf", 9), ttlSecondsAfterFinished=9), "deletionRules beside"),
    (JOB, lambda item: deletion(item, ("DeleteCluster", 9), ("DeleteSelf", 5)), "do not rise"),
    (JOB, lambda item: worker(item).update(maxReplicas=3), "of a gang differ"),
    (JOB, lambda item: worker(item).pop("minReplicas"), "must both be set"),
    (JOB, lambda item: worker(item).update(minReplicas=9), "minReplicas 9 is above maxReplicas 2"),
    (JOB, lambda item: worker(item).update(idleTimeoutSeconds=9), "idleTimeoutSeconds without autoscaler v2"),
    (JOB, lambda item: ray_cluster(item).update(enableInTreeAutoscaling=True), "a queue admits whole"),
    (JOB, lambda item: ray_cluster(item).pop("authOptions"), "authOptions.mode is not token"),
    (JOB, lambda item: ray_cluster(item)["authOptions"].update(enableK8sTokenAuth=True), "not supported for RayJob"),
    (JOB, lambda item: variable(item, "RAY_REDIS_ADDRESS"), "without gcsFaultToleranceOptions"),
    (JOB, lambda item: variable(item, "RAY_enable_autoscaler_v2"), "use autoscalerOptions.version"),
    (JOB, lambda item: ray_cluster(item).update(networkPolicy={"mode": "DenyAll"}), "networkPolicy is behind an alpha gate"),
    (SERVICE, lambda item: ray_cluster(item).pop("rayVersion"), "needs rayVersion 2.52 or later, not None"),
    (SERVICE, lambda item: ray_cluster(item).update(rayVersion="2.51.0"), "needs rayVersion 2.52 or later, not 2.51.0"),
    (SERVICE, lambda item: head(item).update(resources={"CPU": "1"}), "resources both in"),
    (SERVICE, lambda item: worker(item)["rayStartParams"].update(labels="a=b"), "labels in rayStartParams"),
    (SERVICE, lambda item: head(item)["rayStartParams"].update({"redis-password": "x"}), "beside redis-password"),
    (SERVICE, lambda item: variable(item, "REDIS_PASSWORD"), "beside the variable REDIS_PASSWORD"),
    (SERVICE, lambda item: variable(item, "RAY_enable_autoscaler_v2"), "use autoscalerOptions.version"),
    (SERVICE, lambda item: item["metadata"].update(annotations={"ray.io/ft-enabled": "true"}), "beside the annotation"),
    (SERVICE, lambda item: ray_cluster(item)["gcsFaultToleranceOptions"].update(backend="rocksdb"), "alpha gate"),
    (SERVICE, lambda item: worker(item)["template"]["spec"].update(restartPolicy="Always"), "restartPolicy Always"),
    (SERVICE, lambda item: item["spec"].update(upgradeStrategy={"type": "Rolling"}), "Rolling is none of"),
    (SERVICE, lambda item: incremental(item, stepSizePercent=60), "stepSizePercent 60 is not in"),
    (SERVICE, lambda item: incremental(item, intervalSeconds=0), "intervalSeconds must be above 0"),
    (SERVICE, lambda item: incremental(item, gatewayClassName=""), "gatewayClassName is not set"),
    (SERVICE, lambda item: head(item).update(headService={"metadata": {"name": "x"}}), "must not be set"),
    (SERVICE, lambda item: item["spec"].pop("excludeHeadPodFromServeSvc"), "would go to the head"),
    (SERVICE, lambda item: item["spec"].update(serveConfigV2="applications: []"), "no application"),
]


@pytest.mark.parametrize(("which", "change", "told"), BROKEN, ids=[told for _, _, told in BROKEN])
def test_a_rule_of_the_operator_that_is_broken_is_found(
    which: tuple[str, str], change: Callable[[Object], object], told: str
) -> None:
    item = named(overlay("prod"), *which)
    change(item)
    assert re.search(told, "\n".join(ray_problems(item))), ray_problems(item)


# -- Serve's configuration --------------------------------------------------------------------------------------------------

APPLICATION = {"name": "a", "import_path": "serving.app:build_app", "route_prefix": "/"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"numReplicas": 2}, "unknown field numReplicas"),
        ({"route_prefix": "v1"}, "does not begin with /|route_prefix"),
        ({"import_path": "nothing"}, "import_path"),
        ({"deployments": [{"name": "d", "num_replica": 1}]}, "deployment d has an unknown field num_replica"),
        ({"deployments": [{"name": "d", "num_replicas": 2, "autoscaling_config": {"max_replicas": 3}}]}, "num_replicas"),
        ({"deployments": [{"name": "d", "autoscaling_config": {"min_replicas": 4, "max_replicas": 3}}]}, "max_replicas"),
        (
            {"deployments": [{"name": "d", "autoscaling_config": {"maxReplicas": 3}}]},
            "autoscaling_config of d has an unknown field",
        ),
        (
            {"deployments": [{"name": "d", "max_ongoing_requests": 9, "autoscaling_config": {"target_ongoing_requests": 3}}]},
            "max_ongoing_requests 9 is not 20-50 % above",
        ),
    ],
)
def test_a_serve_configuration_that_ray_serve_would_take_badly_is_found(change: Object, told: str) -> None:
    assert list(serve_problems(yaml.safe_dump({"applications": [APPLICATION]}))) == []
    found = list(serve_problems(yaml.safe_dump({"applications": [{**APPLICATION, **change}]})))
    assert re.search(told, "\n".join(found)), found


def test_two_applications_of_one_name_are_found() -> None:
    assert list(serve_problems(yaml.safe_dump({"applications": [APPLICATION, APPLICATION]})))


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_is_served_is_what_the_serve_stage_writes_for_the_preset_cluster(name: str) -> None:
    document = yaml.safe_load(named(overlay(name), "RayService", "serving")["spec"]["serveConfigV2"])
    args = AppArgs.model_validate(document["applications"][0]["args"])
    champion = {"version": args.model_version, "fingerprint": args.train, "storage_root": args.storage_root, "bundle": ""}
    settings = load_settings("cluster")
    assert args.storage_root == settings.storage_root
    registry = (settings.promote.tracking_uri, settings.promote.model_name)
    assert document == serve_document(settings.serve, champion, args.features, *registry)


def test_settings_of_replicas_that_a_runbook_names_are_some() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in K8S.glob("runbooks/*.md"))
    told = re.findall(r"`(gateway|scorer|scoring)\.(\w+)", text)
    assert told
    for part, field in told:
        assert hasattr(getattr(AppArgs(storage_root="", train="", model_version=""), part), field), f"{part}.{field}"


def test_replicas_fit_on_the_workers_that_are_always_there() -> None:
    item = named(overlay("prod"), "RayService", "serving")
    args = AppArgs.model_validate(yaml.safe_load(item["spec"]["serveConfigV2"])["applications"][0]["args"])
    wanted = sum(
        replicas.num_replicas * replicas.num_cpus for replicas in (args.gateway, args.scorer, REGISTRY, HISTORY, ENCODER)
    )
    group = worker(item)
    per_worker = int(group["rayStartParams"]["num-cpus"])
    # head-room: one worker less, as while a node is drained, still holds them all
    assert wanted <= per_worker * (group["minReplicas"] - 1)


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_a_serving_workers_processes_log_fits_on_its_volume(name: str) -> None:
    objects = overlay(name)
    (environment,) = [one for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"].startswith("environment-")]
    size, kept = (int(environment["data"][f"RAY_ROTATION_{what}"]) for what in ("MAX_BYTES", "BACKUP_COUNT"))
    group = worker(named(objects, "RayService", "serving"))
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    processes = int(group["rayStartParams"]["num-cpus"]) + len((REGISTRY, HISTORY, ENCODER)) + 1  # replicas of a core, proxy
    files = 3 * processes  # what each prints, its errors, Serve's log of it
    assert files * size * (kept + 1) < quantity(volumes["tmp"]["emptyDir"]["sizeLimit"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_serving_worker_has_the_time_to_drain(name: str) -> None:
    spec = worker(named(overlay(name), "RayService", "serving"))["template"]["spec"]
    container = spec["containers"][0]
    (drain,) = [int(entry["value"]) for entry in container["env"] if entry["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    serve_shutdown = 20  # Ray Serve's graceful_shutdown_timeout_s
    assert spec["terminationGracePeriodSeconds"] >= sleep + drain + serve_shutdown
