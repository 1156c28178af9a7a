"""A real vLLM behind OpenAI's protocol, in the environment that ``make llm`` makes, on the CPU and loopback."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests import REPOSITORY
from tests.stores import free_ports
from tests.waiting import wait_until

PYTHON = REPOSITORY / ".venv-llm" / "bin" / "python"
NAME = "tiny"
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 16}
"""Arguments of an engine that is up in seconds and small."""

needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="no environment with vLLM: make llm")

_SECONDS_TO_START = 400.0  # a busy machine's; 20 on a quiet one


def environment() -> dict[str, str]:
    """Variables for processes of that environment: no network, little memory, one thread, and the modules of this checkout."""
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # Ray's 15 starves an engine beside other tests
    }


def make_model(name: str, directory: Path) -> Path:
    """Has that environment write a model; see tests.llm_model."""
    command = [str(PYTHON), "-m", "tests.llm_model", name, str(directory)]
    subprocess.run(command, env=environment(), cwd=REPOSITORY, check=True, capture_output=True, timeout=300)
    return directory


@dataclass
class VLLMServer:
    """What is behind the address."""

    base_url: str

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's values over all label sets that have `labels`."""
        page = httpx.get(self.base_url.removesuffix("/v1") + "/metrics", timeout=60).text
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = (line for line in page.splitlines() if line.split("{")[0].split(" ")[0] == name)
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))


@contextmanager
def vllm_server(model: Path, log: Path, name: str = NAME, options: Sequence[str] = ()) -> Iterator[VLLMServer]:
    """The server for the length of a block; fails with the end of its log when it does not come up."""
    (port,) = free_ports(1)
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}', *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until("vLLM", lambda: _reason_it_is_down(url, process, log), lambda reason: reason is None, _SECONDS_TO_START)
        yield VLLMServer(f"{url}/v1")
    finally:
        process.terminate()  # it ends its engine
        process.wait(timeout=60)


def _reason_it_is_down(url: str, process: "subprocess.Popen[bytes]", log: Path) -> str | None:
    """The end of its log while it starts, None when it is up; fails when it has ended."""
    tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    assert process.poll() is None, f"vLLM ended (exit code {process.poll()}): {tail}"
    try:
        return None if httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK else tail
    except httpx.HTTPError:
        return tail
