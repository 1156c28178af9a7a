"""Every pod that the manifests lead to, Ray's included, against `restricted` and our own rules; each rule is shown to fail."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.k8s.manifests import OVERLAYS, Object, Pod, needs_kubectl, of_kind, overlay, pods, pods_of, with_component
from tests.k8s.rules import (
    digest_problems,
    gpu_problems,
    pod_problems,
    probe_problems,
    ray_pod_problems,
    restricted_problems,
)

pytestmark = needs_kubectl

ALL_PODS = {
    "CronJob/clean",
    "CronJob/materialise",
    "CronJob/postgres-backup",
    "Deployment/mlflow",
    "RayJob/sideinfo head",
    "RayJob/sideinfo submitter",
    "RayJob/sideinfo worker workers",
    "RayJob/train head",
    "RayJob/train submitter",
    "RayJob/train worker workers",
    "RayService/serving head",
    "RayService/serving redis-cleanup",
    "RayService/serving worker replicas",
    "StatefulSet/feature-redis",
    "StatefulSet/gcs-redis",
    "StatefulSet/postgres",
}


def everything_against(pod: Pod) -> list[str]:
    found = restricted_problems(pod) + pod_problems(pod) + probe_problems(pod) + gpu_problems(pod)
    return found + (ray_pod_problems(pod) if pod.is_ray else [])


def pod_of(owner: str, name: str = "prod") -> Pod:
    (found,) = [pod for pod in pods(overlay(name)) if pod.owner == owner]
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_passes(name: str) -> None:
    found = {pod.owner: everything_against(pod) for pod in pods(overlay(name))}
    assert found == {owner: [] for owner in ALL_PODS}


def test_in_production_every_image_is_given_by_digest_and_in_development_the_rule_finds_tags() -> None:
    assert {pod.owner: digest_problems(pod) for pod in pods(overlay("prod"))} == {owner: [] for owner in ALL_PODS}
    assert all(digest_problems(pod) for pod in pods(overlay("dev")))


def test_the_head_has_the_autoscaler_beside_it_and_a_worker_waits_for_the_head() -> None:
    assert [container["name"] for container in pod_of("RayService/serving head").containers] == ["ray-head", "autoscaler"]
    worker = pod_of("RayService/serving worker replicas")
    assert [container["name"] for container in worker.containers] == ["wait-gcs-ready", "ray-worker"]


def first(pod: Pod) -> Object:
    container: Object = pod.spec["containers"][0]
    return container


def drop(part: Object, *names: str) -> None:
    for name in names:
        part.pop(name, None)


WORKER, HEAD, MLFLOW = "RayService/serving worker replicas", "RayService/serving head", "Deployment/mlflow"

BROKEN: list[tuple[str, Callable[[Pod], object], str]] = [
    (WORKER, lambda pod: drop(first(pod)["securityContext"], "allowPrivilegeEscalation"), "allowPrivilegeEscalation"),
    (WORKER, lambda pod: drop(first(pod)["securityContext"], "capabilities"), "capabilities are not dropped"),
    (WORKER, lambda pod: first(pod)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]), "capabilities"),
    (WORKER, lambda pod: drop(pod.spec["securityContext"], "runAsNonRoot"), "runAsNonRoot is not true"),
    (WORKER, lambda pod: first(pod)["securityContext"].update(runAsUser=0), "runAsUser is 0"),
    (WORKER, lambda pod: drop(pod.spec["securityContext"], "seccompProfile"), "seccompProfile"),
    (WORKER, lambda pod: pod.spec.update(hostNetwork=True), "hostNetwork is set"),
    (WORKER, lambda pod: pod.spec["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "volume h is a hostPath"),
    (WORKER, lambda pod: first(pod)["ports"][0].update(hostPort=8000), "hostPort 8000"),
    (WORKER, lambda pod: first(pod)["securityContext"].update(readOnlyRootFilesystem=False), "file system is writable"),
    (WORKER, lambda pod: first(pod)["volumeMounts"].pop(0), "no volume at /tmp"),
    (WORKER, lambda pod: first(pod).update(imagePullPolicy="Always"), "imagePullPolicy Always"),
    (WORKER, lambda pod: first(pod).update(image="a/b:latest"), "no fixed tag"),
    (WORKER, lambda pod: first(pod).update(image="host:5000/b"), "no fixed tag"),
    (WORKER, lambda pod: drop(first(pod)["resources"]["requests"], "ephemeral-storage"), "no request of ephemeral-storage"),
    (WORKER, lambda pod: first(pod)["resources"]["limits"].update(memory="9Gi"), "memory request 8Gi is not the limit 9Gi"),
    (WORKER, lambda pod: first(pod)["env"].append({"name": "REDIS_PASSWORD", "value": "x"}), "is written down"),
    (WORKER, lambda pod: pod.spec["securityContext"].update(runAsUser=1000), "below 10000"),
    (WORKER, lambda pod: drop(pod.spec, "automountServiceAccountToken"), "automountServiceAccountToken"),
    (WORKER, lambda pod: drop(pod.spec, "serviceAccountName"), "runs as the default account"),
    (WORKER, lambda pod: drop(pod.spec, "priorityClassName"), "no priorityClassName"),
    (WORKER, lambda pod: drop(pod.labels, "app.kubernetes.io/instance"), "no label app.kubernetes.io/instance"),
    (WORKER, lambda pod: drop(pod.labels, "app.kubernetes.io/part-of"), "no label app.kubernetes.io/part-of"),
    (WORKER, lambda pod: drop(pod.labels, "sidecar.istio.io/inject"), "Istio's sidecar would come into it"),
    (WORKER, lambda pod: first(pod)["volumeMounts"].append({"name": "n", "mountPath": "/n"}), "mounts n, which is no volume"),
    (WORKER, lambda pod: pod.spec["volumes"][0].update(emptyDir={}), "has no sizeLimit"),
    (WORKER, lambda pod: drop(pod.spec["volumes"][1]["emptyDir"], "medium"), "no memory volume at /dev/shm"),
    (WORKER, lambda pod: drop(pod.ray_start, "object-store-memory"), "no object-store-memory"),
    (WORKER, lambda pod: pod.spec["volumes"][1]["emptyDir"].update(sizeLimit="1Gi"), "is above the 1Gi of /dev/shm"),
    (WORKER, lambda pod: first(pod)["ports"].pop(), "no port metrics 8080"),
    (WORKER, lambda pod: first(pod).update(command=["ray", "start"]), "a command of its own"),
    (WORKER, lambda pod: pod.spec.update(tolerations=[{"key": "nvidia.com/gpu"}]), "asks for no GPU"),
    (HEAD, lambda pod: drop(pod.spec["containers"][1], "securityContext"), "container autoscaler: allowPrivilegeEscalation"),
    (HEAD, lambda pod: pod.spec.update(serviceAccountName="serving"), "serviceAccountName on an autoscaling head"),
    (HEAD, lambda pod: first(pod)["ports"].pop(), "no port dash-metrics 44227"),
    (
        "RayJob/train submitter",
        lambda pod: drop(first(pod), "securityContext"),
        "container submitter: allowPrivilegeEscalation",
    ),
    (MLFLOW, lambda pod: drop(first(pod), "livenessProbe"), "container mlflow: no livenessProbe"),
]


@pytest.mark.parametrize(("owner", "change", "told"), BROKEN, ids=[told for _, _, told in BROKEN])
def test_a_rule_for_pods_that_is_broken_is_found(owner: str, change: Callable[[Pod], object], told: str) -> None:
    pod = copy.deepcopy(pod_of(owner))
    change(pod)
    assert re.search(told, "\n".join(everything_against(pod))), everything_against(pod)


def test_a_ray_job_as_the_operators_samples_have_it_is_refused() -> None:
    container = {"name": "ray-head", "image": "rayproject/ray:2.60.0"}
    cluster = {"headGroupSpec": {"template": {"metadata": {}, "spec": {"containers": [container]}}}}
    sample = {"kind": "RayJob", "metadata": {"name": "sample"}, "spec": {"rayClusterSpec": cluster}}
    head, submitter = pods_of(sample)
    assert any("allowPrivilegeEscalation" in problem for problem in restricted_problems(head))
    assert any("ray-job-submitter" in problem for problem in restricted_problems(submitter))


def test_serving_goes_before_training_and_training_before_batch() -> None:
    objects = overlay("prod")
    values = {item["metadata"]["name"]: item["value"] for item in of_kind(objects, "PriorityClass")}
    priority = {pod.owner: values[pod.spec["priorityClassName"]] for pod in pods(objects)}
    assert priority["RayService/serving worker replicas"] > priority["RayJob/train head"] > priority["RayJob/sideinfo head"]


def asking_for_a_gpu(objects: list[Object]) -> dict[str, Pod]:
    return {
        pod.owner: pod
        for pod in pods(objects)
        for container in pod.containers
        if "nvidia.com/gpu" in container["resources"].get("requests", {})
    }


def test_without_the_component_no_pod_waits_for_a_gpu_and_with_it_the_jobs_workers_do(tmp_path: Path) -> None:
    assert asking_for_a_gpu(overlay("prod")) == {}
    asking = asking_for_a_gpu(with_component(tmp_path, "gpu"))
    assert set(asking) == {"RayJob/train worker workers", "RayJob/sideinfo worker workers"}
    for pod in asking.values():
        assert gpu_problems(pod) == []
        first(pod)["resources"]["requests"].pop("nvidia.com/gpu")
        assert "container ray-worker: nvidia.com/gpu differs between requests and limits" in pod_problems(pod)
        drop(pod.spec, "tolerations")
        assert gpu_problems(pod) == ["asks for a GPU and does not tolerate its nodes' taint"]
