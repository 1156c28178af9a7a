"""What is set of an endpoint, by the serve stage and in the Serve configuration file that it writes."""

import hashlib
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from components.cllmr.linear.compact import ItemStorage

IndexKind = Literal["cells", "hnsw"]


class Replica(BaseModel):
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


class Gateway(Replica):
    """Likewise, of the deployment that speaks HTTP."""

    max_ongoing_requests: int = Field(default=64, ge=1, le=10_000)
    """Requests one gateway works on at a time; it refuses more with 503 and Retry-After. So many are let in of a burst, which
    is answered late rather than refused. While some are refused, a gateway lets in only as many others as it keeps up with
    (``serving/room.py``; ``tests/benchmarks/RESULTS.md`` has what that makes of an overload)."""


class Scoring(BaseModel):
    """How a scorer keeps item vectors and looks for the best; all options are measured when a bundle is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item_storage: ItemStorage = "float32"
    """Of the item vectors in memory: float16 takes half, int8 a quarter, and scores are off by a little."""
    ann_above: int | None = Field(default=None, ge=1)
    """Number of items from which on an approximate index answers instead of a look at every item (needs the extra ``ann``);
    None: never. A request with another debias strength, an allow list, a filter that leaves out more than a thousand items,
    `compare` or items of just now is answered exactly all the same; so are all where item vectors are compact and the bundle's
    strength is neither 0 nor 1, as two matrices are scored then."""
    ann_index: IndexKind = "cells"
    """Kind of that index: ``cells`` (an inverted file) is trained in seconds; ``hnsw`` (a graph) takes ten times as long and is
    worth a try where factors have more structure than those that we measured, on which it found no more for the same time."""
    ann_recall: float = Field(default=0.95, gt=0, lt=1)
    """Share of the twenty best items that the index, and lists, must have on users of the bundle, else every item is looked
    at."""
    lists: bool = False
    """Whether rankings that ``cllmr batch`` made with the model that is served are looked up instead of computed; each scorer
    holds them, 8 bytes per user and place. Requests that an index does not answer, that want seen items too, or more of them
    than a list holds, are answered exactly."""


class Trial(BaseModel):
    """What is done with the registry's challenger, beside the champion: the model that was registered last, whether or not the
    gate kept it back. A running endpoint takes another setting without a restart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["off", "canary", "shadow"] = "off"
    """``canary``: the challenger answers a share of the users; ``shadow``: the champion answers all, and for that share the
    challenger's rankings are compared with its own. Either needs the memory of two models."""
    share: float = Field(default=0.0, ge=0, le=1)
    """Of the users, chosen by a hash of their ids, 0 to 1."""

    @field_validator("mode", mode="before")
    @classmethod
    def _written_bare(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # as YAML reads it

    def needs(self) -> bool:
        """Whether a challenger is to be loaded."""
        return self.mode != "off" and self.share > 0

    def holds(self, user_id: str, challenger: str) -> bool:
        """Whether a user belongs to the share for the challenger with this fingerprint."""
        return place(user_id, challenger) < self.share


def place(user_id: str, challenger: str) -> float:
    """Where a user stands in [0, 1) when a challenger is tried: evenly spread, and another place for another challenger."""
    digest = hashlib.sha256(f"{challenger}\n{user_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64
