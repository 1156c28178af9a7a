"""Network policies as a plugin applies them: who may reach whom, as a table, and that nothing else is open."""

import ipaddress
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.k8s.manifests import Object, namespace_labels, needs_kubectl, of_kind, overlay, pods
from tests.k8s.references import selected

pytestmark = needs_kubectl

NAMESPACE = "cllmr"


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod of some namespace, or an address."""

    name: str
    namespace: str = NAMESPACE
    labels: dict[str, str] = field(default_factory=dict)
    address: str = "10.0.0.1"
    """A pod has a private one; addresses of pods are not what an ipBlock is for, but plugins do not tell them apart."""


def own_pods(objects: list[Object]) -> dict[str, End]:
    return {pod.owner: End(pod.owner, labels=pod.labels) for pod in pods(objects)}


OTHERS = {
    "pipeline step": End("pipeline step", labels={"workflows.argoproj.io/workflow": "retraining-x"}),
    "weights": End("weights", labels={"app.kubernetes.io/instance": "weights"}),
    "stranger": End("stranger", labels={"app": "anything"}),
    "stranger elsewhere": End("stranger elsewhere", namespace="default"),
    "dns": End("dns", "kube-system", {"k8s-app": "kube-dns"}),
    "kubelet's neighbour": End("kubelet's neighbour", "kube-system"),
    "operator": End("operator", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}),
    "prometheus": End("prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
    "gateway": End("gateway", "gateway-system"),
    "kfp": End("kfp", "kubeflow", {"app": "ml-pipeline"}),
    "kfp's object store": End("kfp's object store", "kubeflow", {"app": "seaweedfs"}),
    "api server": End("api server", "", address="10.96.0.1"),
    "object store": End("object store", "", address="52.219.1.1"),
    "instance metadata": End("instance metadata", "", address="169.254.169.254"),
}


def _kubeflows(app: str, **ports: Any) -> Object:
    """One of Kubeflow's own policies, as far as it is about us: its pods let in those of profiles' namespaces."""
    profiles = {"namespaceSelector": {"matchLabels": {"app.kubernetes.io/part-of": "kubeflow-profile"}}}
    spec = {
        "podSelector": {"matchLabels": {"app": app}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [profiles], **ports}],
    }
    return {"kind": "NetworkPolicy", "metadata": {"name": app, "namespace": "kubeflow"}, "spec": spec}


KUBEFLOW = [_kubeflows("ml-pipeline"), _kubeflows("seaweedfs", ports=[{"port": 8333}])]


def allowed(objects: list[Object], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection is let through: by the source's egress policies and by the target's ingress policies.

    The port is the pod's: plugins look at a packet when a Service's address and port have been replaced.
    """
    return _lets(objects, "Egress", source, target, port, protocol) and _lets(
        objects, "Ingress", target, source, port, protocol
    )


def _lets(objects: list[Object], direction: str, subject: End, peer: End, port: int, protocol: str) -> bool:
    applied = [
        policy["spec"]
        for policy in [*of_kind(objects, "NetworkPolicy"), *KUBEFLOW]
        if policy["metadata"]["namespace"] == subject.namespace
        and direction in policy["spec"]["policyTypes"]
        and selected(policy["spec"]["podSelector"], subject.labels)
    ]
    if not applied:
        return True
    side = "to" if direction == "Egress" else "from"
    return any(
        _has_port(rule, port, protocol)
        and (side not in rule or any(_is_peer(objects, entry, subject, peer) for entry in rule[side]))
        for spec in applied
        for rule in spec.get(direction.lower(), [])
    )


def _has_port(rule: Object, port: int, protocol: str) -> bool:
    return "ports" not in rule or any(
        entry.get("port", port) == port and entry.get("protocol", "TCP") == protocol for entry in rule["ports"]
    )


def _is_peer(objects: list[Object], entry: Object, subject: End, end: End) -> bool:
    if "ipBlock" in entry:
        address = ipaddress.ip_address(end.address)
        inside = address in ipaddress.ip_network(entry["ipBlock"]["cidr"])
        return inside and not any(address in ipaddress.ip_network(part) for part in entry["ipBlock"].get("except", []))
    if not end.namespace:
        return False
    if "namespaceSelector" in entry:
        labels = namespace_labels(objects) if end.namespace == NAMESPACE else {"kubernetes.io/metadata.name": end.namespace}
        if not selected(entry["namespaceSelector"], labels):
            return False
    elif end.namespace != subject.namespace:
        return False
    return selected(entry.get("podSelector", {}), end.labels)


HEAD, WORKER = "RayService/serving head", "RayService/serving worker replicas"
TRAIN_HEAD, TRAIN_WORKER, SUBMITTER = "RayJob/train head", "RayJob/train worker workers", "RayJob/train submitter"
GCS, FEATURES, POSTGRES = "StatefulSet/gcs-redis", "StatefulSet/feature-redis", "StatefulSet/postgres"
MLFLOW, MATERIALISE, BACKUP = "Deployment/mlflow", "CronJob/materialise", "CronJob/postgres-backup"
CLEAN = "CronJob/clean"
STEP = "pipeline step"

FLOWS = [
    ("gateway", WORKER, 8000),
    (WORKER, HEAD, 6379),
    (HEAD, WORKER, 23456),
    (WORKER, FEATURES, 6379),
    (WORKER, "object store", 443),
    (HEAD, GCS, 6379),
    ("RayService/serving redis-cleanup", GCS, 6379),
    (HEAD, "api server", 443),
    ("operator", HEAD, 8265),
    ("operator", TRAIN_HEAD, 8265),
    ("prometheus", HEAD, 44217),
    ("prometheus", WORKER, 8080),
    ("prometheus", FEATURES, 9121),
    ("prometheus", GCS, 9121),
    (SUBMITTER, TRAIN_HEAD, 8265),
    (TRAIN_WORKER, TRAIN_HEAD, 6379),
    (TRAIN_HEAD, "object store", 443),
    (TRAIN_HEAD, FEATURES, 6379),
    ("RayJob/sideinfo worker workers", "RayJob/sideinfo head", 6379),
    ("RayJob/sideinfo worker workers", "object store", 443),
    (STEP, "api server", 6443),
    (STEP, "object store", 443),
    (STEP, TRAIN_HEAD, 8265),
    (STEP, FEATURES, 6379),
    (STEP, MLFLOW, 5000),
    (WORKER, MLFLOW, 5000),
    (STEP, "kfp", 8887),
    (STEP, "kfp's object store", 8333),
    (MLFLOW, POSTGRES, 5432),
    (MLFLOW, "object store", 443),
    (MATERIALISE, FEATURES, 6379),
    (MATERIALISE, POSTGRES, 5432),
    (MATERIALISE, MLFLOW, 5000),
    (MATERIALISE, "object store", 443),
    (BACKUP, POSTGRES, 5432),
    (CLEAN, FEATURES, 6379),
    (CLEAN, MLFLOW, 5000),
    (CLEAN, "object store", 443),
    ("weights", "object store", 443),
]

CLOSED = [
    ("stranger", WORKER, 8000),
    ("stranger", HEAD, 8265),
    ("stranger elsewhere", HEAD, 10001),
    ("gateway", HEAD, 8265),
    ("gateway", WORKER, 8080),
    ("gateway", TRAIN_HEAD, 8000),
    ("stranger", FEATURES, 6379),
    ("stranger", POSTGRES, 5432),
    (CLEAN, POSTGRES, 5432),
    (CLEAN, "api server", 443),
    (WORKER, GCS, 6379),
    (WORKER, POSTGRES, 5432),
    (WORKER, "api server", 443),
    (TRAIN_WORKER, "api server", 443),
    (TRAIN_WORKER, HEAD, 6379),
    (TRAIN_WORKER, GCS, 6379),
    (SUBMITTER, "object store", 443),
    (SUBMITTER, HEAD, 6379),
    (STEP, POSTGRES, 5432),
    (STEP, GCS, 6379),
    (STEP, "instance metadata", 443),
    (HEAD, "instance metadata", 443),
    (MLFLOW, FEATURES, 6379),
    (BACKUP, "object store", 443),
    (FEATURES, "object store", 443),
    (POSTGRES, "object store", 443),
    ("stranger", "object store", 443),
    ("weights", MLFLOW, 5000),
    ("weights", "api server", 443),
    ("stranger elsewhere", "stranger", 80),
    (WORKER, "kubelet's neighbour", 10250),
    ("prometheus", POSTGRES, 5432),
    ("kfp", MLFLOW, 5000),
    ("stranger elsewhere", "kfp's object store", 8333),
]


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return overlay("prod")


@pytest.fixture(scope="module")
def ends(objects: list[Object]) -> dict[str, End]:
    return own_pods(objects) | OTHERS


@pytest.mark.parametrize(("source", "target", "port"), FLOWS)
def test_a_declared_flow_is_open(objects: list[Object], ends: dict[str, End], source: str, target: str, port: int) -> None:
    assert allowed(objects, ends[source], ends[target], port)


@pytest.mark.parametrize(("source", "target", "port"), CLOSED)
def test_everything_else_is_closed(objects: list[Object], ends: dict[str, End], source: str, target: str, port: int) -> None:
    assert not allowed(objects, ends[source], ends[target], port)


def test_every_pod_finds_names_and_nothing_else_in_the_system_namespace(objects: list[Object], ends: dict[str, End]) -> None:
    for pod in own_pods(objects).values():
        assert allowed(objects, pod, ends["dns"], 53, "UDP")
        assert allowed(objects, pod, ends["dns"], 53)
        assert not allowed(objects, pod, ends["dns"], 80)


def test_the_dashboard_and_the_stores_are_open_to_those_of_the_table_only(objects: list[Object], ends: dict[str, End]) -> None:
    """All pairs at the ports that give a machine or data away: what is open is declared above."""
    declared = {(source, target, port) for source, target, port in FLOWS}
    for target, port in ((HEAD, 8265), (GCS, 6379), (POSTGRES, 5432), (MLFLOW, 5000)):
        callers = {name for name, source in ends.items() if allowed(objects, source, ends[target], port)}
        inside = {HEAD, WORKER, "RayService/serving redis-cleanup"} if target == HEAD else set()
        submitters = {"RayJob/train submitter", "RayJob/sideinfo submitter", STEP} if target == HEAD else set()
        expected = {source for source, end, at in declared if (end, at) == (target, port)} | inside | submitters
        assert callers == expected, (target, port)


def test_without_a_policy_all_is_open_and_with_the_default_nothing_is(objects: list[Object], ends: dict[str, End]) -> None:
    assert allowed([], ends["stranger"], ends[HEAD], 8265)
    only_default = [item for item in of_kind(objects, "NetworkPolicy") if item["metadata"]["name"] == "default-deny"]
    assert not any(allowed(only_default, ends[source], ends[target], port) for source, target, port in FLOWS)


def test_no_policy_is_idle(objects: list[Object], ends: dict[str, End]) -> None:
    """Each one carries something: without it a declared flow or a pod's names are lost, or a closed flow is open."""
    for item in of_kind(objects, "NetworkPolicy"):
        rest = [other for other in objects if other is not item]
        lost = [flow for flow in FLOWS if not allowed(rest, ends[flow[0]], ends[flow[1]], flow[2])]
        opened = [flow for flow in CLOSED if allowed(rest, ends[flow[0]], ends[flow[1]], flow[2])]
        nameless = [pod for pod in own_pods(objects).values() if not allowed(rest, pod, ends["dns"], 53, "UDP")]
        assert lost or opened or nameless, f"{item['metadata']['name']} decides nothing"
