"""Runs the LLM itself: Ray Data streams the requests through vLLM engines, actors that hold the model on their GPUs.

vLLM is in the image and environment `llm` alone, and nothing else imports it. Every call of `answers` starts its engines and
ends them with the last answer, so that GPUs are free while texts are checked and encoded.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from components.errors import ConfigError, LLMError
from components.local_ray import join_ray
from components.sideinfo.backends import MAX_ANSWER_CHARS, Answer, Decoding, Request

if TYPE_CHECKING:
    from ray.data import Dataset

MAX_BLOCK = 512  # requests that Ray Data moves at once

_ENGINE_BATCHES = 8  # in an engine at once, so that it never waits for the last answer of one
_CPU_STEPS = 4  # reading, chat template, tokens there and back: an actor or task each beside the engine


@dataclass(frozen=True)
class VLLMBackend:
    """vLLM engines on Ray; see Backend."""

    weights: str
    """Directory, or name on a hub that the workers reach."""
    engines: tuple[int, int]
    """Actors, least and most; Ray starts more while requests wait and there is room."""
    gpus_per_engine: int
    """Over which the model's tensors are split; 0: vLLM's CPU build."""
    batch_size: int
    """Requests that become answers together."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine."""

    def __post_init__(self) -> None:
        if find_spec("vllm") is None:
            raise ConfigError(
                "setting 'sideinfo.backend' = 'vllm': vLLM is not installed here; it has an environment of its own.",
                "Let the stage run where it is: as a Ray job in the image 'llm' (placement.sideinfo.launch), or in the "
                "environment that 'make llm' makes; or name a server: sideinfo.backend=openai.",
            )

    def answers(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Answer]:
        """See Backend. The requests are read first and held by Ray, which puts on disk what its memory has no room for.

        Answers come a batch at a time; of those that came nothing is lost when this process dies. An engine that dies is
        started again and its batches with it.

        Raises:
            ConfigError: there are fewer GPUs than one engine needs.
            LLMError: the engines do not start, or end for good.
        """
        waiting = iter(requests)
        if (first := next(waiting, None)) is None:
            return
        self._join()
        from ray.exceptions import RayError

        try:
            for row in self._processed(chain([first], waiting), decoding).iter_rows():
                yield answer(row, decoding.max_tokens)
        except RayError as error:
            raise LLMError(
                f"the vLLM engines of '{self.weights}' ended: {_reason(error)}.",
                "Run again: answers that came are kept. If they never start: check sideinfo.weights, and give them memory with "
                "sideinfo.engine_options (gpu_memory_utilization, max_model_len) or sideinfo.gpus_per_engine.",
            ) from error

    def _join(self) -> None:
        """A Ray with room for the engines."""
        least, most = self.engines
        gpus = 0
        if self.gpus_per_engine and not os.environ.get("RAY_ADDRESS"):
            import torch

            gpus = torch.cuda.device_count()
            if gpus < least * self.gpus_per_engine:
                raise ConfigError(
                    f"{least} vLLM engines with sideinfo.gpus_per_engine = {self.gpus_per_engine} each need more than the "
                    f"{gpus} GPUs of this machine.",
                    "Run where there are more, or lower sideinfo.engines or sideinfo.gpus_per_engine (0: vLLM's CPU build).",
                )
        # of a local Ray: room on its own books, so that no engine waits for the steps around it
        join_ray(num_cpus=most * _CPU_STEPS * 2 + _CPU_STEPS, num_gpus=gpus)

    def _processed(self, requests: Iterable[Request], decoding: Decoding) -> "Dataset":
        import pyarrow as pa
        import ray
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        tensor_parallel = max(1, self.gpus_per_engine)
        config = vLLMEngineProcessorConfig(
            model_source=self.weights,
            engine_kwargs={
                "enable_prefix_caching": True,
                "structured_outputs_config": {
                    "backend": "xgrammar",
                    "disable_any_whitespace": True,
                },  # models have gone on with it without end
                **self.options,
                "tensor_parallel_size": tensor_parallel,
            },
            batch_size=self.batch_size,
            max_concurrent_batches=_ENGINE_BATCHES,
            concurrency=self.engines,
            placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": 1 if self.gpus_per_engine else 0}},
            should_continue_on_error=True,
        )
        waiting = ({"key": request.key, "system": request.system, "data": request.data} for request in requests)
        blocks = iter(lambda: list(islice(waiting, min(self.batch_size, MAX_BLOCK))), [])
        refs: list[Any] = [ray.put(pa.Table.from_pylist(block)) for block in blocks]
        sampling = sampling_params(decoding)
        processor = build_processor(
            config,
            preprocess=lambda row: {
                "messages": [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["data"]}],
                "sampling_params": sampling,
            },
            postprocess=lambda row: {name: row[name] for name in ("key", *_COLUMNS)},
        )
        return processor(ray.data.from_arrow_refs(refs))


_COLUMNS = ("generated_text", "num_input_tokens", "num_generated_tokens")


def sampling_params(decoding: Decoding) -> dict[str, Any]:
    """What vLLM calls the ways of decoding."""
    found: dict[str, Any] = {
        name: getattr(decoding, name) for name in ("temperature", "max_tokens", "seed", "frequency_penalty")
    }
    if decoding.schema is not None:
        found["structured_outputs"] = {"json": decoding.schema}
    return found


def answer(row: dict[str, Any], max_tokens: int) -> Answer:
    """An answer out of a row; a row that failed has a message, which may hold the row's text and goes no further."""
    key = str(row["key"])
    if message := row.get("__inference_error__"):
        return Answer(key, "", "", 0, 0, error=f"refused by the engine: {str(message).partition(':')[0]}")
    text, tokens_in, tokens_out = (row[name] for name in _COLUMNS)
    # Ray Data does not hand on why the LLM stopped; one that has written all it may was most likely not at its end
    finish_reason = "length" if tokens_out >= max_tokens else "stop"
    if len(text) > MAX_ANSWER_CHARS:
        text, finish_reason = text[:MAX_ANSWER_CHARS], "oversized"
    return Answer(key, text, finish_reason, int(tokens_in), int(tokens_out))


def _reason(error: Exception) -> str:
    """The last line of an error that has come through several processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
