"""Builds the images and runs them with podman: built with pip's settings of this machine, run as the manifests run them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import REPOSITORY
from tests.k8s.manifests import K8S

DOCKERFILE = K8S / "images" / "Dockerfile"
BOOTSTRAP = K8S / "images" / "bootstrap.sh"
CUDA = "llm"
"""The image with CUDA's build of torch: not one of the CPU, which may lie beside pip here and fits none of the rest."""


def find_base() -> str | None:
    """The base image: the one that CLLMR_IMAGE_BASE names, else what `make image-base` has made, if it has."""
    if shutil.which("podman") is None:
        return None
    (made,) = re.findall(r"^image=(\S+)$", BOOTSTRAP.read_text(encoding="utf-8"), flags=re.MULTILINE)
    exists = _podman("image", "exists", made).returncode == 0
    return os.environ.get("CLLMR_IMAGE_BASE", made if exists else None)


@dataclass(frozen=True)
class Image:
    """A built image."""

    tag: str

    def run(self, *command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a command without root, capabilities, network, or anything to write to but /tmp; `folder` is its /work."""
        hardened = ["--network", "none", "--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
        room = ["--memory", "3g", "--shm-size", "512m", "--tmpfs", "/tmp:rw,size=1g,mode=1777"]
        mounted = [] if folder is None else ["-v", f"{folder}:/work:ro"]
        return _podman("run", "--rm", "--no-healthcheck", *hardened, *room, *mounted, self.tag, *command)


def build(target: str, base: str) -> Image:
    """Builds a target of the Dockerfile; what has not changed since is not built again."""
    tag = f"localhost/cllmr-{target}:under-test"
    more = shlex.split(os.environ.get("CLLMR_IMAGE_BUILD_ARGS", ""))
    with _pip_of_this_machine(without=("find-links",) if target == CUDA else ()) as settings:
        command = ["build", "--format", "docker", "--network", "host", "--build-arg", f"BASE={base}", *settings, *more]
        built = _podman(*command, "--target", target, "-t", tag, "-f", str(DOCKERFILE), str(REPOSITORY))
    if built.returncode != 0:
        raise AssertionError(f"podman build --target {target} failed:\n{built.stdout[-1000:]}\n{built.stderr[-3000:]}")
    return Image(tag)


@contextmanager
def _pip_of_this_machine(without: Collection[str]) -> Iterator[list[str]]:
    """Arguments of `podman build` by which pip finds what it finds here, torch as well: this machine may reach no other."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pairs = [line.split("=", 1) for line in listed.stdout.splitlines()]
    named = {name.rsplit(".", 1)[-1]: value.strip("'") for name, value in pairs}
    settings = {name: value for name, value in named.items() if name not in without}
    places = {Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()}
    # the pages of an index on disk point to files beside it
    mounts = {place.parent if place.name == "simple" else place for place in places if place.is_absolute() and place.exists()}
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        file.flush()
        volumes = [f"{file.name}:/etc/pip.conf:ro", *(f"{place}:{place}:ro" for place in sorted(mounts))]
        index = settings.get("index-url", "https://pypi.org/simple")
        yield ["--build-arg", f"TORCH_INDEX={index}", *(word for volume in volumes for word in ("-v", volume))]


def _podman(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"CONTAINERS_CONF": str(K8S / "images" / "containers.conf"), **os.environ}
    with tempfile.TemporaryDirectory() as folder:  # where it notes that a container ran out of memory
        return subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False, env=environment, cwd=folder)
