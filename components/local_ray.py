"""Ray in the calling process: one of its own, started for it, or the running cluster that ``RAY_ADDRESS`` names.

Ray is imported when it is needed: its processes inherit what is set before.
"""

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from tenacity import RetryCallState, Retrying, stop_after_attempt

from components.errors import LaunchError, first_line
from components.progress import emit

OBJECT_STORE_BYTES = 100 * 2**20  # what passes through it is small; Ray's minimum is 75 MiB

RAY_STARTS = 3
"""How often a local Ray is started before it is given up."""


@contextmanager
def ray_session(num_cpus: int, num_gpus: int = 0) -> Iterator[None]:
    """Ray for the length of a block, joined or started; see `join_ray`."""
    join_ray(num_cpus, num_gpus)
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def join_ray(num_cpus: int, num_gpus: int = 0) -> None:
    """Joins the cluster at ``RAY_ADDRESS`` if that is set, else starts a local Ray of this size; unless one is at hand."""
    prepare_ray_environment()
    import ray

    if not os.environ.get("RAY_ADDRESS"):
        start_local_ray(num_cpus, num_gpus)
    elif not ray.is_initialized():
        ray.init(logging_level=logging.ERROR)


def start_local_ray(num_cpus: int, num_gpus: int = 0) -> None:
    """Starts a small Ray in this process, unless one runs already.

    Args:
        num_cpus: cores to schedule on; a promise between tasks, not a limit on threads.
        num_gpus: GPUs to schedule on.

    Raises:
        LaunchError: it cannot start, though it was tried `RAY_STARTS` times.
    """
    prepare_ray_environment()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process less: this machine is not taken away
    import ray

    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)

    def start() -> None:
        with _ended_unless_whole(Path(ray.__file__).parent):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )

    try:
        # Ray gives its node 30 s to start, which a busy machine may exceed
        Retrying(stop=stop_after_attempt(RAY_STARTS), before_sleep=_tell_of_start, reraise=True)(start)
    except Exception as error:  # of many kinds: Ray's own processes may die of anything, on a machine that is too busy too
        raise LaunchError(
            f"Ray cannot start on this machine: {first_line(error)}.",
            "See the logs in /tmp/ray/session_latest/logs; run: cllmr doctor",
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray's own ends the process with code 15
            signal.signal(signal.SIGTERM, on_sigterm)


def prepare_ray_environment() -> None:
    """Sets what Ray's processes inherit; before Ray is imported. What the user has set is left alone."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_COLOR_PREFIX": "0",
        # as on a cluster: where the size is not set, files of what workers write grow without end
        "RAY_ROTATION_MAX_BYTES": "100000000",
        "RAY_ROTATION_BACKUP_COUNT": "3",
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",  # several processes share the cores: threads of each would only fight
        # seconds that a busy machine may take and that cost an idle one nothing; Ray's own: 30, 5, 30
        "RAY_gcs_server_port_wait_time_s": "120",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "60",
        # seconds between checks, Serve's own: 10; it replaces a proxy that has failed three, and nobody listens meanwhile
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Ray listens on the machine's address, so its token authentication stays on (ray.init enables it unless RAY_AUTH_MODE says
    # otherwise; setting that variable here would be too late where Ray is imported already). A token that lives as long as
    # this process keeps Ray from writing one into the home directory. A cluster that is joined has a token of its own.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ and not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _tell_of_start(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if error is not None:
        emit("warning", message=f"Ray did not start and is started again: {first_line(error)}")


@contextmanager
def _ended_unless_whole(package: Path) -> Iterator[None]:
    """Ends what a start that failed within has left running: only a whole Ray ends its processes itself.

    They are new children of this process that run files of Ray's `package`, and theirs; other threads may have children too.
    """
    before = set(psutil.Process().children())
    try:
        yield
    except BaseException:
        import ray

        ray.shutdown()
        left = []
        for child in set(psutil.Process().children()) - before:
            with suppress(psutil.NoSuchProcess):  # it has ended by itself
                if any(part.startswith(f"{package}/") for part in child.cmdline()):
                    left += [child, *child.children(recursive=True)]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=30)
        raise
