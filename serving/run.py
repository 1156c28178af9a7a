"""Runs the endpoint on this machine, from the very configuration file that a cluster gets."""

import errno
import itertools
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from components.errors import ArtifactError, ConfigError, ServingError
from components.local_ray import prepare_ray_environment, start_local_ray
from components.settings import config_error
from serving import APPLICATION
from serving.admission import CALLBACK, CALLBACK_VARIABLE
from serving.bundle import find_bundle
from serving.scorer import Scorer

if TYPE_CHECKING:
    from serving.app import AppArgs

READY_SECONDS = 120.0
DEPLOYED_SECONDS = 300.0  # many times what replicas need on a busy machine

# Ports to choose from. The kernel would choose one (port 0) of those that it gives to outgoing connections too, and such a
# connection may have it before the server listens. Below these are Ray's workers (10002 to 19999), above them what Serve gives
# to replicas (30000 to 31000). In turn from anywhere: two that are asked for before anybody listens are two.
_NUM_PORTS = 10_000
_PORTS = itertools.cycle(random.Random().sample(range(20_000, 20_000 + _NUM_PORTS), _NUM_PORTS))


@contextmanager
def running_endpoint(
    config: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 8000, follows: bool = True
) -> Iterator[str]:
    """The endpoint, ready, while the block runs; yields its base URL, for example ``http://127.0.0.1:8000``.

    Starts a Ray of its own on this machine, unless `prepare_endpoint` did, and ends it with the block. One endpoint per process
    at a time.

    Args:
        config: the serve stage's serve.yaml.
        host: address to listen on.
        port: TCP port; 0 picks a free one.
        follows: whether to follow the registry's champion, where the configuration names a registry.

    Raises:
        ServingError: the port is taken, or the endpoint does not become ready.
        LaunchError: Ray cannot start.
        ArtifactError: the configuration, the bundle or the feature set is missing or damaged.
        ConfigError: the configuration has an argument that is not allowed.
    """
    args = read_app_args(config)
    if not follows:
        args["registry"] = None
    # Here too, though every replica does it: a bad bundle is refused at once, not after a minute of restarted replicas.
    Scorer.load(args.get("bundle_dir") or find_bundle(args["storage_root"], args["train"])).replay_golden()
    server = _server(host, port)
    if server.in_use:
        raise ServingError(f"this process already runs the endpoint at {host}:{server.port}.", "Stop it first.")
    server.in_use = True
    try:
        url = f"http://{_reachable(host)}:{server.started.result()}"
        _deploy(args, read_trial(config))
        wait_until_ready(url)
        yield url
    finally:
        stop_endpoint()


def prepare_endpoint(host: str = "127.0.0.1", port: int = 8000) -> "Future[int]":
    """Begins to start what an endpoint needs before it has a model, Ray and Serve's HTTP proxy; the result is the port.

    That is most of the seconds of a start, and about 1 GiB. It may begin while a pipeline run finds out that nothing has
    changed; `running_endpoint` with the same address then goes on from there. Call `stop_endpoint` if it does not come to that.
    A port that is taken is a ServingError here, at once.
    """
    return _server(host, port).started


def stop_endpoint() -> None:
    """Ends the endpoint and its Ray, if there are any; no process of theirs is left."""
    with _LOCK:
        if _SERVERS:
            _RAY_THREAD.submit(_stop).result()
            _SERVERS.clear()


def read_app_args(config: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of our application in a Serve configuration file; raises ArtifactError when there are none."""
    try:
        tree = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        args = dict(tree["applications"][0]["args"])
        for name in ("storage_root", "train", "model_version"):
            args[name]
    except OSError as error:
        raise ArtifactError(
            f"serving configuration '{config}' cannot be read: {error.strerror or error}.",
            "Check the path, or write it again: cllmr run --from serve",
        ) from None
    except (ValueError, yaml.YAMLError, KeyError, IndexError, TypeError) as error:
        raise ArtifactError(
            f"'{config}' is no serving configuration of this platform: {type(error).__name__} {error}.",
            "Write it again: cllmr run --from serve",
        ) from None
    return args


def read_trial(config: str | os.PathLike[str]) -> dict[str, Any]:
    """What a Serve configuration file says is tried beside the champion; nothing where it does not say."""
    application = yaml.safe_load(Path(config).read_text(encoding="utf-8"))["applications"][0]
    found: dict[str, Any] = next((one.get("user_config", {}) for one in application.get("deployments", [])), {})
    return found


def free_port(host: str, port: int) -> int:
    """`port` if it can be listened on, or a free one for 0; raises ServingError naming it when it is taken."""
    candidates, refusal = [port] if port else itertools.islice(_PORTS, _NUM_PORTS), OSError()
    for candidate in candidates:
        try:
            _bind(host, candidate)
        except OSError as error:
            refusal = error
            if error.errno != errno.EADDRINUSE:
                break
        else:
            return candidate
    raise ServingError(
        f"cannot listen on {host}:{port}: {refusal.strerror or refusal}.",
        f"End the process that uses port {port}, or choose another: --port {port + 1} (--port 0 picks a free one).",
    )


def _bind(host: str, port: int) -> None:
    """Raises OSError when nobody can listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port in TIME_WAIT is free
        probe.bind((host, port))


def wait_until_ready(url: str, seconds: float = READY_SECONDS) -> None:
    """Asks /readyz until it answers 200; raises ServingError after so many seconds."""
    deadline, seen = time.monotonic() + seconds, "no answer"
    while time.monotonic() < deadline:
        try:
            response = httpx.get(f"{url}/readyz", timeout=5.0, trust_env=False)  # on this machine: through no proxy
        except httpx.HTTPError as error:
            seen = type(error).__name__
        else:
            if response.status_code == 200:
                return
            seen = f"status {response.status_code}"
        time.sleep(0.05)
    raise ServingError(f"the endpoint at {url} is not ready after {seconds:g} s ({seen}).", "See Ray's logs in /tmp/ray.")


_LOGICAL_CPUS = 4  # what deployments reserve is a share, not threads: both deployments fit on a small machine
_LOCK = threading.Lock()
# Ray's processes ask the kernel to end them with the thread that started them: this one lives as long as the process.
_RAY_THREAD = ThreadPoolExecutor(1, thread_name_prefix="local-ray")


@dataclass
class _Server:
    """Ray and Serve's proxy in this process."""

    host: str
    port: int
    started: "Future[int]"
    in_use: bool = False


_SERVERS: list[_Server] = []  # at most one


def _server(host: str, port: int) -> _Server:
    """This process's server, begun when there is none; raises ServingError when its address is another or the port is taken."""
    with _LOCK:
        if not _SERVERS:
            port = free_port(host, port)
            _SERVERS.append(_Server(host, port, _RAY_THREAD.submit(_start, host, port)))
        server = _SERVERS[-1]
        if server.host != host or port not in (0, server.port):
            free_port(host, port)  # the likelier mistake, said first
            raise ServingError(f"this process already has an endpoint at {server.host}:{server.port}.", "Stop it first.")
        return server


def _start(host: str, port: int) -> int:
    """Starts Ray and Serve's proxy, and imports the application meanwhile: both take seconds and neither needs the other."""
    prepare_ray_environment()
    os.environ.setdefault("RAY_worker_niceness", "0")  # by Ray's 15 whatever else this machine does comes before an answer
    # gateways that listen themselves linger for load balancers that look seldom, by default 30 s; the one here hears at once
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")
    os.environ.setdefault(CALLBACK_VARIABLE, CALLBACK)
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        for name in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"):  # another endpoint may have Serve's own
            os.environ.setdefault(name, str(free_port("0.0.0.0", 0)))
    imports = threading.Thread(target=_import_app, name="import-app")
    imports.start()
    start_local_ray(num_cpus=_LOGICAL_CPUS)
    imports.join()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # after its import, which sets it to INFO
    from ray import serve

    serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
    return port


def _stop() -> None:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    if ray.is_initialized():
        # Requests in flight are answered, then Ray is ended as a whole: serve.shutdown() before it would take two seconds
        # more and print that its controller was killed.
        try:
            with suppress(RayServeException, TimeoutError):
                serve.delete(APPLICATION)
        finally:
            ray.shutdown()


def _import_app() -> None:
    import serving.app  # noqa: F401


def parse_app_args(args: dict[str, Any]) -> "AppArgs":
    """The application's arguments, checked; raises ConfigError naming a wrong one and the ones there are."""
    from pydantic import ValidationError

    from serving.app import AppArgs

    try:
        return AppArgs.model_validate(args)
    except ValidationError as error:
        problem = config_error(AppArgs, error, "args")
        raise ConfigError(f"in the serving configuration: {problem.message}", problem.hint) from None


def _deploy(args: dict[str, Any], trial: dict[str, Any]) -> None:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from serving.app import application
    from serving.settings import Trial

    # When this endpoint stops nothing routes to it any more, so its replicas need not linger.
    app = application(parse_app_args({**args, "drain_interval_s": 0.2}), Trial.model_validate(trial))
    try:
        # Serve would wait for replicas without end, as long as theirs hang.
        serve.run_many([serve.RunTarget(app, name=APPLICATION, route_prefix="/")], wait_for_applications_running=False)
    except (RuntimeError, RayServeException) as error:
        raise _start_error(str(error)) from error
    _wait_until_deployed(DEPLOYED_SECONDS)


def _wait_until_deployed(seconds: float) -> None:
    """Waits for the application's replicas; raises ServingError when they fail, or are not there after so many seconds."""
    from ray import serve

    deadline = time.monotonic() + seconds
    while (application := serve.status().applications[APPLICATION]).status != "RUNNING":
        if application.status == "DEPLOY_FAILED":
            raise _start_error("\n".join([application.message, *(one.message for one in application.deployments.values())]))
        if time.monotonic() > deadline:
            seen = ", ".join(f"{name} is {one.status.value}" for name, one in application.deployments.items())
            raise ServingError(
                f"the endpoint has not started after {seconds:g} s: {seen}.",
                "See Ray's logs in /tmp/ray/session_latest/logs/serve, and what else this machine does.",
            )
        time.sleep(0.2)  # the controller that is asked is at work on it


def _start_error(message: str) -> ServingError:
    """The cause of a failed deployment as one line: Serve's message carries the replica's traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    cause = next((line for line in reversed(lines) if "Error:" in line), lines[-1] if lines else "no reason was given")
    return ServingError(f"the endpoint cannot start: {cause}", "Mend that, or build the model again: cllmr run --from train")


def _reachable(host: str) -> str:
    """An address a client on this machine can use for a listening address."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
