"""Every name resolves, selectors select, disruption budgets let a node be drained, Kueue's queue can admit what is sent."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.cluster import parameters_of, pipeline_of
from pipelines.config import load
from serving.auth import MIN_LENGTH, read_tokens
from tests.k8s.manifests import (
    K8S,
    OVERLAYS,
    Object,
    config_of,
    declared_secrets,
    named,
    namespace_labels,
    needs_kubectl,
    of_kind,
    overlay,
    pods,
    quantity,
    ray_cluster,
    title,
    with_component,
)
from tests.k8s.references import dangling, known, of_objects, references, selected

pytestmark = needs_kubectl


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_that_is_named_is_there(name: str) -> None:
    assert dangling(overlay(name)) == []


def without(kind: str, name: str) -> Callable[[list[Object]], object]:
    return lambda objects: objects.remove(named(objects, kind, name))


def worker_container(objects: list[Object]) -> Object:
    cluster = ray_cluster(named(objects, "RayService", "serving"))
    container: Object = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("ServiceAccount", "serving"), "worker replicas: no ServiceAccount serving"),
        (without("PersistentVolumeClaim", "models"), "RayJob/sideinfo head: no PersistentVolumeClaim models"),
        (without("PriorityClass", "cllmr-serving"), "no PriorityClass cllmr-serving"),
        (without("Service", "gcs-redis"), "RayService/serving: no Service gcs-redis 6379"),
        (without("Service", "mlflow"), "no Service mlflow 5000"),
        (without("Service", "feature-redis"), "Secret/feature-redis: no Service feature-redis 6379"),
        (without("RayService", "serving"), "HTTPRoute/serving: no Service serving-serve-svc 8000"),
        (without("ClusterQueue", "cllmr-batch"), "LocalQueue/batch: no ClusterQueue"),
        (without("ResourceFlavor", "h100"), "ClusterQueue/cllmr-batch: no ResourceFlavor h100"),
        (without("Role", "pipeline-runner"), "no Role pipeline-runner"),
        (without("ValidatingAdmissionPolicy", "cllmr-ray-token-auth"), "no ValidatingAdmissionPolicy"),
        # what kustomize does to a generated ConfigMap inside a resource whose fields it does not know
        (
            lambda objects: worker_container(objects)["envFrom"].__setitem__(0, {"configMapRef": {"name": "environment"}}),
            "no ConfigMap environment",
        ),
        (
            lambda objects: worker_container(objects)["env"][0]["valueFrom"]["secretKeyRef"].update(key="url"),
            "no Secret endpoint url",
        ),
        (
            lambda objects: ray_cluster(named(objects, "RayJob", "train"))["authOptions"].update(secretName="other"),
            "RayJob/train: no Secret other auth_token",
        ),
    ],
)
def test_a_name_that_leads_nowhere_is_found(change: Callable[[list[Object]], object], told: str) -> None:
    objects = overlay("prod")
    change(objects)
    assert re.search(told, "\n".join(dangling(objects))), dangling(objects)


def test_every_declared_secret_and_key_is_read_by_somebody() -> None:
    read = {(name, key) for _, (kind, name, key) in of_objects(overlay("prod")) if kind == "Secret" and key}
    assert read == {(name, key) for name, values in declared_secrets().items() for key in values}


def test_what_is_said_of_a_token_is_what_the_endpoint_takes() -> None:
    assert f"at least {MIN_LENGTH} characters" in (K8S / "secrets.example.yaml").read_text(encoding="utf-8")
    assert read_tokens({"CLLMR_TOKENS": str(declared_secrets()["endpoint"]["tokens"])}).are_needed


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pipeline_step_has_the_account_the_templates_and_all_the_secrets_of_a_ray_job(tmp_path: Path, name: str) -> None:
    objects, file = overlay(name), tmp_path / "settings.yaml"
    file.write_text(config_of(objects, "pipeline", "settings.yaml"), encoding="utf-8")
    settings = load("cluster", [file])
    assert parameters_of(settings, pipeline_of(settings))["storage_root"].startswith("s3://")  # so it can be submitted
    platforms = pipeline_of(settings).platforms
    assert platforms is not None
    steps = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    (head,) = [pod for pod in pods(objects) if pod.owner == "RayJob/train head"]
    secrets = {reference for reference in references(head) if reference[0] == "Secret"}
    assert len(secrets) == 3
    for step in steps.values():
        read = [(one["secretName"], pair["secretKey"]) for one in step["secretAsEnv"] for pair in one["keyToEnv"]]
        assert {("Secret", *pair) for pair in read} == secrets
    mounted = {one["configMapName"] for step in steps.values() for one in step.get("configMapAsVolume", [])}
    named_by_steps = {("ConfigMap", one, "") for one in mounted} | {("ServiceAccount", settings.cluster.service_account, "")}
    assert len(named_by_steps) == 2
    assert secrets | named_by_steps <= known(objects)
    (environment,) = [one for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"].startswith("environment-")]
    assert settings.placement.environment == {"AWS_REGION": environment["data"]["AWS_REGION"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_services_and_monitors_select_pods_that_have_the_port_they_name(name: str) -> None:
    objects = overlay(name)
    wanted = [(item, item["spec"]["selector"], item["spec"]["ports"], "targetPort") for item in of_kind(objects, "Service")]
    wanted += [
        (item, item["spec"]["selector"]["matchLabels"], item["spec"]["podMetricsEndpoints"], "port")
        for item in of_kind(objects, "PodMonitor")
    ]
    assert len(wanted) == 7
    for item, labels, ports, field in wanted:
        chosen = [pod for pod in pods(objects) if selected({"matchLabels": labels}, pod.labels)]
        assert chosen, f"{title(item)} selects no pod"
        for pod in chosen:
            names = {port["name"] for container in pod.containers for port in container.get("ports", [])}
            assert {port[field] for port in ports} <= names, f"{title(item)} at {pod.owner}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_workloads_select_their_own_pods_and_no_others(name: str) -> None:
    objects = overlay(name)
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        chosen = {pod.owner for pod in pods(objects) if selected(item["spec"]["selector"], pod.labels)}
        assert chosen == {title(item)}


# -- disruption budgets -----------------------------------------------------------------------------------------------------


def budget_problems(objects: list[Object]) -> list[str]:
    """Budgets that select nothing, block every drain, or are of a form that does not work for Ray's pods."""
    found = []
    for item in of_kind(objects, "PodDisruptionBudget"):
        spec, who = item["spec"], title(item)
        chosen = [pod for pod in pods(objects) if selected(spec["selector"], pod.labels)]
        if not chosen:
            found.append(f"{who} selects no pod")
        ray = [pod for pod in chosen if pod.is_ray]
        if ray and not isinstance(spec.get("minAvailable"), int):
            found.append(f"{who}: Ray's pods need an integer minAvailable")
        if any(pod.labels["ray.io/node-type"] == "head" for pod in ray):
            found.append(f"{who}: a budget for a head blocks every drain of its node")
        if any("ray.io/cluster" in str(spec["selector"]) for _ in ray):
            found.append(f"{who}: ray.io/cluster changes with every upgrade")
        if ray and isinstance(spec.get("minAvailable"), int):
            smallest = sum(
                group["minReplicas"]
                for cluster in [ray_cluster(service) for service in of_kind(objects, "RayService")]
                for group in cluster["workerGroupSpecs"]
            )
            if not 0 < spec["minAvailable"] < smallest:
                found.append(f"{who}: minAvailable {spec['minAvailable']} of {smallest} workers")
    return found


def test_budgets_protect_the_endpoint_and_let_a_node_be_drained() -> None:
    objects = overlay("prod")
    assert budget_problems(objects) == []
    chosen = {
        pod.owner
        for item in of_kind(objects, "PodDisruptionBudget")
        for pod in pods(objects)
        if selected(item["spec"]["selector"], pod.labels)
    }
    assert chosen == {"RayService/serving worker replicas", "Deployment/mlflow"}


def budget(**spec: object) -> Callable[[list[Object]], object]:
    def change(objects: list[Object]) -> None:
        item = named(objects, "PodDisruptionBudget", "serving-workers")
        item["spec"].pop("minAvailable")
        item["spec"].update(spec)

    return change


WORKERS = {"app.kubernetes.io/instance": "serving", "ray.io/node-type": "worker"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (budget(maxUnavailable=1), "need an integer minAvailable"),
        (budget(minAvailable="50%"), "need an integer minAvailable"),
        (budget(minAvailable=2), "minAvailable 2 of 2 workers"),
        (budget(minAvailable=1, selector={"matchLabels": {"app": "serving"}}), "selects no pod"),
        (budget(minAvailable=1, selector={"matchLabels": {"app.kubernetes.io/instance": "serving"}}), "blocks every drain"),
        (
            budget(minAvailable=1, selector={"matchLabels": {**WORKERS, "ray.io/cluster": "serving-x7k2p"}}),
            "changes with every upgrade",
        ),
    ],
)
def test_a_budget_that_does_not_work_is_found(change: Callable[[list[Object]], object], told: str) -> None:
    objects = overlay("prod")
    change(objects)
    assert re.search(told, "\n".join(budget_problems(objects))), budget_problems(objects)


# -- Kueue ------------------------------------------------------------------------------------------------------------------


def queue_problems(objects: list[Object]) -> list[str]:
    """Jobs that the queue could never admit, and pods that would be put on the wrong nodes."""
    (queue,) = of_kind(objects, "ClusterQueue")
    (group,) = queue["spec"]["resourceGroups"]
    flavors = [{part["name"]: quantity(part["nominalQuota"]) for part in flavor["resources"]} for flavor in group["flavors"]]
    found = []
    if flavors[0]["nvidia.com/gpu"] != 0:
        found.append("the first flavour has GPUs: heads and submitters would take GPU nodes")
    for job in of_kind(objects, "RayJob"):
        sizes = {"head": 1, "submitter": 1, "worker": ray_cluster(job)["workerGroupSpecs"][0]["replicas"]}
        for pod in pods([job]):
            need: dict[str, float] = {}
            for container in pod.spec["containers"]:
                for resource, amount in container["resources"]["requests"].items():
                    need[resource] = need.get(resource, 0) + quantity(amount)
            if uncovered := sorted(set(need) - set(group["coveredResources"])):
                found.append(f"{pod.owner} asks for {uncovered}, which the queue does not cover")
                continue
            count = sizes[pod.owner.split()[1]]
            if not any(all(count * need[name] <= quota[name] for name in need) for quota in flavors):
                found.append(f"{pod.owner} times {count} fits no flavour")
    return found


def change_gpus(objects: list[Object]) -> None:
    cluster = ray_cluster(named(objects, "RayJob", "train"))
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["requests"]["nvidia.com/gpu"] = 3


def group_of(objects: list[Object]) -> Object:
    group: Object = of_kind(objects, "ClusterQueue")[0]["spec"]["resourceGroups"][0]
    return group


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_gpus, "RayJob/train worker workers times 2 fits no flavour"),
        (lambda objects: group_of(objects)["flavors"].reverse(), "the first flavour has GPUs"),
        (
            lambda objects: of_kind(objects, "ClusterQueue")[0]["spec"]["resourceGroups"][0]["coveredResources"].remove(
                "memory"
            ),
            "asks for ..memory.., which the queue does not cover",
        ),
    ],
)
def test_a_queue_that_would_not_admit_a_job_is_found(change: Callable[[list[Object]], object], told: str) -> None:
    objects = overlay("prod")
    assert queue_problems(objects) == []
    change(objects)
    assert re.search(told, "\n".join(queue_problems(objects))), queue_problems(objects)


def test_the_queue_takes_jobs_of_our_namespace() -> None:
    objects = overlay("prod")
    (queue,) = of_kind(objects, "ClusterQueue")
    assert selected(queue["spec"]["namespaceSelector"], namespace_labels(objects))


def test_the_queue_admits_the_jobs_with_gpus_too(tmp_path: Path) -> None:
    jobs = of_kind(with_component(tmp_path, "gpu"), "RayJob")
    assert queue_problems([*of_kind(overlay("prod"), "ClusterQueue"), *jobs]) == []


def test_the_quota_of_the_namespace_holds_serving_twice_and_both_jobs() -> None:
    objects = overlay("prod")
    (quota,) = of_kind(objects, "ResourceQuota")
    limits = quota["spec"]["hard"].items()
    hard = {name.removeprefix("requests."): quantity(amount) for name, amount in limits if name.startswith("requests.")}
    used = dict.fromkeys(hard, 0.0)
    for item in objects:
        for pod in pods([item]):
            count = 1
            if " worker " in pod.owner:
                group = ray_cluster(item)["workerGroupSpecs"][0]
                count = group["replicas"]
            if item["kind"] == "RayService":
                count *= 2  # during an upgrade
            for container in pod.spec["containers"]:
                for resource, amount in container["resources"]["requests"].items():
                    used[resource] += count * quantity(amount)
    assert {resource: amount for resource, amount in used.items() if amount > hard[resource]} == {}


def test_the_capacity_table_of_the_readme_is_the_manifests() -> None:
    objects, counts = overlay("prod"), {"RayService/serving worker": 2, "RayJob/train worker": 2, "Deployment/mlflow": 2}
    parts = {
        "serving, head with autoscaler": ("RayService/serving head",),
        "serving, workers": ("RayService/serving worker",),
        "stores, MLflow": ("StatefulSet/", "Deployment/"),
        "a training job": ("RayJob/train",),
    }
    rows = {
        cells[0]: cells[1:]
        for line in (K8S / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 5
    }
    for title_of_row, owners in parts.items():
        cpu = memory = gpu = number = 0.0
        for pod in pods(objects):
            if not pod.owner.startswith(owners):
                continue
            count = next((count for owner, count in counts.items() if pod.owner.startswith(owner)), 1)
            number += count
            for container in pod.spec["containers"]:
                requests = container["resources"]["requests"]
                cpu += count * quantity(requests["cpu"])
                memory += count * quantity(requests["memory"]) / 2**30
                gpu += count * requests.get("nvidia.com/gpu", 0)
        seen = [float(re.match(r"[\d.]*", cell)[0] or 0) for cell in rows[title_of_row]]
        assert seen == [number, round(cpu, 1), round(memory * 2) / 2, gpu], title_of_row
