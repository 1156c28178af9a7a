"""The stores as the manifests configure them, on loopback: Redis from its redis.conf, PostgreSQL with its databases, and Feast
from its feature_store.yaml by the very command of the job `materialise`."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.manifests import REPOSITORY, Object, declared_secrets, named, needs_kubectl, overlay

POSTGRES_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
PASSWORD = "correct-horse-battery"  # only of servers that live for these tests

pytestmark = [
    needs_kubectl,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: redis-server)"),
    pytest.mark.skipif(not POSTGRES_PROGRAMS, reason="PostgreSQL is not installed (Debian: postgresql)"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not answer within 30 s")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return overlay("dev")


def config_of(objects: list[Object], name: str, key: str) -> str:
    """A file of a ConfigMap, whose name may carry a hash."""
    (found,) = [
        item["data"][key]
        for item in objects
        if item["kind"] == "ConfigMap" and item["metadata"]["name"].startswith(name) and key in item["data"]
    ]
    return str(found)


@pytest.fixture(scope="module")
def redis_address(objects: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that runs from the manifest's own configuration; only its folders are others here."""
    directory, port = tmp_path_factory.mktemp("redis"), free_port()
    auth = declared_secrets()["feature-redis"]["auth.conf"].replace("REPLACE-ME", PASSWORD)
    (directory / "auth.conf").write_text(auth)
    config = config_of(objects, "feature-redis", "redis.conf")
    for there, here in (("/etc/redis-auth/", f"{directory}/"), ("dir /data", f"dir {directory}")):
        assert there in config
        config = config.replace(there, here)
    (directory / "redis.conf").write_text(config)
    process = subprocess.Popen(
        ["redis-server", str(directory / "redis.conf"), "--port", str(port), "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL
    )
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "redis-server")
        yield f"127.0.0.1:{port},password={PASSWORD}"
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(scope="module")
def postgres_uri(objects: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL with the databases that the manifest makes, as a URI of the form that the Secret has."""
    import psycopg

    programs, port = POSTGRES_PROGRAMS[0], free_port()
    directory = Path("/tmp") / f"postgres-{os.getpid()}"  # its user must be able to walk there
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # it refuses to run as root
    (directory / "password").write_text(PASSWORD)
    make = ["initdb", "-D", str(directory / "data"), "-U", "postgres", "--auth=scram-sha-256", "--no-sync"]
    subprocess.run(
        [*as_user, str(programs / make[0]), *make[1:], f"--pwfile={directory}/password"], check=True, capture_output=True
    )
    listen = ["-D", str(directory / "data"), "-p", str(port), "-h", "127.0.0.1", "-k", str(directory)]
    process = subprocess.Popen([*as_user, str(programs / "postgres"), *listen], stderr=subprocess.DEVNULL)
    address = f"postgres:{PASSWORD}@127.0.0.1:{port}"
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "postgres")
        with psycopg.connect(f"postgresql://{address}/postgres", autocommit=True) as connection:
            for statement in config_of(objects, "postgres", "databases.sql").split(";"):
                connection.execute(statement.encode())
        secret = declared_secrets()["postgres"]["feast-uri"]
        yield secret.replace("postgres:REPLACE-ME@postgres:5432", address)
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(directory, ignore_errors=True)


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


def materialise_command(objects: list[Object], store_file: Path) -> list[str]:
    """The command of the job's container `catalogue`, with its paths here."""
    pod = named(objects, "CronJob", "materialise")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    command = [str(part) for part in pod["initContainers"][0]["command"]]
    assert command[0] == "feast"
    here = {"/app/feature_repo": str(REPOSITORY / "feature_repo"), "/etc/feast/feature_store.yaml": str(store_file)}
    return [str(Path(sys.executable).with_name("feast")), *(here.get(part, part) for part in command[1:])]


def test_feast_registers_in_postgres_and_serves_from_redis(
    objects: list[Object], redis_address: str, postgres_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_file = tmp_path / "feature_store.yaml"
    store_file.write_text(config_of(objects, "feast", "feature_store.yaml"))
    monkeypatch.setenv("FEAST_REGISTRY", postgres_uri)
    monkeypatch.setenv("CLLMR_ONLINE_STORE", redis_address)
    command = materialise_command(objects, store_file)
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
