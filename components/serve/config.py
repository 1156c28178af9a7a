"""Settings of the serve stage and of the endpoint it configures."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.artifacts import StageConfig
from serving import RATE


class ReplicaConfig(BaseModel):
    """How many processes run one deployment, and how much each takes on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_replicas: int = Field(default=1, ge=1, le=1_000)
    """Processes of this deployment; at least 2 where an answer must survive the loss of a node."""
    max_replicas: int | None = Field(default=None, ge=1, le=1_000)
    """Processes at most, where ``num_replicas`` are the fewest: more are started within seconds once requests wait, and ended
    after ten quiet minutes. None: always ``num_replicas``."""
    num_cpus: float = Field(default=0.5, gt=0, le=256)
    """CPUs Ray reserves per replica: a scheduling share, no limit on threads."""
    max_ongoing_requests: int = Field(default=256, ge=1, le=10_000)
    """Requests one replica works on at a time."""
    max_queued_requests: int = Field(default=128, ge=-1, le=100_000)
    """Requests that wait in front of this deployment before more are refused with 503; -1 is unbounded."""

    @model_validator(mode="after")
    def _most_not_below_fewest(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is less than num_replicas = {self.num_replicas}")
        return self


class GatewayConfig(ReplicaConfig):
    """Likewise, of the deployment that speaks HTTP."""

    max_ongoing_requests: int = Field(default=64, ge=1, le=10_000)
    """Requests one gateway works on at a time. It refuses more with 503 and Retry-After, so this is the longest queue: who is
    let in waits for so many requests at most, which takes this number divided by a gateway's answers a second. With 64 a burst
    is answered late rather than refused. Choose fewer, such as 8, where a late answer is worth no more than none
    (``tests/benchmarks/RESULTS.md`` has what an overload makes of a limit)."""


class TrialConfig(BaseModel):
    """What is done with the registry's challenger, beside the champion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["off", "canary", "shadow"] = "off"
    """``canary``: it answers a share of the users; ``shadow``: it answers nobody, and its rankings for that share are compared.
    The challenger is the model that was registered last, whether or not the gate kept it back."""
    share: float = Field(default=0.0, ge=0, le=1)
    """Of the users, chosen by a hash of their ids, 0 to 1."""


class ScoringConfig(BaseModel):
    """How a scorer keeps item vectors and looks for the best; all options are measured when a bundle is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item_storage: Literal["float32", "float16", "int8"] = "float32"
    """Of the item vectors in memory: float16 takes half, int8 a quarter, and scores are off by a little."""
    ann_above: int | None = Field(default=None, ge=1)
    """Number of items from which on an approximate index answers instead of a look at every item (needs the extra ``ann``);
    None: never."""
    ann_index: Literal["cells", "hnsw"] = "cells"
    """Kind of that index: ``cells`` (an inverted file) is trained in seconds, ``hnsw`` (a graph) takes ten times as long."""
    ann_recall: float = Field(default=0.95, gt=0, lt=1)
    """Share of the twenty best items that the index, and lists, must have on users of the bundle, else every item is looked
    at."""
    lists: bool = False
    """Whether rankings that ``cllmr batch`` made with the model that is served are looked up instead of computed; each scorer
    holds them, 8 bytes per user and place."""


class ServeConfig(StageConfig):
    """The HTTP endpoint."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address the CLI's endpoint listens on; 0.0.0.0 opens it to the network. Without effect on the written configuration."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port of the CLI's endpoint; 0 picks a free one. Without effect on the written configuration."""
    composition: Literal["apart", "together"] = "apart"
    """``apart``: scorers are processes of their own and scale by themselves; ``together``: each gateway holds the model, which
    takes half to a third of the CPU per request, and the memory of one model per gateway."""
    gateway: GatewayConfig = GatewayConfig()
    """The deployment that speaks HTTP: checks requests, looks up features, writes answers."""
    scorer: ReplicaConfig = ReplicaConfig()
    """The deployment that holds the model and ranks; without effect where the gateway does."""
    trial: TrialConfig = TrialConfig()
    """A challenger on trial. A deployed endpoint takes another setting without a restart: its Scorer's ``user_config``."""
    scoring: ScoringConfig = ScoringConfig()
    """How it keeps item vectors and looks through them."""
    rate_limit: str | None = Field(default=None, pattern=RATE)
    """Requests that each gateway replica takes from one caller, a token or without tokens an address, such as "50/second"; more
    are refused with 429 and Retry-After; null: any number."""
    feature_deadline_ms: int = Field(default=200, ge=1, le=60_000)
    """How long a request waits for the feature store, milliseconds; after that it is answered without, and says so."""
    feature_loading_s: int = Field(default=30, ge=0, le=600)
    """How long a starting replica waits for the feature store's client before it takes requests without it, seconds."""
    poll_interval_s: float = Field(default=2.0, ge=0, le=600)
    """How often a replica asks the model registry for the champion, to serve it without a restart, seconds; 0: never, the
    model that is deployed is served until another one is."""

    def identity(self) -> dict[str, Any]:
        """All but host and port, which are no part of what the stage writes."""
        return self.model_dump(mode="json", exclude={"host", "port"})
