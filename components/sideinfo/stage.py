"""The sideinfo stage: a profile text for every item and user, and its embedding."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.artifacts import Manifest
from components.ids import ITEM, ITEM_ID, TRAIN, USER, USER_ID
from components.progress import emit, progress
from components.sideinfo.config import SideinfoConfig
from components.stages import Stage, run_stage

if TYPE_CHECKING:
    import pandas as pd

    from components.ingest.dataset import Dataset
    from components.sideinfo.ondisk import Texts
    from components.sideinfo.profiles import Account, ProfileWriter, Side

STAGE = Stage("sideinfo", version=6)

EMBEDDINGS_FILE = "embeddings.safetensors"
REFERENCES_FILE = "references.parquet"
QUARANTINE_FILE = "quarantine.parquet"
INTRODUCTIONS_FILE = "introductions.parquet"


def run(config: dict[str, Any], storage_root: str, ingest: Manifest) -> Manifest:
    """Writes and embeds the profiles of `ingest`'s users and items, from its training interactions alone.

    Writes items.parquet and users.parquet (row, id, `profile`: text or null), embeddings.safetensors (`items`
    (num_items, dim), `users` (num_users, dim), float16, rows of length 1, or 0 where there is no profile), report.json and
    report.html. Where an LLM writes, the tables also have `tags`, `confidence`, `groups` (names of the references that belong
    to the row) and, with that setting, `own_text`, which is then embedded in front of the profile; quarantine.parquet has the
    rows without a usable answer, and references.parquet (side, group, profile) with `references` (num_references, dim) in
    embeddings.safetensors what was written without evidence. Where users have text columns, introductions.parquet (user_id,
    `profile`: these columns alone, as sentences, or null) with `introductions` (num_users + num_newcomers, dim) has what is
    known of everybody before he does anything: of the users in order, then of those of whom no interaction is left.

    Facts of the manifest: ``backend``, ``llm`` (whether one was used), ``encoder``, ``dim``, ``items_without_profile``,
    ``users_without_profile``, and of an LLM ``model``, ``own_text``, coverage, counts, tokens and cost.

    Raises:
        ConfigError: a setting is unknown or not allowed, or the encoder cannot be loaded.
        ArtifactError: the data set is missing or damaged.
        LLMError: the LLM cannot be used, or too few of its answers can; what it answered is kept for the next run.
    """
    settings = SideinfoConfig.parse(config, STAGE.name)
    return run_stage(
        STAGE, settings, storage_root, {"ingest": ingest}, lambda built: _build(built, settings, storage_root, ingest)
    )


def _build(built: Path, config: SideinfoConfig, storage_root: str, ingest: Manifest) -> dict[str, Any]:
    import pandas as pd
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    from components.ingest.dataset import Dataset, load_newcomers
    from components.sideinfo import encoder, report
    from components.sideinfo.metadata import introductions

    writer = make_writer(config, storage_root)
    _tell_who_writes(writer, config)
    text_encoder = encoder.TextEncoder(config)  # before the texts: a wrong name is told at once
    dataset = Dataset.load(ingest.path())
    training = dataset.only(TRAIN)
    profiles = {"items": (items := writer.write_items(training)), "users": writer.write_users(training, items)}
    references = writer.write_references(training)
    own = _own_texts(config, training) if config.own_text and writer.account is not None else {}
    _write_profiles(built, dataset, training, writer, profiles, own)
    for name, found in profiles.items():
        _tell_of_missing(name, found, own.get(name), writer.account, config)
    introduced = pd.concat([dataset.users.drop(columns=USER), load_newcomers(ingest.path())], ignore_index=True)
    told = introductions(introduced, config.max_words, writer.guarded, dataset.num_users)
    if told.known():
        _write_columns(built / INTRODUCTIONS_FILE, {USER_ID: introduced[USER_ID], encoder.PROFILE: told})
    if writer.account:
        pq.write_table(report.references_table(references), built / REFERENCES_FILE)
        report.write_quarantine(writer.account, built / QUARANTINE_FILE)
    beside = (("introductions", told.known()), ("references", references))
    embedded = [*profiles, *(name for name, any_there in beside if any_there)]
    num_texts = sum(map(_with_either, profiles.values(), (own or profiles).values()))
    num_texts += sum(one.profile is not None for one in references) + told.known()
    with progress(STAGE.name, num_texts, "texts") as bar:
        arrays = encoder.embed(text_encoder, {name: built / f"{name}.parquet" for name in embedded}, bar.advance)
    save_file(arrays, built / EMBEDDINGS_FILE)
    facts = _facts(config, writer.account, profiles, len(references), arrays["items"].shape[1])
    report.write(built, dataset, facts, writer.account, writer.guarded, references, profiles)
    return facts


def _write_profiles(
    built: Path,
    dataset: "Dataset",
    training: "Dataset",
    writer: "ProfileWriter",
    profiles: Mapping[str, "Texts"],
    own: Mapping[str, "Texts"],
) -> None:
    """Writes items.parquet and users.parquet."""
    from components.sideinfo import encoder

    tables: tuple[tuple[str, Side, str, str, pd.DataFrame], ...] = (
        ("items", "item", ITEM, ITEM_ID, dataset.items),
        ("users", "user", USER, USER_ID, dataset.users),
    )
    for name, side, row, raw_id, frame in tables:
        columns: dict[str, Iterable[Any]] = {row: frame[row], raw_id: frame[raw_id], encoder.PROFILE: profiles[name]}
        columns |= {encoder.OWN_TEXT: own[name]} if own else {}
        _write_columns(built / f"{name}.parquet", columns | writer.columns(training, side))


def _facts(
    config: SideinfoConfig, account: "Account | None", profiles: Mapping[str, "Texts"], num_references: int, dim: int
) -> dict[str, Any]:
    without = {f"{name}_without_profile": len(texts) - texts.known() for name, texts in profiles.items()}
    facts = {"backend": config.backend, "llm": account is not None, "encoder": config.encoder, "dim": dim, **without}
    if account is None:
        return facts
    of_llm = {"model": config.model, "own_text": config.own_text, "references": num_references}
    return {**facts, **of_llm, **account.facts(config.price_in, config.price_out)}


def _tell_who_writes(writer: "ProfileWriter", config: SideinfoConfig) -> None:
    """Warns where no LLM is asked."""
    if writer.account is None:
        emit(
            "warning",
            stage=STAGE.name,
            message=f"no LLM is used: backend '{config.backend}' puts the items' own text and summaries of the users' training "
            "items into sentences; results say nothing about an LLM's knowledge or its bias",
        )
    elif config.backend == "replay":
        emit("warning", stage=STAGE.name, message=f"no LLM is asked: the texts are what '{config.model}' has answered before")


def _write_columns(path: Path, columns: Mapping[str, Iterable[Any]]) -> None:
    """A Parquet file of columns, each read once, in the order of the rows."""
    import pyarrow as pa

    from components.sideinfo import report

    types = {ITEM: pa.int32(), USER: pa.int32(), ITEM_ID: pa.string(), USER_ID: pa.string(), **report.PROFILE_TYPES}
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    report.write_table(path, pa.schema({column: types[column] for column in columns}), rows)


def _tell_of_missing(
    name: str, profiles: "Texts", own: "Texts | None", account: "Account | None", config: SideinfoConfig
) -> None:
    """Warns of the rows of a table without a profile: of which an LLM wrote nothing usable, and of which nothing is known."""
    known = account.sides[name]["known"] if account else profiles.known()
    some = (profiles if own is None else own).known()
    learnt = "the model learns what stands for it" if some else "the model does without"
    if failed := known - profiles.known():
        assert account is not None, "without an LLM nothing fails"
        again = "" if config.backend == "replay" else "; `cllmr run --from sideinfo` asks again for what did not come"
        emit(
            "warning",
            stage=STAGE.name,
            message=f"{failed} of {len(profiles)} {name} have no usable answer ({account.sides[name]['why_not']}): see "
            f"{QUARANTINE_FILE}; {learnt if own is None else 'their own text stands alone'}{again}",
        )
    if unknown := len(profiles) - known:
        message = f"{unknown} of {len(profiles)} {name} have no text: no profile; {learnt}"
        emit("warning", stage=STAGE.name, message=message)


def _own_texts(config: SideinfoConfig, training: "Dataset") -> dict[str, "Texts"]:
    """What is known of the rows without an LLM, by name of the table."""
    from components.sideinfo.metadata import MetadataWriter

    writer = MetadataWriter(config.max_words, config.max_user_items, config.seed)
    return {"items": (items := writer.write_items(training)), "users": writer.write_users(training, items)}


def _with_either(profiles: "Texts", own: "Texts") -> int:
    """How many rows have one of the two texts."""
    return sum(profile is not None or text is not None for profile, text in zip(profiles, own, strict=True))


def make_writer(config: SideinfoConfig, storage_root: str) -> "ProfileWriter":
    """Who writes, by ``backend``.

    Raises:
        ConfigError: the key's environment variable is not set, the tokenizer cannot be loaded, or vLLM is not installed.
    """
    from components.sideinfo.metadata import MetadataWriter

    if config.backend == "metadata":
        return MetadataWriter(config.max_words, config.max_user_items, config.seed)

    from components.sideinfo.backends import Backend, Decoding, Replay
    from components.sideinfo.cache import AnswerCache
    from components.sideinfo.llm import LLMWriter
    from components.sideinfo.openai import OpenAIBackend
    from components.sideinfo.tokens import load_tokens

    assert config.model is not None, "the config's validator says so"
    backend: Backend
    if config.backend == "replay":
        backend = Replay(config.replay_missing)
    elif config.backend == "vllm":
        from components.sideinfo.vllm import VLLMBackend

        weights = config.weights or config.model
        backend = VLLMBackend(weights, config.engines, config.gpus_per_engine, config.engine_batch, config.engine_options)
    else:
        assert config.base_url is not None, "the config's validator says so"
        backend = OpenAIBackend(
            config.base_url,
            config.api_key(),
            config.concurrency,
            config.request_timeout,
            config.request_attempts,
            config.server_patience,
        )
    cache = AnswerCache(config.answers_root(storage_root), writable=config.backend != "replay")
    decoding = Decoding(config.model, config.max_tokens, config.temperature, config.seed, None, config.frequency_penalty)
    return LLMWriter(config, backend, cache, load_tokens(config.tokenizer), decoding)
