"""The model that is champion: where it is registered, what it answers, and the endpoint that serves it.

What is heavy is imported when it is needed, so that the command line's help comes at once.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.errors import ArtifactError, StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from components.registry import ModelVersion, Registry
    from pipelines.config import PlatformConfig
    from pipelines.local import PlatformRun
    from serving.client import Client
    from serving.features import HistoryReader
    from serving.recommender import Recommender


def registry(settings: "PlatformConfig") -> "Registry":
    """The model registry of these settings.

    Raises:
        ConfigError: see `default_tracking_uri`.
        StorageError: it would lie in a directory that does not exist or cannot be looked at.
    """
    from components.registry import Registry, default_tracking_uri
    from pipelines.local import absolute_root

    root = absolute_root(settings.storage_root)
    if not settings.promote.tracking_uri and "://" not in root:
        try:
            there = Path(root).is_dir()
        except OSError as error:  # no permission, or too long a name
            raise StorageError(f"'{root}' cannot be read: {error.strerror}.", "Check --storage.") from None
        if not there:
            raise StorageError(f"there is no storage directory '{root}'.", "Check --storage, or make a model there: cllmr run")
    uri = default_tracking_uri(root, settings.promote.tracking_uri)
    return Registry(uri, settings.promote.model_name)


def the_champion(settings: "PlatformConfig") -> "ModelVersion":
    """The registry's champion; raises ArtifactError when there is none."""
    champion = registry(settings).champion()
    if champion is None:
        raise ArtifactError(f"no model is champion below '{settings.storage_root}'.", "Make one: cllmr run")
    return champion


def champion_recommender(settings: "PlatformConfig") -> "tuple[Recommender, HistoryReader]":
    """What answers as the endpoint would, and the histories it would see; raises ArtifactError for a damaged bundle."""
    from serving.attributes import Attributes
    from serving.bundle import find_bundle
    from serving.features import Histories, open_history_reader
    from serving.recommender import Recommender
    from serving.scorer import Scorer
    from serving.texts import Texts, read_newcomers

    champion = the_champion(settings)
    bundle = find_bundle(champion.storage_root, champion.fingerprint)
    scorer = Scorer.load(bundle)
    attributes, newcomers = Attributes.read(bundle, scorer.num_items), read_newcomers(bundle, scorer)
    recommender = Recommender(scorer, champion.version, Texts(bundle, scorer), attributes=attributes, newcomers=newcomers)
    fingerprint = scorer.bundle.get("feature_fingerprint")
    if fingerprint is None:
        return recommender, lambda user_ids: Histories([[] for _ in user_ids])
    return recommender, open_history_reader(champion.storage_root, fingerprint)


@contextmanager
def champion_endpoint(settings: "PlatformConfig") -> Iterator[str]:
    """The endpoint for whatever is champion now, also after a promotion or rollback by hand; yields its URL."""
    from tempfile import TemporaryDirectory

    import yaml

    from components.progress import configure_logging
    from components.serve.stage import check_bundle, serve_document
    from serving.run import running_endpoint

    configure_logging()
    champion = the_champion(settings)
    _, feature_fingerprint = check_bundle(champion.storage_root, champion.fingerprint)
    served = {name: getattr(champion, name) for name in ("version", "fingerprint", "storage_root", "bundle")}
    models = registry(settings)
    document = serve_document(settings.serve, served, feature_fingerprint, models.tracking_uri, models.model_name)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        with running_endpoint(file, settings.serve.host, settings.serve.port) as url:
            yield url


def asked_of_the_endpoint(
    settings: "PlatformConfig", run: "PlatformRun", example: Callable[[], tuple[str, list[str]]], progress: "Console"
) -> tuple[str, list[str], dict[str, Any]]:
    """Starts the endpoint for the run's champion, asks it for one user, shuts it down: the user, their titles, the answer."""
    from components.progress import configure_logging
    from serving.run import running_endpoint

    configure_logging()
    progress.print("starting the endpoint to ask it one question", soft_wrap=True)
    config = run.manifest("serve").path() / "serve.yaml"
    with ThreadPoolExecutor(1) as meanwhile:
        chosen = meanwhile.submit(example)  # takes a second or two, which the endpoint needs to start anyway
        # port 0: beside an endpoint that may be up on its own port
        with (
            running_endpoint(config, settings.serve.host, port=0, follows=False) as url,
            endpoint(url) as client,
        ):
            user_id, titles = chosen.result()
            return user_id, titles, client.recommend([user_id], k=10, compare=True).model_dump(mode="json")


def endpoint(url: str) -> "Client":
    """A client of an endpoint, with the token of the environment."""
    from serving.client import Client

    return Client(url, token=os.environ.get("CLLMR_TOKEN"))
