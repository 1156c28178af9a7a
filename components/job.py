"""A stage's work as a job somewhere else: what it is, where it may run, and what every such place must do."""

import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationInfo, field_validator

LAUNCH_VARIABLE = "CLLMR_LAUNCH"
"""A stage's LaunchConfig as JSON, which the placement puts into its task's environment."""
RUN_ID_VARIABLE = "CLLMR_RUN_ID"
AGAIN_VARIABLE = "CLLMR_AGAIN"
"""Names, with commas between, of the stages that build their output although it is there: those of ``cllmr run --from``."""
REQUEST_VARIABLE = "CLLMR_LAUNCH_REQUEST"
ENTRYPOINT = "python -m components.launch"
TEMPLATES = "/etc/cllmr/rayjobs"
REQUEST_S = (10.0, 30.0)
"""Of a request to a backend: seconds to connect, and to the next byte."""

_LOG_DRAIN_S = 10.0  # to read the rest of a log when its job has ended


class LaunchConfig(BaseModel):
    """Where a stage's work is done. Placement: no part of any fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    backend: Literal["here", "jobs", "rayjob"] = "here"
    """here: in the task itself. jobs: the Jobs API of a Ray cluster that stands. rayjob: a KubeRay RayJob, made for it."""
    address: str | None = Field(default=None, validate_default=True)
    """jobs: URL of the Ray dashboard, for example http://ray-head:8265."""
    token_secret: str | None = None
    """jobs: Kubernetes Secret whose key auth_token holds the Ray cluster's token; none: the cluster asks for none, or the
    environment has RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."""
    templates: str = TEMPLATES
    """rayjob: folder with <stage>.yaml, a RayJob that lacks nothing but its name, what it runs and for how long."""
    config_map: str | None = "cllmr-rayjobs"
    """rayjob: ConfigMap that is mounted there; none: the image has the folder."""
    namespace: str | None = None
    """rayjob: where the RayJob is made; none: where the task runs. In another namespace nothing can own it: where its launcher
    cannot cancel it, it ends after ``orphan_s``."""
    queue_timeout_s: PositiveFloat = 86400.0
    """Seconds a job may wait at a time: queued (suspended by Kueue), or starting its pods."""
    timeout_s: PositiveFloat = 86400.0
    """Seconds a job may run; rayjob: the RayJob's activeDeadlineSeconds too, in which KubeRay counts the start of its pods."""
    resync_s: PositiveFloat = Field(default=30.0, le=300)
    """Seconds after which the state is looked up again, whatever a watch has told; jobs: at most 2."""
    orphan_s: PositiveFloat = 600.0
    """Seconds without a sign of life from its launcher after which a job ends itself, because KFP does not let a terminated
    task end in order (kubeflow/pipelines#7903). More than a launcher takes to be started again."""
    grace_s: PositiveFloat = 20.0
    """Seconds to wait for a cancelled job to be gone; less than the task's own terminationGracePeriodSeconds (30)."""

    @field_validator("address")
    @classmethod
    def _jobs_need_a_cluster(cls, address: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("backend") == "jobs" and not address:
            raise ValueError("the backend 'jobs' needs the URL of a Ray dashboard, for example http://ray-head:8265")
        return address


Phase = Literal["queued", "starting", "running", "succeeded", "failed", "gone"]
ENDED = ("succeeded", "failed", "gone")


@dataclass(frozen=True)
class Seen:
    """How a job stands."""

    phase: Phase
    text: str
    """In its backend's own words: state, reason, message."""


@dataclass(frozen=True)
class Job:
    """A stage's work, to be done somewhere else."""

    name: str
    """Made of run and stage alone."""
    run_id: str
    stage: str
    request: str
    """What the job reads from CLLMR_LAUNCH_REQUEST."""

    def environment(self) -> dict[str, str]:
        """Variables of the job's process. Visible to whoever sees the job: nothing secret."""
        again = {AGAIN_VARIABLE: os.environ[AGAIN_VARIABLE]} if AGAIN_VARIABLE in os.environ else {}
        return {REQUEST_VARIABLE: self.request, RUN_ID_VARIABLE: self.run_id, **again}


class Backend(ABC):
    """A place where jobs run."""

    def __init__(self, job: Job, config: LaunchConfig) -> None:
        self.job, self.config = job, config
        self.last_line = ""
        """The newest line of the job's log."""

    @abstractmethod
    def attach_or_create(self, forget: Callable[[], None], has_error: Callable[[], bool]) -> None:
        """Finds this job, or makes it where there is none or the one that is there did not do its work.

        Args:
            forget: removes what an earlier job has left; called before one is made.
            has_error: whether a job that has ended left an error.
        """

    @abstractmethod
    def look(self, longest_s: Callable[[], float]) -> Iterator[Seen]:
        """How the job stands, at every change and at least every ``resync_s`` (or `longest_s`) seconds; never ends."""

    @contextmanager
    def logs(self) -> Iterator[None]:
        """While open, the job's log goes to standard error; closing waits a moment for the rest of it."""
        stop = threading.Event()
        reader = threading.Thread(target=self._read_logs, args=(stop,), daemon=True, name="job-log")
        reader.start()
        try:
            yield
        finally:
            stop.set()
            reader.join(_LOG_DRAIN_S)

    @abstractmethod
    def _read_logs(self, stop: threading.Event) -> None:
        """Tells the log line by line, in a thread of its own; ends when `stop` is set and the rest has been told."""

    @abstractmethod
    def cancel(self) -> None:
        """Ends the job, if it is there and under way, and waits up to ``grace_s`` until that has happened."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What and where the job is, for messages."""

    @property
    @abstractmethod
    def see(self) -> str:
        """How a person looks at it."""

    def tell(self, line: str) -> None:
        """One line of the job's log."""
        if line.strip():
            self.last_line = line.strip()
        sys.stderr.write(f"{line}\n")
