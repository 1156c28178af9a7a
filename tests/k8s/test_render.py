"""Every overlay and component renders, the same as its golden file; no Secret is in it, nothing is left of a template.

After a change that is meant: python -m tests.k8s.test_render (writes the golden files), and read their diff.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from components.kuberay import RIGHTS
from tests import crds
from tests.k8s.manifests import (
    K8S,
    OVERLAYS,
    RAY_KINDS,
    Object,
    build,
    declared_secrets,
    named,
    needs_kubectl,
    of_kind,
    overlay,
    pods,
    ray_cluster,
    render,
    title,
    with_component,
)

pytestmark = needs_kubectl

GOLDEN = Path(__file__).parents[1] / "golden"
KUBERNETES = ("1.33", "1.36")
OURS_BY_SCHEMA = (
    "ray.io",
    "kueue.x-k8s.io",
    "gateway.networking.k8s.io",
    "monitoring.coreos.com",
)


def golden_file(name: str) -> Path:
    return GOLDEN / f"k8s-{name}.yaml"


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_its_golden_file(name: str) -> None:
    assert build(K8S / "overlays" / name) == golden_file(name).read_text(encoding="utf-8"), (
        f"overlay {name} has changed; if it was meant to: python -m tests.k8s.test_render"
    )


@pytest.mark.parametrize("component", ["gpu", "kueue", "mtls", "spot"])
def test_a_component_renders_alone_on_the_base(tmp_path: Path, component: str) -> None:
    top = with_component(tmp_path, component)
    assert len(yaml.safe_dump_all(top)) > len(yaml.safe_dump_all(render("base")))


def test_mtls_reaches_every_ray_cluster(tmp_path: Path) -> None:
    clusters = [ray_cluster(item) for item in of_kind(with_component(tmp_path, "mtls"), *RAY_KINDS)]
    assert [cluster["tlsOptions"] for cluster in clusters] == [{"enabled": True}] * 3


def test_spot_nodes_are_for_workers_that_resume_and_for_nobody_else(tmp_path: Path) -> None:
    objects = with_component(tmp_path, "spot")
    spot = {"key": "cllmr.example.com/capacity", "operator": "Equal", "value": "spot", "effect": "NoSchedule"}
    tolerant = {pod.owner for pod in pods(objects) if spot in pod.spec.get("tolerations", [])}
    sent = {pod.owner for pod in pods(objects) if pod.spec.get("nodeSelector", {}).get("cllmr.example.com/capacity") == "spot"}
    assert tolerant == sent == {"RayJob/train worker workers", "RayJob/sideinfo worker workers"}
    assert {job["spec"]["backoffLimit"] for job in of_kind(objects, "RayJob")} == {6}


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_secret_is_rendered_and_nothing_lies_in_the_default_namespace(name: str) -> None:
    objects = overlay(name)
    assert of_kind(objects, "Secret") == []
    cluster_wide = ("Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass")
    for item in objects:
        if item["kind"] not in cluster_wide and not item["kind"].startswith("ValidatingAdmissionPolicy"):
            assert item["metadata"]["namespace"] == {"dev": "cllmr-dev", "prod": "cllmr"}[name], title(item)


def test_the_example_secrets_hold_placeholders_only() -> None:
    for name, values in declared_secrets().items():
        for key, value in values.items():
            assert "REPLACE-ME" in value, f"{name}.{key}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_namespace_enforces_the_restricted_profile_of_a_pinned_version(name: str) -> None:
    (namespace,) = of_kind(overlay(name), "Namespace")
    labels = namespace["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert labels[f"pod-security.kubernetes.io/{mode}-version"].startswith("v1.")


def granted(rules: Iterable[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    """Group, resource and verb of everything that rules allow."""
    return {triple for rule in rules for triple in product(rule["apiGroups"], rule["resources"], rule["verbs"])}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_pipelines_role_has_what_its_launcher_uses_and_hardly_more(name: str) -> None:
    rules = named(overlay(name), "Role", "pipeline-runner")["rules"]
    assert granted(rules) - granted(RIGHTS) == {
        ("ray.io", "rayjobs", "list"),
        ("argoproj.io", "workflowtaskresults", "create"),
        ("argoproj.io", "workflowtaskresults", "patch"),
        ("", "configmaps", "get"),
        ("", "secrets", "get"),
    }
    assert granted(RIGHTS) <= granted(rules), "a launcher that is refused waits for nothing"
    assert all(rule.get("resourceNames") for rule in rules if {"configmaps", "secrets"} & set(rule["resources"]))


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_role_binding_names_the_account_of_its_own_namespace(name: str) -> None:
    binding = named(overlay(name), "RoleBinding", "pipeline-runner")
    assert binding["subjects"][0]["namespace"] == binding["metadata"]["namespace"]


# -- schemas ----------------------------------------------------------------------------------------------------------------


def is_custom(item: Object) -> bool:
    return item["apiVersion"].split("/")[0] in OURS_BY_SCHEMA


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", OVERLAYS)
def test_builtin_objects_fit_the_strict_schema_of_kubernetes(name: str, version: str) -> None:
    for item in overlay(name):
        if not is_custom(item):
            kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda item: item["spec"].update(replicas="two"), "not of type"),
        (lambda item: item["spec"].update(replica=2), "not allowed|unexpected"),
        (lambda item: item["spec"].pop("selector"), "required"),
    ],
)
def test_the_strict_schema_refuses_a_broken_deployment(change: Any, told: str) -> None:
    broken = copy.deepcopy(named(overlay("dev"), "Deployment", "mlflow"))
    change(broken)
    with pytest.raises(kubernetes_validate.ValidationError, match=told):
        kubernetes_validate.validate(broken, KUBERNETES[0], strict=True)


@crds.needs_crds
@pytest.mark.parametrize("name", [*OVERLAYS, "mtls", "spot"])
def test_custom_resources_fit_their_schemas(tmp_path: Path, name: str) -> None:
    objects = overlay(name) if name in OVERLAYS else with_component(tmp_path, name)
    custom = [item for item in objects if is_custom(item)]
    assert len(custom) >= 7
    for item in custom:
        assert crds.problems(item) == [], title(item)


def broken_ray_job(item: Object) -> None:
    item["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] = [1]


def borrow_without_reclaiming(preemption: Object) -> None:
    preemption.update(reclaimWithinCohort="Never", borrowWithinCohort={"policy": "LowerPriority"})


@crds.needs_crds
@pytest.mark.parametrize(
    ("kind", "name", "change", "told"),
    [
        ("RayJob", "train", lambda item: item["spec"].update(entryPoint="x"), "spec.entryPoint: unknown field"),
        ("RayJob", "train", broken_ray_job, "is not valid|not of type"),
        ("RayJob", "train", lambda item: item["spec"].update(preRunningDeadlineSeconds=0), "less than the minimum"),
        ("RayJob", "train", lambda item: item["spec"]["rayClusterSpec"].pop("headGroupSpec"), "required property"),
        ("RayJob", "train", lambda item: item["spec"].update(managedBy="me"), "managedBy field value must be"),
        ("RayService", "serving", lambda item: item["spec"].update(rayClusterDeletionDelaySeconds=-1), "less than the minimum"),
        (
            "RayService",
            "serving",
            lambda item: item["spec"]["rayClusterConfig"]["authOptions"].update(mode="tokens"),
            "is not one of",
        ),
        ("LocalQueue", "batch", lambda item: item["spec"].update(stopPolicy="Halt"), "is not one of"),
        ("ClusterQueue", "cllmr-batch", lambda item: item["spec"].update(cohort="ml"), "spec.cohort: unknown field"),
        (
            "ClusterQueue",
            "cllmr-batch",
            lambda item: item["spec"]["preemption"].update(
                reclaimWithinCohort="Never", borrowWithinCohort={"policy": "LowerPriority"}
            ),
            "reclaimWithinCohort",
        ),
    ],
)
def test_a_broken_custom_resource_is_refused(kind: str, name: str, change: Any, told: str) -> None:
    item = named(overlay("prod"), kind, name)
    change(item)
    found = crds.problems(item)
    assert found, "nothing was refused"
    assert re.search(told, "\n".join(found)), found


def test_defaults_count_before_required_and_nulls_are_dropped() -> None:
    schema = {
        "type": "object",
        "required": ["mode"],
        "properties": {"mode": {"type": "string", "default": "a"}, "size": {"type": "integer"}},
    }
    assert crds.broken({"size": None}, schema) == []


if __name__ == "__main__":
    for overlay_name in OVERLAYS:
        golden_file(overlay_name).write_text(build(K8S / "overlays" / overlay_name), encoding="utf-8")
