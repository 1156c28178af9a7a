"""Heavy work goes to Ray through this file; the work itself never knows where it runs.

Here: a Ray of its own inside the calling process, or the running cluster that ``RAY_ADDRESS`` names.
"""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

OBJECT_STORE_BYTES = 100 * 2**20  # what passes through it is small; Ray's minimum is 75 MiB


def prepare_ray_environment() -> None:
    """Sets what Ray's processes inherit; before Ray is imported. What the user has set is left alone."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_COLOR_PREFIX": "0",
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",  # several processes share the cores: threads of each would only fight
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Ray listens on the machine's address, so its token authentication stays on (ray.init enables it unless RAY_AUTH_MODE says
    # otherwise; setting that variable here would be too late where Ray is imported already). A token that lives as long as
    # this process keeps Ray from writing one into the home directory.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def start_local_ray(num_cpus: int, num_gpus: int = 0) -> None:
    """Starts a small Ray in this process, unless one runs already.

    Args:
        num_cpus: cores to schedule on; a promise between tasks, not a limit on threads.
        num_gpus: GPUs to schedule on.
    """
    prepare_ray_environment()
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


@contextmanager
def ray_session(num_cpus: int, num_gpus: int = 0) -> Iterator[None]:
    """Ray for the length of a block: the cluster at ``RAY_ADDRESS`` if that is set, else a local one of this size."""
    prepare_ray_environment()
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR)
    else:
        start_local_ray(num_cpus, num_gpus)
    try:
        yield
    finally:
        ray.shutdown()
