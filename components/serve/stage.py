"""The serve stage: the champion's configuration file for Ray Serve, checked before anybody deploys it."""

from pathlib import Path
from typing import Any

import yaml

from components.artifacts import Manifest, Store, read_json
from components.errors import ArtifactError
from components.progress import emit
from components.promote.config import PromoteConfig
from components.registry import default_tracking_uri
from components.serve.config import ServeConfig
from components.stages import Stage, run_stage
from serving import APPLICATION

STAGE = Stage("serve", version=4)

CONFIG_FILE = "serve.yaml"
ENDPOINT = "/v1/recommend"


def run(config: dict[str, Any], storage_root: str, features: Manifest, promote: Manifest) -> Manifest:
    """Writes serve.yaml for the model that promote chose, after loading it and replaying its golden requests.

    The champion may be of an earlier run: its own feature set is used, found by the fingerprint in its bundle.

    Facts of the manifest: ``model_version``, ``bundle`` (its URI), ``train``, ``features`` (fingerprints),
    ``golden_requests`` (how many were replayed), ``endpoint`` (path).

    Raises:
        ConfigError: an unknown or wrong setting.
        ArtifactError: there is no champion, or its bundle or feature set is missing or damaged.
    """
    settings = ServeConfig.parse(config, STAGE.name)
    parents = {"features": features, "promote": promote}

    def is_live(manifest: Manifest) -> bool:
        """Whether the champion is where this configuration says: its storage root may have been renamed."""
        champion = read_champion(promote.path() / "verdict.json", storage_root)
        return bool(manifest.facts["bundle"] == _bundle_uri(champion))

    def build(directory: Path) -> dict[str, Any]:
        champion = read_champion(promote.path() / "verdict.json", storage_root)
        golden_requests, feature_fingerprint = check_bundle(champion["storage_root"], champion["fingerprint"])
        document = serve_document(settings, champion, feature_fingerprint, *registry_of(promote, storage_root))
        check_document(document)
        text = yaml.safe_dump(document, sort_keys=False)
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
        return {
            "model_version": champion["version"],
            "bundle": _bundle_uri(champion),
            "train": champion["fingerprint"],
            "features": feature_fingerprint,
            "golden_requests": golden_requests,
            "endpoint": ENDPOINT,
        }

    return run_stage(STAGE, settings, storage_root, parents, build, is_live)


def read_champion(verdict_file: Path, storage_root: str) -> dict[str, str]:
    """The model to serve: version, fingerprint, storage_root (absolute when local), bundle (path below it).

    Raises ArtifactError when the verdict names none.
    """
    verdict = read_json(verdict_file)
    champion = verdict.get("champion")
    if not champion:
        failed = [str(reason.get("text") or reason["check"]) for reason in verdict.get("reasons", []) if not reason["passed"]]
        raise ArtifactError(
            f"there is no model to serve: the challenger was not promoted ({'; '.join(failed) or 'no reason given'}) "
            f"and no champion came before it.",
            "See the evaluation report; then train a better one, or loosen the gate with --set promote.<check>=...",
        )
    root = str(champion.get("storage_root") or storage_root)
    return {
        "version": str(champion["version"]),
        "fingerprint": str(champion["fingerprint"]),
        "storage_root": root if "://" in root else str(Path(root).absolute()),
        "bundle": str(champion["bundle"]),
    }


def _bundle_uri(champion: dict[str, str]) -> str:
    return "/".join([champion["storage_root"].rstrip("/"), champion["bundle"]])


def check_bundle(storage_root: str, fingerprint: str) -> tuple[int, str | None]:
    """Loads a bundle as a replica will: number of golden requests replayed, and the fingerprint of its feature set.

    Raises ArtifactError when the bundle or the feature set is missing or damaged.
    """
    from serving.bundle import find_bundle
    from serving.scorer import Scorer

    scorer = Scorer.load(find_bundle(storage_root, fingerprint))
    golden_requests = scorer.replay_golden()
    feature_fingerprint: str | None = scorer.bundle.get("feature_fingerprint")
    if feature_fingerprint is not None:
        manifest = Store(storage_root).find("features", feature_fingerprint)
        if manifest is None:
            raise ArtifactError(
                f"feature set {feature_fingerprint} of bundle {fingerprint} is not below '{storage_root}'.",
                "Build it again with the settings of that run: cllmr run --from features",
            )
        manifest.path()  # every file is what its manifest says
    return golden_requests, feature_fingerprint


def registry_of(promote: Manifest, storage_root: str) -> tuple[str, str]:
    """Tracking URI and model name that a promote stage wrote to."""
    settings = PromoteConfig.parse({name: promote.config[name] for name in PromoteConfig.model_fields}, "promote")
    return default_tracking_uri(storage_root, settings.tracking_uri), settings.model_name


def serve_document(
    settings: ServeConfig, champion: dict[str, str], feature_fingerprint: str | None, tracking_uri: str, model_name: str
) -> dict[str, Any]:
    """The Ray Serve configuration: one application, whose arguments say which bundle, how many replicas and which registry."""
    from serving.app import GATEWAY, IMPORT_PATH, SCORER, AppArgs, RegistryArgs

    trial = settings.trial
    if (trial.mode == "off") == (trial.share > 0):
        message = (
            f"serve.trial.mode = '{trial.mode}' with serve.trial.share = {trial.share:g} tries nobody: set both, or neither"
        )
        emit("warning", stage=STAGE.name, message=message)
    registry: RegistryArgs | None = None
    if settings.poll_interval_s:
        registry = RegistryArgs(tracking_uri=tracking_uri, model_name=model_name, poll_interval_s=settings.poll_interval_s)
    args = AppArgs(
        storage_root=champion["storage_root"],
        train=champion["fingerprint"],
        features=feature_fingerprint,
        model_version=champion["version"],
        registry=registry,
        rate_limit=settings.rate_limit,
        feature_deadline_ms=settings.feature_deadline_ms,
        feature_loading_s=settings.feature_loading_s,
        composition=settings.composition,
        gateway=settings.gateway,
        scorer=settings.scorer,
        scoring=settings.scoring,
    )
    holds_model = GATEWAY if settings.composition == "together" else SCORER
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": args.model_dump(mode="json", exclude={"bundle_dir"}),
        "deployments": [{"name": holds_model, "user_config": trial.model_dump(mode="json")}],
    }
    return {"applications": [application]}


def check_document(document: dict[str, Any]) -> None:
    """Makes sure that Ray Serve takes the configuration and knows every field of it.

    Ray ignores a field it does not know, so a misspelt one would be lost without a word.

    Raises pydantic.ValidationError or ValueError: the configuration is written by this stage, so that is our mistake.
    """
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    ServeDeploySchema.model_validate(document)
    schemas = [(ServeDeploySchema, document)] + [(ServeApplicationSchema, part) for part in document["applications"]]
    for schema, part in schemas:
        if unknown := set(part) - set(schema.model_fields):
            raise ValueError(f"Ray Serve's {schema.__name__} has no field {', '.join(sorted(unknown))}")
