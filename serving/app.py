"""The endpoint as a Ray Serve application: ``import_path: serving.app:build_app`` in a Serve configuration file."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from serving import RATE
from serving.deployments import EncoderReplica, GatewayReplica, HistoryReplica, RegistryReplica, ScorerReplica
from serving.lifecycle import Target
from serving.room import FEWEST
from serving.settings import Gateway, Replica, Scoring, Trial

IMPORT_PATH = "serving.app:build_app"
GATEWAY, SCORER = "Gateway", "Scorer"
UPSCALE_SECONDS = 3.0
DOWNSCALE_SECONDS = 600.0
TARGET_ONGOING = 8.0
"""Requests that a replica works on at a time, above which there should be more replicas."""


def target_ongoing(replicas: Replica) -> float:
    """A quarter of what a replica works on at a time is what it is meant to have: from there to the limit requests wait for
    those before them."""
    return min(TARGET_ONGOING, replicas.max_ongoing_requests / 4)


def options(replicas: Replica, drain_interval_s: float) -> dict[str, Any]:
    """The settings of a deployment as Ray Serve names them.

    With `max_replicas`, replicas are added within seconds and taken away after ten minutes: a replica too many costs less
    than a queue.
    """
    scaling: dict[str, Any] = {"num_replicas": replicas.num_replicas}
    if replicas.max_replicas is not None:
        autoscaling = {
            "min_replicas": replicas.num_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": target_ongoing(replicas),
            "upscale_delay_s": UPSCALE_SECONDS,
            "downscale_delay_s": DOWNSCALE_SECONDS,
        }
        scaling = {"autoscaling_config": autoscaling}
    return {
        **scaling,
        "max_ongoing_requests": replicas.max_ongoing_requests,
        "max_queued_requests": replicas.max_queued_requests,
        "ray_actor_options": {"num_cpus": replicas.num_cpus},
        "logging_config": {"enable_access_log": False},  # the gateway writes a line per request, and of more use
        "graceful_shutdown_wait_loop_s": drain_interval_s,
    }


HEADROOM = 8
"""How many times the requests that a gateway works on reach it: the rest it refuses itself, at once and with Retry-After, where
Serve's proxy would ask again with growing pauses, and then refuse without."""


def fewest_working(gateway: Gateway) -> int:
    """Requests that a gateway works on however many it refuses. With `max_replicas` clearly more than it is meant to have: by
    what is in work Serve knows that there should be more gateways."""
    return FEWEST if gateway.max_replicas is None else math.ceil(1.5 * target_ongoing(gateway))


REGISTRY = Replica(num_cpus=0.1, max_ongoing_requests=1_000, max_queued_requests=-1)
"""The one replica that asks the registry; while it is away, models stay as they are."""

HISTORY = Replica(num_cpus=0.04, max_ongoing_requests=64)
"""The one replica that writes the online history; while it is away, events are refused with 503."""


ENCODER = Replica(num_cpus=0.04, max_ongoing_requests=4, max_queued_requests=16)
"""The one replica that reads the texts of new items, there while they are asked for; when it is busy they are refused."""


class RegistryArgs(BaseModel):
    """The model registry whose champion is followed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tracking_uri: str
    """Of MLflow, without a password: a configuration file is no secret."""
    model_name: str
    poll_interval_s: float = Field(default=2.0, gt=0, le=600)
    """How often each scorer replica asks for the champion, a quarter more or less."""


class AppArgs(BaseModel):
    """Arguments of the application: the ``args`` of the Serve configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    storage_root: str
    """Where artifacts live: a path or URI that every replica can read."""
    train: str
    """Fingerprint of the train artifact whose bundle is served."""
    features: str | None = None
    """Fingerprint of the feature set the bundle was trained on; None: no feature store."""
    model_version: str
    """What the registry calls the bundle."""
    registry: RegistryArgs | None = None
    """The bundle above is served while this registry has no other champion or cannot be asked; None: it alone is served."""
    bundle_dir: Path | None = None
    """A bundle outside the store, used instead of the train artifact's."""
    drain_interval_s: float = Field(default=2.0, gt=0)
    """How often a stopping replica looks whether its last requests are answered, seconds; it waits once at least."""
    rate_limit: str | None = Field(default=None, pattern=RATE)
    """Requests that each gateway replica takes from one caller, a token or without tokens an address; None: any number."""
    feature_deadline_ms: int = Field(default=200, ge=1)
    """How long a request waits for the feature store."""
    feature_loading_s: int = Field(default=30, ge=0)
    """How long a starting gateway waits for the feature store."""
    composition: Literal["apart", "together"] = "apart"
    """Whether scorers are processes of their own, or each gateway holds the model itself."""
    gateway: Gateway = Gateway()
    """Replicas that speak HTTP."""
    scorer: Replica = Replica()
    """Replicas that hold the model, where they are apart."""
    scoring: Scoring = Scoring()
    """How they keep item vectors and look through them."""


def build_app(args: AppArgs) -> Application:
    """The application of a Serve configuration file, whose ``user_config`` of the Scorer says what is tried: see Trial."""
    return application(args, Trial())


def application(args: AppArgs, trial: Trial) -> Application:
    """The application: a gateway bound to a scorer, which is bound to a replica that asks the registry, and to those that write
    the online history and encode texts."""
    registry, poll_interval_s = None, 0.0
    if args.registry is not None:
        poll_interval_s = args.registry.poll_interval_s
        registry = serve.deployment(name="Registry", **options(REGISTRY, args.drain_interval_s))(RegistryReplica).bind(
            tracking_uri=args.registry.tracking_uri, model_name=args.registry.model_name, max_age_s=poll_interval_s / 2
        )
    history = None
    if args.features is not None:
        history = serve.deployment(name="History", **options(HISTORY, args.drain_interval_s))(HistoryReplica).bind(
            storage_root=args.storage_root, feature_fingerprint=args.features
        )
    encoder = options(ENCODER, args.drain_interval_s)
    del encoder["num_replicas"]
    encoder["autoscaling_config"] = {"min_replicas": 0, "max_replicas": 1, "upscale_delay_s": 0, "downscale_delay_s": 1800}
    bundle_dir = None if args.bundle_dir is None else str(args.bundle_dir)
    scorer: Any = {
        "deployed": Target(args.model_version, args.train, args.storage_root, bundle_dir),
        "registry": registry,
        "poll_interval_s": poll_interval_s,
        "scoring": args.scoring,
    }
    tried = {"user_config": trial.model_dump()}
    gateway = options(args.gateway, args.drain_interval_s)
    gateway["max_ongoing_requests"] *= HEADROOM
    if args.composition == "together":
        gateway |= tried
    else:
        apart = options(args.scorer, args.drain_interval_s) | tried
        scorer = serve.deployment(name=SCORER, **apart)(ScorerReplica).bind(**scorer)
    return serve.deployment(name=GATEWAY, **gateway)(GatewayReplica).bind(
        scorer,
        storage_root=args.storage_root,
        feature_fingerprint=args.features,
        deployed_version=args.model_version,
        most_working=args.gateway.max_ongoing_requests,
        fewest_working=fewest_working(args.gateway),
        rate_limit=args.rate_limit,
        feature_deadline_ms=args.feature_deadline_ms,
        feature_loading_s=args.feature_loading_s,
        history=history,
        encoder=serve.deployment(name="Encoder", **encoder)(EncoderReplica).bind(),
    )
