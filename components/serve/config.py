"""Settings of the serve stage and of the endpoint it configures."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from components.settings import StageConfig
from serving import RATE
from serving.settings import Gateway, Replica, Scoring, Trial


class ServeConfig(StageConfig):
    """The HTTP endpoint."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address the CLI's endpoint listens on; 0.0.0.0 opens it to the network. Without effect on the written configuration."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port of the CLI's endpoint; 0 picks a free one. Without effect on the written configuration."""
    composition: Literal["apart", "together"] = "apart"
    """``apart``: scorers are processes of their own and scale by themselves; ``together``: each gateway holds the model, which
    takes half to a third of the CPU per request, and the memory of one model per gateway."""
    gateway: Gateway = Gateway()
    """The deployment that speaks HTTP: checks requests, looks up features, writes answers."""
    scorer: Replica = Replica()
    """The deployment that holds the model and ranks; without effect where the gateway does."""
    trial: Trial = Trial()
    """A challenger on trial. A deployed endpoint takes another setting without a restart: its Scorer's ``user_config``."""
    scoring: Scoring = Scoring()
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
    model that is deployed is served until another one is, and no challenger is tried."""

    @field_validator("poll_interval_s")
    @classmethod
    def _trial_asks(cls, interval: float, info: ValidationInfo) -> float:
        trial = info.data.get("trial")
        if not interval and trial is not None and trial.mode != "off":
            raise ValueError(
                f"the registry is never asked for the challenger that serve.trial.mode = '{trial.mode}' tries; "
                "set an interval, or serve.trial.mode=off"
            )
        return interval

    def identity(self) -> dict[str, Any]:
        """All but host and port, which are no part of what the stage writes."""
        return self.model_dump(mode="json", exclude={"host", "port"})
