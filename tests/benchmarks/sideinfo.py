"""Our client against a raw load of the same requests on the same vLLM: ``python -m tests.benchmarks.sideinfo [--model DIR]``.

Starts a server in the environment that ``make llm`` makes (without --model with tiny random weights; ``--base-url`` names one
that runs), sends the same bodies with as many in flight, by backend 'openai' and by bare httpx coroutines, in turns, and prints
tokens per second and the share of prompt tokens that the server's prefix cache had. Rows differ between rounds, so that only
the shared beginning is cached.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from rich.console import Console

from components.sideinfo.backends import Decoding, Request, Space
from components.sideinfo.openai import OpenAIBackend, request_body
from components.sideinfo.prompts import load
from components.sideinfo.schema import json_schema
from tests.vllm_server import NAME, VLLMServer, make_model, vllm_server

TAGS = ["Comedy", "Drama", "Horror"]
TIMEOUT = 600.0


def requests_of(space: Space, round_: str, count: int) -> list[Request]:
    """As many rows, of one round."""
    lines = "Title: Film {row} of {round}\nRelease year: 1995\nGenres: Comedy, Drama"
    return [space.request(f"<data>\n{lines.format(row=row, round=round_)}\n</data>") for row in range(count)]


async def raw(base_url: str, requests: Sequence[Request], decoding: Decoding, concurrency: int) -> int:
    """Tokens written; nothing is checked, tried again or kept."""
    waiting = iter(requests)
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=httpx.Limits(max_connections=concurrency)) as client:

        async def work() -> int:
            tokens = 0
            for request in waiting:
                answer = await client.post(f"{base_url}/chat/completions", json=request_body(request, decoding))
                tokens += answer.json()["usage"]["completion_tokens"]
            return tokens

        return sum(await asyncio.gather(*(work() for _ in range(concurrency))))


def ours(base_url: str, requests: Sequence[Request], decoding: Decoding, concurrency: int) -> int:
    """Tokens written, by the backend."""
    answers = list(OpenAIBackend(base_url, None, concurrency, TIMEOUT, 1, TIMEOUT).answers(requests, decoding))
    assert not any(answer.error for answer in answers)
    return sum(answer.tokens_out for answer in answers)


def measure(server: VLLMServer, model: str, rows: int, rounds: int, concurrency: int) -> None:
    """Prints one line a round, and the medians."""
    console = Console(width=140)
    decoding = Decoding(model, 96, 0.0, 0, json_schema(TAGS, 12))
    space = Space(load("item", "English", 12, TAGS), decoding)
    ours(server.base_url, requests_of(space, "warm-up", concurrency), decoding, concurrency)
    before = {name: server.metric(f"vllm:prefix_cache_{name}_total") for name in ("hits", "queries")}
    rates: dict[str, list[float]] = {"raw": [], "ours": []}
    for round_ in range(rounds):
        for name in sorted(rates, reverse=bool(round_ % 2)):  # each is first as often as second
            asked = requests_of(space, f"{name} {round_}", rows)
            started = time.perf_counter()
            if name == "raw":
                tokens = asyncio.run(raw(server.base_url, asked, decoding, concurrency))
            else:
                tokens = ours(server.base_url, asked, decoding, concurrency)
            rates[name].append(tokens / (time.perf_counter() - started))
        console.print(f"round {round_}: raw {rates['raw'][-1]:.1f}, ours {rates['ours'][-1]:.1f} tokens/s")
    gained = {name: server.metric(f"vllm:prefix_cache_{name}_total") - value for name, value in before.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [one / other for one, other in zip(rates["ours"], rates["raw"], strict=True)]
    console.print(f"median: raw {medians['raw']:.1f}, ours {medians['ours']:.1f} tokens/s")
    console.print(f"ours / raw: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    console.print(f"prompt tokens that the prefix cache had: {gained['hits'] / gained['queries']:.1%}")


def main() -> None:
    """Starts a server or takes one that runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of the weights; none: tiny ones are made")
    parser.add_argument("--base-url", help="of a vLLM server that runs, up to and with /v1")
    parser.add_argument("--name", default=NAME, help="what that server calls the model")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--concurrency", type=int, default=16)
    asked = parser.parse_args()
    load_ = (asked.rows, asked.rounds, asked.concurrency)
    if asked.base_url:
        measure(VLLMServer(asked.base_url), asked.name, *load_)
        return
    with tempfile.TemporaryDirectory() as directory:
        model = asked.model or make_model("tiny", Path(directory) / "model")
        with vllm_server(model, Path(directory) / "log.txt") as server:
            measure(server, NAME, *load_)


if __name__ == "__main__":
    main()
