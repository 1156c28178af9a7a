"""The manifests as a cluster sees them: rendered by kustomize, and every resource expanded into the pods it makes."""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import REPOSITORY

K8S = REPOSITORY / "k8s"
OVERLAYS = ("dev", "prod")

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed: nothing can be rendered")

RAY_KINDS = {"RayCluster": (), "RayService": ("rayClusterConfig",), "RayJob": ("rayClusterSpec",)}

UNITS = {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod that a manifest leads to, with its labels and the objects it was made from."""

    owner: str
    """Kind and name of the object, and the part of it: ``RayService/serving worker replicas``."""
    labels: dict[str, str]
    spec: Object
    submits: bool = False
    """Whether it is a RayJob's submitter."""
    ray_start: Object = field(default_factory=dict)
    """What Ray is started with in it (rayStartParams)."""

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def is_ray(self) -> bool:
        return "ray.io/node-type" in self.labels


def build(directory: Path) -> str:
    """`kubectl kustomize`, which must not have anything to say."""
    result = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, ""), f"{directory}: {result.stderr}"
    return result.stdout


@cache
def _rendered(directory: Path) -> str:
    return build(directory)


def render(directory: str) -> list[Object]:
    """The objects of ``k8s/<directory>``, a fresh copy each time."""
    return load(_rendered(K8S / directory))


def overlay(name: str) -> list[Object]:
    """The objects of one overlay, and the jobs that pipeline steps make from its templates."""
    objects = render(f"overlays/{name}")
    return [*objects, *templates(objects)]


def with_component(directory: Path, component: str) -> list[Object]:
    """The base and the job templates with one component; kustomize takes relative paths only."""
    target = directory / "top"
    target.mkdir()
    base = os.path.relpath(K8S, target.resolve())
    own = [(K8S / "rayjobs" / f"{name}.yaml").read_text(encoding="utf-8") for name in ("train", "sideinfo")]
    (target / "jobs.yaml").write_text("---\n".join(own))
    components = ["gpu", "spot"] if component == "spot" else [component]  # it extends what the other has put there
    parts = {"resources": [f"{base}/base", "jobs.yaml"], "components": [f"{base}/components/{one}" for one in components]}
    (target / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    return load(build(target))


def templates(objects: list[Object]) -> list[Object]:
    """The RayJobs in the ConfigMap that pipeline steps read."""
    return [load(text)[0] for text in named(objects, "ConfigMap", "cllmr-rayjobs")["data"].values()]


def load(text: str) -> list[Object]:
    return [document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


def title(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [item for item in of_kind(objects, kind) if item["metadata"]["name"] == name]
    return found


def namespace_labels(objects: list[Object]) -> dict[str, str]:
    """Labels of our namespace on a cluster with Kubeflow, whose profile controller adds its own and replaces none."""
    (namespace,) = of_kind(objects, "Namespace")
    given, name = namespace["metadata"]["labels"], namespace["metadata"]["name"]
    return {"app.kubernetes.io/part-of": "kubeflow-profile", **given, "kubernetes.io/metadata.name": name}


def ray_cluster(item: Object) -> Object:
    """The RayClusterSpec inside a Ray resource."""
    spec: Object = item["spec"]
    for key in RAY_KINDS[item["kind"]]:
        spec = spec[key]
    return spec


def pods(objects: list[Object]) -> list[Pod]:
    """All pods that the objects lead to."""
    return [pod for item in objects for pod in pods_of(item)]


def pods_of(item: Object) -> Iterator[Pod]:
    item = copy.deepcopy(item)
    kind, spec = item["kind"], item.get("spec", {})
    if kind in ("Deployment", "StatefulSet", "Job"):
        yield _pod(title(item), spec["template"])
    elif kind == "CronJob":
        yield _pod(title(item), spec["jobTemplate"]["spec"]["template"])
    elif kind == "Pod":
        yield _pod(title(item), item)
    elif kind in RAY_KINDS:
        yield from _ray_pods(item)


def _pod(owner: str, template: Object, **more: Any) -> Pod:
    return Pod(owner, dict(template["metadata"].get("labels", {})), template["spec"], **more)


def _ray_pods(item: Object) -> Iterator[Pod]:
    """As KubeRay 1.7 makes them: its labels, the autoscaler beside the head, the init container that waits for the head."""
    cluster, owner = ray_cluster(item), title(item)
    head, start = cluster["headGroupSpec"]["template"], cluster["headGroupSpec"].get("rayStartParams", {})
    if cluster.get("enableInTreeAutoscaling"):
        _add_autoscaler(cluster, head)
    yield _ray_pod(f"{owner} head", item, head, "head", "headgroup", start)
    if "gcsFaultToleranceOptions" in cluster:
        yield _ray_pod(f"{owner} redis-cleanup", item, _cleanup(head), "redis-cleanup", "headgroup", start)
    for group in cluster.get("workerGroupSpecs", []):
        template = group["template"]
        ray = template["spec"]["containers"][0]
        template["spec"].setdefault("initContainers", []).append(
            {
                "name": "wait-gcs-ready",
                "image": ray["image"],
                "imagePullPolicy": ray.get("imagePullPolicy"),
                "securityContext": ray.get("securityContext"),
                "env": ray.get("env", []),
                "envFrom": ray.get("envFrom", []),
                "volumeMounts": ray.get("volumeMounts", []),
                "resources": {
                    "requests": {"cpu": "200m", "memory": "256Mi"},
                    "limits": {"cpu": "200m", "memory": "256Mi"},
                },
            }
        )
        start = group.get("rayStartParams", {})
        yield _ray_pod(f"{owner} worker {group['groupName']}", item, template, "worker", group["groupName"], start)
    if item["kind"] == "RayJob" and item["spec"].get("submissionMode", "K8sJobMode") == "K8sJobMode":
        default = {"metadata": {}, "spec": {"containers": [{"name": "ray-job-submitter", "image": "", "resources": {}}]}}
        yield _pod(f"{owner} submitter", item["spec"].get("submitterPodTemplate", default), submits=True)


def _cleanup(head: Object) -> Object:
    """The job that removes a cluster's state from Redis after its end: the head's own container, small."""
    template = copy.deepcopy(head)
    ray = template["spec"]["containers"][0]
    small = {"cpu": "200m", "memory": "256Mi"}
    template["spec"].update(containers=[{**ray, "resources": {"requests": small, "limits": small}}], restartPolicy="Never")
    return template


def _add_autoscaler(cluster: Object, head: Object) -> None:
    options, ray = cluster.get("autoscalerOptions", {}), head["spec"]["containers"][0]
    volumes = head["spec"].setdefault("volumes", [])
    logs = {"name": "ray-logs", "mountPath": "/tmp/ray"}
    volumes.append({"name": "ray-logs", "emptyDir": {}})
    ray.setdefault("volumeMounts", []).append(logs)
    head["spec"]["containers"].append(
        {
            "name": "autoscaler",
            "image": options.get("image", ray["image"]),
            "imagePullPolicy": options.get("imagePullPolicy", "Always"),
            "securityContext": options.get("securityContext"),
            "resources": options.get("resources", {}),
            "env": options.get("env", []),
            "envFrom": options.get("envFrom", []),
            "volumeMounts": [*options.get("volumeMounts", []), logs],
        }
    )


def _ray_pod(owner: str, item: Object, template: Object, node_type: str, group: str, start: Object) -> Pod:
    labels = {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": f"{item['metadata']['name']}-x7k2p",
        "ray.io/node-type": node_type,
        "ray.io/group": group,
    }
    if item["kind"] == "RayService" and not (node_type == "head" and item["spec"].get("excludeHeadPodFromServeSvc")):
        labels["ray.io/serve"] = "true"
    pod = _pod(owner, template)
    return Pod(pod.owner, {**pod.labels, **labels}, pod.spec, ray_start=start)


def services(objects: list[Object]) -> set[str]:
    """Names of the Services there are, those included that KubeRay makes for a RayService."""
    made = [
        f"{item['metadata']['name']}-{suffix}"
        for item in of_kind(objects, "RayService")
        for suffix in ("head-svc", "serve-svc")
    ]
    return {item["metadata"]["name"] for item in of_kind(objects, "Service")} | set(made)


def declared_secrets() -> dict[str, Object]:
    """The Secrets that somebody has to make, by name, with their keys."""
    documents = load((K8S / "secrets.example.yaml").read_text(encoding="utf-8"))
    return {item["metadata"]["name"]: item["stringData"] for item in documents}


def quantity(text: object) -> float:
    """A Kubernetes quantity as a number: 500m, 8Gi."""
    found = re.fullmatch(r"([\d.]+)(m|[KMGT]i)?", str(text))
    assert found, text
    return float(found[1]) * UNITS[found[2] or ""]


def config_of(objects: list[Object], name: str, key: str) -> str:
    """A file of a ConfigMap, whose name may carry a hash."""
    (found,) = [
        item["data"][key]
        for item in objects
        if item["kind"] == "ConfigMap" and item["metadata"]["name"].startswith(name) and key in item["data"]
    ]
    return str(found)


def redis_config(objects: list[Object], directory: Path, password: str) -> str:
    """The feature store's redis.conf with its folders here; writes the password's file beside it."""
    auth = declared_secrets()["feature-redis"]["auth.conf"].replace("REPLACE-ME", password)
    (directory / "auth.conf").write_text(auth, encoding="utf-8")
    config = config_of(objects, "feature-redis", "redis.conf")
    for there, here in (("/etc/redis-auth/", f"{directory}/"), ("dir /data", f"dir {directory}")):
        assert there in config
        config = config.replace(there, here)
    return config


def job_command(
    objects: list[Object], container: str, store_file: Path, settings: Path | None = None, serve_file: Path | None = None
) -> list[str]:
    """The command of a container of the job `materialise`, with its program and its paths here."""
    pod = named(objects, "CronJob", "materialise")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (found,) = [one for one in [*pod["initContainers"], *pod["containers"]] if one["name"] == container]
    program, *arguments = (str(part) for part in found["command"])
    here = {
        "/app/feature_repo": str(REPOSITORY / "feature_repo"),
        "/etc/feast/feature_store.yaml": str(store_file),
        "/etc/cllmr/settings.yaml": str(settings),
        "/etc/serving/serve.yaml": str(serve_file),
    }
    return [str(Path(sys.executable).with_name(program)), *(here.get(part, part) for part in arguments)]
