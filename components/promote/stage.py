"""The promote stage: a challenger becomes the champion when it passes the gate; the verdict is always written."""

from pathlib import Path
from typing import Any

from components.artifacts import Manifest, Store, read_json, write_json
from components.progress import emit
from components.promote.config import PromoteConfig
from components.registry import (
    ModelVersion,
    Registry,
    RegistryError,
    StateChanged,
    default_tracking_uri,
    registered_root,
)
from components.stages import Stage, failure_told, fingerprint, is_asked_again, run_stage
from components.tracking import open_run

STAGE = Stage("promote", version=2)

JUDGEMENTS = 5
"""How often a challenger is judged while others keep changing the champion."""


class Decision(PromoteConfig):
    """What decides the outcome beside the inputs: not settings, but the state of the registry at that moment.

    It is part of the stage's identity, so that the decision is made again when another champion stands there, and is the same
    decision, found and reused, when nothing has changed.
    """

    champion: str = ""
    """Fingerprint of the champion that the challenger has to beat; empty: none."""
    withdrawn: bool = False
    """Whether a rollback took the challenger out of service."""


def run(config: dict[str, Any], storage_root: str, train: Manifest, evaluate: Manifest) -> Manifest:
    """Judges the bundle of `train` by its evaluation, and moves the registry's aliases when it wins.

    Writes verdict.json: {verdict, reasons: [...], challenger, champion (the version to serve now, or null), primary_metric}.

    Raises:
        ConfigError: a setting is unknown or not allowed.
        RegistryError: the model registry cannot be reached, or its champion changes whenever the challenger has been judged. A
            tracker that is down only gives a warning.
        ArtifactError: the evaluation is damaged. A damaged bundle only fails its check.
    """
    settings = PromoteConfig.parse(config, "promote")
    registry = Registry(default_tracking_uri(storage_root, settings.tracking_uri), settings.model_name)
    for _ in range(JUDGEMENTS):
        try:
            return _run(settings, registry, storage_root, train, evaluate)
        except StateChanged:
            message = "the champion changed while the challenger was judged: that judgement does not count"
            emit("warning", stage=STAGE.name, message=message)
    with failure_told(STAGE):
        raise RegistryError(
            f"model '{settings.model_name}' got another champion all {JUDGEMENTS} times that the challenger was judged.",
            "Run the stage again when fewer runs promote at once.",
        )


def _run(settings: PromoteConfig, registry: Registry, storage_root: str, train: Manifest, evaluate: Manifest) -> Manifest:
    """Judges the challenger against the champion of this moment; raises StateChanged when that is another one at the end."""
    champion, known = registry.champion(), registry.find(train.fingerprint)
    parents = {"train": train, "evaluate": evaluate}
    decision = _decision(settings, champion, known, train, Store(storage_root), parents)

    def is_live(manifest: Manifest) -> bool:
        """Whether the registry still serves what this verdict said, from there; if not, the verdict is made again."""
        current = registry.champion()
        now = (current.fingerprint, current.storage_root) if current else (None, None)
        return (manifest.facts["champion"], manifest.facts["champion_root"]) == now and not _has_moved(current, train, settings)

    def build(built: Path) -> dict[str, Any]:
        outcome = decide(settings, registry, champion, known, train, evaluate)
        write_json(built / "verdict.json", outcome)
        return _facts(outcome)

    return run_stage(STAGE, decision, storage_root, parents, build, is_live)


def decide(
    settings: PromoteConfig,
    registry: Registry,
    champion: ModelVersion | None,
    known: ModelVersion | None,
    train: Manifest,
    evaluate: Manifest,
) -> dict[str, Any]:
    """Runs the gate, notes the run, registers the challenger and moves the alias; returns the contents of verdict.json.

    Where the challenger is the champion, and lies elsewhere than the registry says, its place is brought up to date.

    Args:
        settings: of this stage.
        registry: of the models.
        champion: the version served now.
        known: the challenger's own version, when it was registered before.
        train: manifest of the challenger.
        evaluate: manifest of its evaluation.

    Raises:
        StateChanged: the challenger has won, but not over the model that is champion by now.
    """
    from components.promote import gate  # numpy and its kin: not for a verdict that is reused

    checks = gate.run_checks(settings, train, evaluate, champion, known.withdrawn_at if known else "")
    is_champion = champion is not None and champion.fingerprint == train.fingerprint
    outcome = gate.verdict(checks, is_champion)
    is_whole = next(check.passed for check in checks if check.check == "bundle")
    if is_whole and not is_champion:  # a broken bundle is not registered: nobody should be able to promote it by hand
        run_id = _track(registry, train, evaluate)
        figures = {name: value for name, value in evaluate.facts.items() if isinstance(value, float)}
        tags = {"evaluate": evaluate.fingerprint, "ingest": evaluate.parents["ingest"]}
        registry.register(train.fingerprint, train.storage_root, _bundle_path(train), figures, tags, run_id)
    if is_whole and _has_moved(champion, train, settings):
        champion = registry.relocate(train.fingerprint, train.storage_root, _bundle_path(train))
    if outcome == "promoted":
        champion = registry.promote(train.fingerprint, over=champion.fingerprint if champion else "")
    if is_champion and not all(check.passed for check in checks):
        failed = ", ".join(check.check for check in checks if not check.passed)
        emit("warning", stage=STAGE.name, message=f"the champion itself no longer passes: {failed}")
    return {
        "verdict": outcome,
        "reasons": gate.as_json(checks),
        "challenger": train.fingerprint,
        "champion": _described(champion),
        "primary_metric": settings.primary_metric,
        "model_name": settings.model_name,
    }


def _decision(
    settings: PromoteConfig,
    champion: ModelVersion | None,
    known: ModelVersion | None,
    train: Manifest,
    store: Store,
    parents: dict[str, Manifest],
) -> Decision:
    """The state that this run decides in.

    Where the challenger is the champion because this stage promoted it, that very decision is found again; where it is the
    champion for another reason (by hand, or judged with other settings), is to be judged again or has moved since, it stands
    against itself: ``unchanged``.
    """
    values = settings.model_dump()
    against = champion.fingerprint if champion else ""
    withdrawn = bool(known and known.withdrawn_at)
    if known and against == train.fingerprint and known.promoted_over is not None and not is_asked_again(STAGE.name):
        earlier = Decision(**values, champion=known.promoted_over)
        inputs = {name: parent.fingerprint for name, parent in parents.items()}
        made = store.find(STAGE.name, fingerprint(STAGE, earlier.identity(), inputs))
        if made is not None and made.facts["verdict"] == "promoted":
            was_there = made.facts["champion_root"] == known.storage_root
            if was_there and not _has_moved(champion, train, settings):
                return earlier
    return Decision(**values, champion=against, withdrawn=withdrawn)


def _has_moved(champion: ModelVersion | None, train: Manifest, settings: PromoteConfig) -> bool:
    """Whether the champion is this bundle, and was built again, or its storage root renamed or mounted elsewhere, since it was
    registered.

    Of roots only where the registry lies in one: any other may be right, and name a place that is not seen from here.
    """
    if champion is None or champion.fingerprint != train.fingerprint:
        return False
    if champion.storage_root == registered_root(train.storage_root):
        return champion.bundle != _bundle_path(train)
    return not settings.tracking_uri


def _track(registry: Registry, train: Manifest, evaluate: Manifest) -> str | None:
    """Notes settings, learning curve and figures of the challenger; the run's id, None when the tracker is down."""
    figures = {name: value for name, value in evaluate.facts.items() if isinstance(value, int | float)}
    curve = read_json(train.path() / "curve.json")
    with open_run(registry.tracking_uri, registry.model_name, train.fingerprint, stage=STAGE.name) as run:
        run.params({"train": train.config, "evaluate": evaluate.config})
        run.curve(curve)
        run.metrics(figures)
        run.metrics({"train.seconds": train.seconds, "train.peak_memory_mb": train.peak_memory_mb})
        return run.run_id


def _bundle_path(train: Manifest) -> str:
    return f"{train.place}/bundle"


def _described(champion: ModelVersion | None) -> dict[str, Any] | None:
    if champion is None:
        return None
    return {
        "version": champion.version,
        "fingerprint": champion.fingerprint,
        "storage_root": champion.storage_root,
        "bundle": champion.bundle,
        "bundle_uri": champion.bundle_uri,
        "metrics": champion.metrics,
    }


def _facts(outcome: dict[str, Any]) -> dict[str, Any]:
    champion = outcome["champion"]
    return {
        "verdict": outcome["verdict"],
        "challenger": outcome["challenger"],
        "champion": champion["fingerprint"] if champion else None,
        "champion_root": champion["storage_root"] if champion else None,
        "champion_version": champion["version"] if champion else None,
        "failed": [reason["check"] for reason in outcome["reasons"] if not reason["passed"]],
    }
