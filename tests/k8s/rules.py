"""What must hold for Ray resources and pods beyond their schemas; every rule names the object, the value and what is wanted.

The first half is what KubeRay 1.7 checks itself and its schema does not say: it would accept the object and then report an
event that nobody reads. The second half is the Pod Security Standard `restricted`, which refuses pods long after the object
that makes them was accepted, and our own rules for pods.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

from tests.k8s.manifests import RAY_KINDS, Object, Pod, quantity, ray_cluster

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
NAME_LENGTH = {"RayCluster": 53, "RayService": 47, "RayJob": 47, "RayCronJob": 36}
GENERATED_SUFFIX = 5
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
TOKEN_AUTH_SINCE = Version("2.52")
GROUP_PRIORITY_SINCE = Version("2.56")
DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


# -- Ray resources ----------------------------------------------------------------------------------------------------------


def ray_problems(item: Object) -> list[str]:
    """What KubeRay would refuse of a Ray resource."""
    found = [*_name(item)]
    if "clusterSelector" not in item["spec"]:
        found += _cluster(item, ray_cluster(item))
    found += {"RayJob": _job, "RayService": _service}.get(item["kind"], lambda item: [])(item)
    return found


def _name(item: Object) -> Iterator[str]:
    metadata, limit = item["metadata"], NAME_LENGTH[item["kind"]]
    name = metadata.get("name") or metadata["generateName"] + "x" * GENERATED_SUFFIX
    if len(name) > limit:
        yield f"name '{name}' has {len(name)} characters, {item['kind']} may have {limit}"
    if not DNS_1035.fullmatch(name):
        yield f"name '{name}' is no DNS-1035 label"


def _groups(cluster: Object) -> list[tuple[str, Object]]:
    workers = [(group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])]
    return [("head", cluster["headGroupSpec"]), *workers]


def _cluster(item: Object, cluster: Object) -> Iterator[str]:
    annotations = item["metadata"].get("annotations", {})
    head_env = {entry["name"] for entry in cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])}
    head_params = cluster["headGroupSpec"].get("rayStartParams", {})
    for name, group in _groups(cluster):
        params = group.get("rayStartParams", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
            yield f"{name}: resources both in rayStartParams and in resources"
        if "labels" in params:
            yield f"{name}: labels in rayStartParams; use the group's labels"
    if options := cluster.get("gcsFaultToleranceOptions"):
        if "ray.io/ft-enabled" in annotations:
            yield "gcsFaultToleranceOptions beside the annotation ray.io/ft-enabled"
        if "redis-password" in head_params:
            yield "gcsFaultToleranceOptions beside redis-password in rayStartParams"
        for variable in {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & head_env:
            yield f"gcsFaultToleranceOptions beside the variable {variable}"
        if options.get("backend", "redis") != "redis":
            yield f"gcsFaultToleranceOptions.backend {options['backend']} is behind an alpha gate"
    elif "RAY_REDIS_ADDRESS" in head_env:
        yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
    yield from _scaling(cluster, head_env)
    yield from _authentication(item, cluster)
    for gate in ("networkPolicy", "historyServerOptions"):
        if gate in cluster:
            yield f"{gate} is behind an alpha gate that is off"


def _scaling(cluster: Object, head_env: set[str]) -> Iterator[str]:
    scales = cluster.get("enableInTreeAutoscaling", False)
    version = cluster.get("autoscalerOptions", {}).get("version", "v2")
    if "RAY_enable_autoscaler_v2" in head_env and (not scales or "version" in cluster.get("autoscalerOptions", {})):
        yield "RAY_enable_autoscaler_v2 is set; use autoscalerOptions.version"
    for name, group in _groups(cluster)[1:]:
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if not scales and (low is None or high is None):
            yield f"{name}: minReplicas and maxReplicas must both be set without autoscaling"
        elif (low or 0) > (high if high is not None else 2**31):
            yield f"{name}: minReplicas {low} is above maxReplicas {high}"
        if scales and group.get("suspend"):
            yield f"{name}: suspended under autoscaling"
        for setting in {"idleTimeoutSeconds", "priority"} & set(group):
            if not scales or version != "v2":
                yield f"{name}: {setting} without autoscaler v2"
        if "priority" in group and _version(cluster) < GROUP_PRIORITY_SINCE:
            yield f"{name}: priority needs Ray {GROUP_PRIORITY_SINCE}"
    for name, group in _groups(cluster):
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if scales and version == "v2" and policy != "Never":
            yield f"{name}: restartPolicy {policy} under autoscaler v2; Never or unset"


def _authentication(item: Object, cluster: Object) -> Iterator[str]:
    options = cluster.get("authOptions", {})
    if options.get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches the dashboard runs code"
        return
    if "rayVersion" not in cluster or _version(cluster) < TOKEN_AUTH_SINCE:
        yield f"token authentication needs rayVersion {TOKEN_AUTH_SINCE} or later, not {cluster.get('rayVersion')}"
    if options.get("enableK8sTokenAuth") and item["kind"] != "RayCluster":
        yield f"enableK8sTokenAuth is not supported for {item['kind']}"


def _version(cluster: Object) -> Version:
    try:
        return Version(cluster.get("rayVersion", ""))
    except InvalidVersion:
        return Version("0")


def _job(item: Object) -> Iterator[str]:
    spec = item["spec"]
    mode, shutdown = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes", False)
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode {mode} is none of {', '.join(SUBMISSION_MODES)}"
    if mode == "SidecarMode":
        for setting in {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(spec):
            yield f"{setting} in SidecarMode"
        policy = ray_cluster(item)["headGroupSpec"]["template"]["spec"].get("restartPolicy", "Never")
        if policy != "Never":
            yield f"head's restartPolicy {policy} in SidecarMode"
    if spec.get("ttlSecondsAfterFinished") and not shutdown:
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if rules and (shutdown or spec.get("ttlSecondsAfterFinished")):
        yield "deletionRules beside shutdownAfterJobFinishes or ttlSecondsAfterFinished"
    if any(rule["policy"] == "DeleteWorkers" for rule in rules) and spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
        yield "DeleteWorkers under autoscaling"
    waits = [(rule["condition"].get("ttlSeconds", 0), rule["policy"]) for rule in rules if rule["policy"] in DELETION_ORDER]
    by_policy = sorted(waits, key=lambda wait: DELETION_ORDER.index(wait[1]))
    if [ttl for ttl, _ in by_policy] != sorted(ttl for ttl, _ in by_policy):
        yield f"deletion waits {by_policy} do not rise in the order {DELETION_ORDER}"
    if spec.get("suspend") and not shutdown:
        yield "suspend (and so Kueue) without shutdownAfterJobFinishes"
    if spec.get("backoffLimit") and ("clusterSelector" in spec or mode == "InteractiveMode"):
        yield "backoffLimit with clusterSelector or InteractiveMode"
    yield from _our_job(item, mode)


def _our_job(item: Object, mode: str) -> Iterator[str]:
    """What we ask of a batch job beyond the operator: an end, and a gang of one size."""
    spec = item["spec"]
    if not spec.get("preRunningDeadlineSeconds"):
        yield "no preRunningDeadlineSeconds: a job whose pods do not start is never ended"
    if "activeDeadlineSeconds" in spec:
        yield "activeDeadlineSeconds has no effect: the launcher writes its timeout_s there"
    if mode == "K8sJobMode" and "submitterPodTemplate" not in spec:
        yield "no submitterPodTemplate: the operator's own submitter is refused by the profile restricted"
    cluster = spec.get("rayClusterSpec", {})
    if cluster.get("enableInTreeAutoscaling"):
        yield "autoscaling in a job that a queue admits whole"
    for name, group in _groups(cluster)[1:]:
        sizes = [group.get(key) for key in ("minReplicas", "replicas", "maxReplicas")]
        if len(set(sizes)) > 1:
            yield f"{name}: replicas {sizes} of a gang differ"


def _service(item: Object) -> Iterator[str]:
    spec = item["spec"]
    strategy = spec.get("upgradeStrategy", {})
    kind = strategy.get("type", "NewCluster")
    if kind not in UPGRADES:
        yield f"upgradeStrategy.type {kind} is none of {', '.join(UPGRADES)}"
    if kind == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions", {})
        step, surge = options.get("stepSizePercent", 0), options.get("maxSurgePercent", 100)
        if not ray_cluster(item).get("enableInTreeAutoscaling"):
            yield "an incremental upgrade needs autoscaling"
        if not 0 < step <= surge:
            yield f"stepSizePercent {step} is not in 1..maxSurgePercent {surge}"
        if options.get("intervalSeconds", 0) <= 0:
            yield "intervalSeconds must be above 0"
        if not options.get("gatewayClassName"):
            yield "gatewayClassName is not set"
    if ray_cluster(item)["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService.metadata.name must not be set"
    if not spec.get("excludeHeadPodFromServeSvc"):
        yield "excludeHeadPodFromServeSvc is not set: users' requests would go to the head"
    yield from serve_problems(spec.get("serveConfigV2", ""))


def serve_problems(text: str) -> Iterator[str]:
    """What Ray Serve would refuse, or take without a word, of a configuration that is a mere text to Kubernetes."""
    from pydantic import BaseModel, ValidationError
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    def unknown(schema: type[BaseModel], part: Object, where: str) -> Iterator[str]:
        for name in sorted(set(part) - set(schema.model_fields)):
            yield f"{where} has an unknown field {name}"

    document: Any = yaml.safe_load(text) or {}
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        yield f"serveConfigV2: {error.errors()[0]['loc']} {error.errors()[0]['msg']}"
        return
    if not document.get("applications"):
        yield "serveConfigV2 has no application"
    yield from unknown(ServeDeploySchema, document, "serveConfigV2")
    for application in document.get("applications", []):
        where = f"application {application['name']}"
        yield from unknown(ServeApplicationSchema, application, where)
        if not (application.get("route_prefix") or "/").startswith("/"):
            yield f"{where}: route_prefix {application['route_prefix']} does not begin with /"
        for deployment in application.get("deployments", []):
            yield from unknown(DeploymentSchema, deployment, f"deployment {deployment['name']}")
            scaling = deployment.get("autoscaling_config")
            if isinstance(scaling, dict):
                try:
                    config = AutoscalingConfig(**scaling)
                except (ValidationError, ValueError) as error:
                    yield f"deployment {deployment['name']}: {' '.join(str(error).split())}"
                    continue
                yield from unknown(AutoscalingConfig, scaling, f"autoscaling_config of {deployment['name']}")
                ongoing, target = deployment.get("max_ongoing_requests", 5), config.get_target_ongoing_requests()
                if not 1.2 * target <= ongoing <= 1.5 * target:
                    yield f"max_ongoing_requests {ongoing} is not 20-50 % above target_ongoing_requests {target:g}"


# -- pods -------------------------------------------------------------------------------------------------------------------

FORBIDDEN_POD_FIELDS = ("hostNetwork", "hostPID", "hostIPC")
ALLOWED_VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")


def restricted_problems(pod: Pod) -> list[str]:
    """What Pod Security Admission's profile `restricted` refuses."""
    found = [f"{field} is set" for field in FORBIDDEN_POD_FIELDS if pod.spec.get(field)]
    for volume in pod.spec.get("volumes", []):
        found += [f"volume {volume['name']} is a {kind}" for kind in volume if kind != "name" and kind not in ALLOWED_VOLUMES]
    of_pod = pod.spec.get("securityContext") or {}
    for container in pod.containers:
        name, own = container["name"], container.get("securityContext") or {}
        capabilities = own.get("capabilities", {})
        if own.get("allowPrivilegeEscalation") is not False:
            found.append(f"container {name}: allowPrivilegeEscalation is not false")
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append(f"container {name}: capabilities are not dropped")
        if own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
            found.append(f"container {name}: runAsNonRoot is not true")
        if own.get("runAsUser", of_pod.get("runAsUser")) == 0:
            found.append(f"container {name}: runAsUser is 0")
        if own.get("seccompProfile", of_pod.get("seccompProfile", {})).get("type") not in ("RuntimeDefault", "Localhost"):
            found.append(f"container {name}: seccompProfile is not RuntimeDefault")
        if own.get("privileged"):
            found.append(f"container {name}: privileged")
        found += [
            f"container {name}: hostPort {port['hostPort']}" for port in container.get("ports", []) if port.get("hostPort")
        ]
    return found


def pod_problems(pod: Pod) -> list[str]:
    """What we ask of every pod beyond `restricted`."""
    found = [*_containers(pod), *_volumes(pod)]
    of_pod = pod.spec.get("securityContext") or {}
    if of_pod.get("runAsUser", 0) < 10_000 or of_pod.get("runAsGroup", 0) < 10_000:
        found.append(f"runAsUser {of_pod.get('runAsUser')}, runAsGroup {of_pod.get('runAsGroup')}: below 10000")
    of_operator = any(container["name"] == "autoscaler" for container in pod.spec["containers"])
    of_operator |= pod.labels.get("ray.io/node-type") == "redis-cleanup"
    if of_operator and "serviceAccountName" in pod.spec:
        found.append("serviceAccountName on an autoscaling head: the operator makes one with the role it needs")
    if not of_operator and pod.spec.get("automountServiceAccountToken") is not False:
        found.append("automountServiceAccountToken is not false")
    if not of_operator and pod.spec.get("serviceAccountName", "default") == "default":
        found.append("runs as the default account")
    if not pod.spec.get("priorityClassName"):
        found.append("no priorityClassName")
    for label in ("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/part-of"):
        if label not in pod.labels:
            found.append(f"no label {label}")
    if pod.labels.get("sidecar.istio.io/inject") != "false":
        found.append("Istio's sidecar would come into it: Kubeflow labels a profile's namespace for that")
    return found


def _containers(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        name, resources = container["name"], container.get("resources") or {}
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        made_by_operator = name == "wait-gcs-ready" or pod.labels.get("ray.io/node-type") == "redis-cleanup"
        if (container.get("securityContext") or {}).get("readOnlyRootFilesystem") is not True:
            yield f"container {name}: root file system is writable"
        if not any(mount["mountPath"] == "/tmp" for mount in container.get("volumeMounts", [])) and pod.is_ray:
            yield f"container {name}: no volume at /tmp"
        if container.get("imagePullPolicy") != "IfNotPresent":
            yield f"container {name}: imagePullPolicy {container.get('imagePullPolicy')}"
        if container["image"].endswith(":latest") or not re.search(r":[^/]+$|@sha256:", container["image"]):
            yield f"container {name}: image {container['image']} has no fixed tag"
        for resource in ("cpu", "memory", *([] if made_by_operator else ["ephemeral-storage"])):
            if resource not in requests:
                yield f"container {name}: no request of {resource}"
        if requests.get("memory") != limits.get("memory"):
            yield f"container {name}: memory request {requests.get('memory')} is not the limit {limits.get('memory')}"
        for resource in set(requests) | set(limits):
            if resource.endswith("/gpu") and requests.get(resource) != limits.get(resource):
                yield f"container {name}: {resource} differs between requests and limits"
        for variable in container.get("env", []):
            secret = re.search("PASSWORD$|TOKEN|SECRET|ACCESS_KEY|REGISTRY|ONLINE_STORE", variable["name"])
            if secret and "value" in variable:
                yield f"container {name}: {variable['name']} is written down"


def _volumes(pod: Pod) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for container in pod.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes and not pod.owner.startswith("StatefulSet/"):
                yield f"container {container['name']}: mounts {mount['name']}, which is no volume"
    for volume in volumes.values():
        if "emptyDir" in volume and volume["name"] != "ray-logs" and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no sizeLimit"


def probe_problems(pod: Pod) -> list[str]:
    """Containers that go on for ever and that nobody asks whether they live; KubeRay adds Ray's own probes."""
    if pod.is_ray or pod.spec.get("restartPolicy") in ("Never", "OnFailure"):
        return []
    return [
        f"container {container['name']}: no {probe}"
        for container in pod.spec["containers"]
        for probe in ("readinessProbe", "livenessProbe")
        if probe not in container
    ]


def digest_problems(pod: Pod) -> list[str]:
    """Images that are not given by digest."""
    return [
        f"container {container['name']}: image {container['image']} is not given by digest"
        for container in pod.containers
        if not DIGEST.fullmatch(container["image"])
    ]


def ray_pod_problems(pod: Pod) -> list[str]:
    """What Ray's own containers need: shared memory that holds the object store, named metrics ports, no command."""
    found = []
    ray = pod.spec["containers"][0]
    mounts = {mount["mountPath"]: mount["name"] for mount in ray.get("volumeMounts", [])}
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    shm = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
    if shm.get("medium") != "Memory":
        found.append("no memory volume at /dev/shm: the object store would fall back to the disk")
    elif (store := int(pod.ray_start.get("object-store-memory", 0))) == 0:
        found.append("no object-store-memory: Ray takes 30 % of the memory, whatever /dev/shm holds")
    elif store > quantity(shm["sizeLimit"]):
        found.append(f"object-store-memory {store} is above the {shm['sizeLimit']} of /dev/shm: it would lie on the disk")
    ports = {port["name"]: port["containerPort"] for port in ray.get("ports", [])}
    wanted = {"metrics": 8080}
    if pod.labels["ray.io/node-type"] == "head":
        wanted |= {"as-metrics": 44217, "dash-metrics": 44227, "dashboard": 8265}
    found += [f"no port {name} {port}" for name, port in wanted.items() if ports.get(name) != port]
    if "command" in ray or "args" in ray:
        found.append("a command of its own: Ray is not started by the operator")
    return found


def gpu_problems(pod: Pod) -> list[str]:
    """GPUs without a toleration for their nodes, and the other way round."""
    asks = any("nvidia.com/gpu" in (container.get("resources") or {}).get("limits", {}) for container in pod.containers)
    tolerates = any(toleration.get("key") == "nvidia.com/gpu" for toleration in pod.spec.get("tolerations", []))
    if asks and not tolerates:
        return ["asks for a GPU and does not tolerate its nodes' taint"]
    return ["tolerates GPU nodes and asks for no GPU"] if tolerates and not asks else []


def ray_kinds(objects: list[Object]) -> list[Object]:
    return [item for item in objects if item["kind"] in RAY_KINDS]
