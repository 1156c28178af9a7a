"""Where a task runs and with how much: the only file that knows images, CPU, GPU, memory, tolerations, retries and launching.

Under ``cllmr run`` these settings are accepted and have no effect but ``retries`` and ``launch``; a cluster's scheduler obeys
all of them.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.image import IMAGE
from components.job import LAUNCH_VARIABLE, RUN_ID_VARIABLE, LaunchConfig


class TaskPlacement(BaseModel):
    """What one stage's task asks of the cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image: str | None = None
    """Container image of this stage; none: ``placement.image``."""
    cpu: float = Field(default=1.0, gt=0)
    """CPU cores requested, and the limit."""
    memory_gib: float = Field(default=2.0, gt=0)
    """Memory requested, and the limit, GiB."""
    gpu: int = Field(default=0, ge=0)
    """Number of accelerators; 0: none. No effect where a Ray job does the work: its template says what it has."""
    gpu_type: str = "nvidia.com/gpu"
    """Resource name of the accelerator, as the cluster's device plugin calls it; no effect when ``gpu`` is 0."""
    retries: int = Field(default=0, ge=0)
    """Further attempts after a failure, with growing pauses; a finished stage is never run twice."""
    spot: bool = False
    """Whether the task is sent to nodes that may be taken away (``placement.spot_key``): only with ``retries``."""

    @model_validator(mode="after")
    def _spot_is_tried_again(self) -> Self:
        if self.spot and not self.retries:
            raise ValueError("spot is true and retries is 0: a task on a node that may be taken away must be tried again")
        return self


class HeavyPlacement(TaskPlacement):
    """What the task of a stage asks whose work Ray can do somewhere else."""

    launch: LaunchConfig = LaunchConfig()
    """Whether the task does the work itself or has a Ray job do it; the job brings its own CPUs, memory and GPUs."""


class PlacementConfig(BaseModel):
    """The placement of every stage's task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str = IMAGE
    """Container image of all stages that name no other."""
    run_as_user: int | None = Field(default=None, gt=0)
    """User and group id of every task, as Pod Security "restricted" demands one that is not root; the images' is 10001. None:
    what the image and the cluster say."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every task, by name; nothing secret. A Ray job's are in its template."""
    secrets: dict[str, list[str]] = Field(default_factory=dict)
    """Kubernetes Secrets that every task reads, by name: their keys, each of which becomes the variable of its name. A Secret
    that is not there is left out, as where nodes or accounts carry the right to the bucket; the task says what it misses."""
    spot_key: str = Field(default="cllmr.example.com/capacity", min_length=1)
    """Label, and key of the taint, of nodes that may be taken away; on GKE cloud.google.com/gke-spot. No effect without a
    stage's ``spot``."""
    spot_value: str = Field(default="spot", min_length=1)
    """Value of both; on GKE "true"."""
    ingest: TaskPlacement = TaskPlacement()
    """Placement of ingest."""
    sideinfo: HeavyPlacement = HeavyPlacement()
    """Placement of sideinfo."""
    spectrum: TaskPlacement = TaskPlacement()
    """Placement of spectrum."""
    features: TaskPlacement = TaskPlacement()
    """Placement of features."""
    train: HeavyPlacement = HeavyPlacement(cpu=2)
    """Placement of train."""
    evaluate: TaskPlacement = TaskPlacement(cpu=2)
    """Placement of evaluate."""
    promote: TaskPlacement = TaskPlacement()
    """Placement of promote."""
    serve: TaskPlacement = TaskPlacement()
    """Placement of serve."""
    batch: TaskPlacement = TaskPlacement(cpu=2)
    """Placement of batch scoring; with RAY_ADDRESS in the image's environment a Ray cluster does the work."""


def place(task, config: PlacementConfig):  # type: ignore[no-untyped-def]  # kfp's PipelineTask; kfp is not imported by the config
    """Applies a stage's placement to its KFP task and returns the task."""
    wanted: TaskPlacement = getattr(config, task.name)
    task.set_container_image(wanted.image or config.image)
    task.set_cpu_request(f"{wanted.cpu:g}").set_cpu_limit(f"{wanted.cpu:g}")
    task.set_memory_request(f"{wanted.memory_gib:g}Gi").set_memory_limit(f"{wanted.memory_gib:g}Gi")
    if config.run_as_user is not None:
        from kfp import kubernetes

        # with it, kfp drops all capabilities and sets the default seccomp profile
        kubernetes.set_security_context(task, config.run_as_user, config.run_as_user, run_as_non_root=True)
    for name, value in config.environment.items():
        task.set_env_variable(name, value)
    for name, keys in config.secrets.items():
        from kfp import kubernetes

        kubernetes.use_secret_as_env(task, name, {key: key for key in keys}, optional=True)
    launch = wanted.launch if isinstance(wanted, HeavyPlacement) and wanted.launch.backend != "here" else None
    if wanted.gpu and launch is None:  # a step that waits for a job needs none of what the job has
        from kfp import kubernetes

        task.set_accelerator_type(wanted.gpu_type).set_accelerator_limit(wanted.gpu)
        kubernetes.add_toleration(task, key=wanted.gpu_type, operator="Exists", effect="NoSchedule")
    if wanted.spot:
        from kfp import kubernetes

        kubernetes.add_node_selector(task, config.spot_key, config.spot_value)
        kubernetes.add_toleration(task, key=config.spot_key, operator="Equal", value=config.spot_value, effect="NoSchedule")
    if wanted.retries:
        task.set_retry(num_retries=wanted.retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
    if launch is not None:
        _launched(task, launch)
    # what is done already is known by fingerprint and survives KFP's own cache, which would not see a live champion
    return task.set_caching_options(False)


def _launched(task, launch: LaunchConfig) -> None:  # type: ignore[no-untyped-def]  # as above
    """Tells a task which Ray job does its work, which run it is in, and which pod it is."""
    from kfp import kubernetes

    task.set_env_variable(LAUNCH_VARIABLE, launch.model_dump_json(exclude_defaults=True))
    for name, field in (
        (RUN_ID_VARIABLE, "metadata.labels['pipeline/runid']"),  # KFP's own label on all pods of a run
        ("CLLMR_POD_NAME", "metadata.name"),
        ("CLLMR_POD_NAMESPACE", "metadata.namespace"),
    ):
        kubernetes.use_field_path_as_env(task, env_name=name, field_path=field)
    if launch.backend == "rayjob" and launch.config_map:
        kubernetes.use_config_map_as_volume(task, config_map_name=launch.config_map, mount_path=launch.templates)
    if launch.backend == "jobs" and launch.token_secret:
        task.set_env_variable("RAY_AUTH_MODE", "token")
        kubernetes.use_secret_as_env(task, secret_name=launch.token_secret, secret_key_to_env={"auth_token": "RAY_AUTH_TOKEN"})
