"""What this machine has and lacks for a run: one check per line, each with its remedy. Nothing heavy is imported."""

import os
import shutil
import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from components.errors import StorageError

DISTRIBUTION = "cllmr-platform"
MIN_PYTHON = (3, 11)
MIN_CORES = 2
MIN_MEMORY_GIB = 3.0
MIN_DISK_GIB = 2.0
MIN_SHARED_MEMORY_GIB = 0.5
_NOT_FOR_A_RUN = frozenset({"all", "dev"})  # extras that are made of others, or serve development
ONLY_WHERE_ASKED = {"llm": "sideinfo.backend=vllm", "ann": "serve.scoring.ann_above"}
"""Extras that no run needs unless a setting asks for them, and the setting."""
_INSTALL = {"llm": "The image llm, or make llm: vLLM needs an environment of its own."}


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    state: Literal["ok", "warning", "problem"]
    seen: str
    fix: str = ""
    """The next action; empty when all is well."""


def examine(storage_root: str, host: str, port: int, needs_sample: bool, asked: Collection[str] = ()) -> list[Check]:
    """Every check, in the order in which problems are best mended.

    Args:
        storage_root: where artifacts will lie.
        host: address the endpoint will listen on.
        port: its TCP port; 0: any.
        needs_sample: whether the run reads the sample data.
        asked: the extras of `ONLY_WHERE_ASKED` that its settings ask for.
    """
    checks: list[Check] = [check_python(), *check_packages(asked), check_cores(), check_memory(), check_storage(storage_root)]
    checks += [check_disk(storage_root), check_shared_memory(), check_port(host, port)]
    return [*checks, check_sample()] if needs_sample else checks


def check_python() -> Check:
    """The interpreter's version."""
    seen = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < MIN_PYTHON:
        return Check("Python", "problem", seen, "Use Python 3.11 or newer: make distclean; make run PYTHON=python3.11")
    return Check("Python", "ok", seen)


def check_packages(asked: Collection[str] = ()) -> Iterator[Check]:
    """For every extra, whether the installed packages satisfy it; versions are read, nothing is imported.

    Args:
        asked: the extras of `ONLY_WHERE_ASKED` that have to be there.
    """
    try:
        required = metadata.requires(DISTRIBUTION) or []
        extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        yield Check("packages", "problem", f"{DISTRIBUTION} is not installed", "pip install -c constraints.txt -e '.[all]'")
        return
    for extra in ["", *(name for name in extras if name not in _NOT_FOR_A_RUN)]:
        lacking = list(_lacking(required, extra))
        label = f"packages: {extra or 'core'}"
        if not lacking:
            yield Check(label, "ok", "all there")
        elif extra in ONLY_WHERE_ASKED and extra not in asked:
            yield Check(label, "ok", f"{'; '.join(lacking)}; only {ONLY_WHERE_ASKED[extra]} needs it")
        else:
            what = f"'.[{extra}]'" if extra else "."
            fix = _INSTALL.get(extra, f"pip install -c constraints.txt -e {what}")
            yield Check(label, "problem", "; ".join(lacking), fix)


def _lacking(required: list[str], extra: str) -> Iterator[str]:
    from packaging.requirements import Requirement

    for requirement in map(Requirement, required):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not applies or requirement.name == DISTRIBUTION or (extra and requirement.marker is None):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield f"{requirement.name} is missing"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version}, wanted {requirement.specifier}"


def check_cores() -> Check:
    """Cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < MIN_CORES:
        return Check(
            "cores", "warning", str(cores), "Two training workers share one core: --set train.num_workers=1 is faster."
        )
    return Check("cores", "ok", str(cores))


def check_memory() -> Check:
    """Memory that is free for a run."""
    available = psutil.virtual_memory().available / 2**30
    if available < MIN_MEMORY_GIB:
        return Check(
            "memory", "warning", f"{available:.1f} GiB free", f"End other programs: about {MIN_MEMORY_GIB:g} GiB are needed."
        )
    return Check("memory", "ok", f"{available:.1f} GiB free")


def check_storage(storage_root: str) -> Check:
    """Whether artifacts can be written."""
    if "://" in storage_root:
        from components.artifacts import Store

        try:
            Store(storage_root).find("ingest", "0" * 16)
        except StorageError as error:
            return Check("storage", "problem", error.message, error.hint)
        return Check("storage", "ok", f"{storage_root} can be read")
    fix = "Choose a directory you can write with --storage."
    root, place = Path(storage_root).absolute(), _existing(Path(storage_root))
    try:
        there = root.exists()
    except OSError as error:  # no permission, or too long a name
        return Check("storage", "problem", f"{root} cannot be read: {error.strerror}", fix)
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Check("storage", "problem", f"{place} cannot be written", fix)
    return Check("storage", "ok", f"{root} can be written" if there else f"{root} does not exist yet; a run makes it")


def check_disk(storage_root: str) -> Check:
    """Room for artifacts (for a remote root: for their local copies)."""
    from components.artifacts import cache_home

    place, setting = Path(storage_root), "--storage"
    if "://" in storage_root:
        try:
            place, setting = cache_home(), "CLLMR_CACHE"
        except StorageError as error:
            return Check("disk", "problem", error.message, error.hint)
    place = _existing(place)
    free = shutil.disk_usage(place).free / 2**30
    if free < MIN_DISK_GIB:
        fix = f"Make room, or choose another place with {setting}."
        return Check("disk", "warning", f"{free:.1f} GiB free at {place}", fix)
    return Check("disk", "ok", f"{free:.1f} GiB free")


def check_shared_memory() -> Check:
    """Ray keeps objects in shared memory; where it is small Ray falls back to the disk and is slow."""
    path = "/dev/shm"
    if not os.path.isdir(path):
        return Check("shared memory", "ok", "not used on this system")
    total = shutil.disk_usage(path).total / 2**30
    if total < MIN_SHARED_MEMORY_GIB:
        return Check("shared memory", "warning", f"{path} has {total:.2f} GiB", "In a container: docker run --shm-size=1g")
    return Check("shared memory", "ok", f"{path} has {total:.1f} GiB")


def check_port(host: str, port: int) -> Check:
    """Whether the endpoint can listen."""
    if port == 0:
        return Check("port", "ok", "any free one")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            return Check(
                "port", "problem", f"{host}:{port}: {reason}", "Choose another: --set serve.port=8001 (0: any free one)"
            )
    return Check("port", "ok", f"{host}:{port} is free")


def check_sample() -> Check:
    """Whether the package that carries MovieLens-100k is there."""
    try:
        version = metadata.version("recbole")
    except metadata.PackageNotFoundError:
        return Check("sample data", "problem", "recbole 1.2.1 is not installed", "pip install --no-deps recbole==1.2.1")
    return Check("sample data", "ok", f"MovieLens-100k in recbole {version}")


def worst(checks: list[Check]) -> str:
    """``problem`` when there is one, else ``warning`` when there is one, else ``ok``."""
    found = {check.state for check in checks}
    return next((name for name in ("problem", "warning") if name in found), "ok")


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists and can be seen."""
    for place in (path.absolute(), *path.absolute().parents):
        with suppress(OSError):
            if place.exists():
                return place
    raise AssertionError("the root exists")
