"""Redis as the manifests configure it, on loopback. Feast on it and on PostgreSQL: `integration/test_everything_at_once.py`."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.k8s.manifests import Object, needs_kubectl, overlay, redis_config
from tests.stores import PASSWORD, needs_redis, redis_server

pytestmark = [needs_kubectl, needs_redis]


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return overlay("dev")


@pytest.fixture(scope="module")
def redis_address(objects: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that runs from the manifest's own configuration; only its folders are others here."""
    directory = tmp_path_factory.mktemp("redis")
    with redis_server(directory, redis_config(objects, directory, PASSWORD)) as address:
        yield address


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
