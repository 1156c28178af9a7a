"""The stores as the manifests configure them, on loopback: Redis from its redis.conf, PostgreSQL with its databases, and Feast
from its feature_store.yaml by the very command of the job `materialise`."""

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.manifests import Object, config_of, declared_secrets, job_command, needs_kubectl, overlay, redis_config
from tests.stores import PASSWORD, needs_postgres, needs_redis, postgres_server, redis_server

pytestmark = [needs_kubectl, needs_redis, needs_postgres]


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return overlay("dev")


@pytest.fixture(scope="module")
def redis_address(objects: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that runs from the manifest's own configuration; only its folders are others here."""
    directory = tmp_path_factory.mktemp("redis")
    with redis_server(directory, redis_config(objects, directory, PASSWORD)) as address:
        yield address


@pytest.fixture(scope="module")
def postgres_uri(objects: list[Object]) -> Iterator[str]:
    """A PostgreSQL with the databases that the manifest makes, as a URI of the form that the Secret has."""
    with postgres_server(config_of(objects, "postgres", "databases.sql")) as address:
        yield declared_secrets()["postgres"]["feast-uri"].replace("postgres:REPLACE-ME@postgres:5432", address)


def test_redis_takes_the_configuration_and_asks_for_the_password(redis_address: str) -> None:
    from redis import AuthenticationError, Redis

    host, _, port = redis_address.partition(",")[0].partition(":")
    client = Redis(host=host, port=int(port), password=PASSWORD)
    settings: Any = client.config_get("*")
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["appendonly"] == "yes"
    assert int(settings["maxmemory"]) == 768 * 2**20
    with pytest.raises(AuthenticationError, match="Authentication required"):
        Redis(host=host, port=int(port)).ping()


def test_feast_registers_in_postgres_and_serves_from_redis(
    objects: list[Object], redis_address: str, postgres_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_file = tmp_path / "feature_store.yaml"
    store_file.write_text(config_of(objects, "feast", "feature_store.yaml"))
    monkeypatch.setenv("FEAST_REGISTRY", postgres_uri)
    monkeypatch.setenv("CLLMR_ONLINE_STORE", redis_address)
    command = job_command(objects, "catalogue", store_file)
    for _ in range(2):  # every half hour: the second time nothing is to be done
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    import pandas as pd
    from feast import FeatureStore

    store = FeatureStore(fs_yaml_file=store_file)
    assert {view.name for view in store.list_feature_views()} >= {"user_history", "item_counts", "item_side_information"}
    row = {
        "item_id": ["7"],
        "train_interactions": [3],
        "last_train_timestamp": [1_700_000_000],
        "event_timestamp": [datetime.now(UTC)],
    }
    store.write_to_online_store("item_counts", pd.DataFrame(row))
    features = ["item_counts:train_interactions"]
    found = store.get_online_features(features=features, entity_rows=[{"item_id": "7"}, {"item_id": "8"}]).to_dict()
    assert found["train_interactions"] == [3, None]
