"""What the manifests name and whether it is there: an object that is not makes a pod that never starts, hours later."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.k8s.manifests import Object, Pod, declared_secrets, of_kind, pods, ray_cluster, services, title
from tests.k8s.rules import ray_kinds

Reference = tuple[str, str, str]
"""Kind, name, key (empty: the whole object)."""

BUILTIN_PRIORITIES = ("system-cluster-critical", "system-node-critical")


def references(pod: Pod) -> Iterator[Reference]:
    """Everything a pod cannot start without."""
    spec = pod.spec
    for container in pod.containers:
        for entry in container.get("env", []):
            source = entry.get("valueFrom", {})
            for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                if field in source:
                    yield kind, source[field]["name"], source[field]["key"]
        for entry in container.get("envFrom", []):
            for field, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
                if field in entry:
                    yield kind, entry[field]["name"], ""
    for volume in spec.get("volumes", []):
        if "secret" in volume:
            yield from _items("Secret", volume["secret"]["secretName"], volume["secret"])
        if "configMap" in volume:
            yield from _items("ConfigMap", volume["configMap"]["name"], volume["configMap"])
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], ""
    if "serviceAccountName" in spec:
        yield "ServiceAccount", spec["serviceAccountName"], ""
    if spec.get("priorityClassName") and spec["priorityClassName"] not in BUILTIN_PRIORITIES:
        yield "PriorityClass", spec["priorityClassName"], ""


def _items(kind: str, name: str, source: Object) -> Iterator[Reference]:
    yield kind, name, ""
    for item in source.get("items", []):
        yield kind, name, item["key"]


def of_objects(objects: list[Object]) -> Iterator[tuple[str, Reference]]:
    """Every reference of the objects themselves, with who makes it."""
    for pod in pods(objects):
        for reference in references(pod):
            yield pod.owner, reference
    for item in ray_kinds(objects):
        cluster, owner = ray_cluster(item), title(item)
        yield owner, ("Secret", cluster["authOptions"]["secretName"], "auth_token")
        if options := cluster.get("gcsFaultToleranceOptions"):
            key = options["redisPassword"]["valueFrom"]["secretKeyRef"]
            yield owner, ("Secret", key["name"], key["key"])
            yield owner, ("Service", *address(options["redisAddress"]))
    for item in of_kind(objects, "StatefulSet"):
        yield title(item), ("Service", item["spec"]["serviceName"], "")
    for item in of_kind(objects, "HTTPRoute"):
        for rule in item["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                yield title(item), ("Service", backend["name"], str(backend["port"]))
    for item in of_kind(objects, "RoleBinding"):
        yield title(item), (item["roleRef"]["kind"], item["roleRef"]["name"], "")
        for subject in item["subjects"]:
            yield title(item), (subject["kind"], subject["name"], "")
    for item in of_kind(objects, "LocalQueue"):
        yield title(item), ("ClusterQueue", item["spec"]["clusterQueue"], "")
    for item in of_kind(objects, "ClusterQueue"):
        for group in item["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                yield title(item), ("ResourceFlavor", flavor["name"], "")
    for item in of_kind(objects, "ValidatingAdmissionPolicyBinding"):
        yield title(item), ("ValidatingAdmissionPolicy", item["spec"]["policyName"], "")
    yield from addresses(objects)


def addresses(objects: list[Object]) -> Iterator[tuple[str, Reference]]:
    """Hosts and ports that settings and Secrets name."""
    for item in of_kind(objects, "ConfigMap"):
        settings: Any = yaml.safe_load(item["data"].get("settings.yaml", "")) or {}
        if uri := settings.get("promote", {}).get("tracking_uri"):
            yield title(item), ("Service", *address(uri.removeprefix("http://")))
    for name, values in declared_secrets().items():
        if found := re.match(r"([\w-]+:\d+),", values.get("CLLMR_ONLINE_STORE", "")):
            yield f"Secret/{name}", ("Service", *address(found[1]))
        for key, value in values.items():
            if key.endswith("-uri"):
                yield f"Secret/{name}", ("Service", *address(value.partition("@")[2].partition("/")[0]))


def address(text: str) -> tuple[str, str]:
    """``host:port`` as name and key of a Service."""
    host, _, port = text.partition(":")
    return host, port


def dangling(objects: list[Object]) -> list[str]:
    """References to what is neither rendered nor a declared Secret."""
    there = known(objects)
    return sorted(
        {
            f"{owner}: no {kind} {name} {key}".strip()
            for owner, (kind, name, key) in of_objects(objects)
            if (kind, name, key) not in there
        }
    )


def known(objects: list[Object]) -> set[Reference]:
    found: set[Reference] = {(item["kind"], item["metadata"]["name"], "") for item in objects}
    for item in of_kind(objects, "ConfigMap"):
        found |= {("ConfigMap", item["metadata"]["name"], key) for key in item["data"]}
    for name, values in declared_secrets().items():
        found |= {("Secret", name, key) for key in ["", *values]}
    found |= {("Service", name, "") for name in services(objects)}
    for item in of_kind(objects, "Service"):
        found |= {("Service", item["metadata"]["name"], str(port["port"])) for port in item["spec"]["ports"]}
    for item in of_kind(objects, "RayService"):
        found |= {
            ("Service", f"{item['metadata']['name']}-serve-svc", "8000"),
            ("Service", f"{item['metadata']['name']}-head-svc", "8265"),
        }
    return found


def selected(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for wanted in selector.get("matchExpressions", []):
        key, operator, values = wanted["key"], wanted["operator"], wanted.get("values", [])
        matches = {
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
        }[operator]
        if not matches:
            return False
    return True
