"""The sideinfo stage: a profile text for every item and user, and its embedding."""

from pathlib import Path
from typing import Any

from components.artifacts import Manifest, Stage, run_stage
from components.ids import ITEM, ITEM_ID, TRAIN, USER, USER_ID
from components.progress import emit, progress
from components.sideinfo.config import SideinfoConfig

STAGE = Stage("sideinfo", version=1)

EMBEDDINGS_FILE = "embeddings.safetensors"


def run(config: dict[str, Any], storage_root: str, ingest: Manifest) -> Manifest:
    """Writes and embeds the profiles of `ingest`'s users and items, from its training interactions alone.

    Writes items.parquet and users.parquet (row, id, `profile`: text or null) and embeddings.safetensors (`items`
    (num_items, dim), `users` (num_users, dim), float32, rows of length 1, or 0 where there is no profile). Facts of the
    manifest: ``backend``, ``llm`` (whether one was used), ``encoder``, ``dim``, ``items_without_profile``,
    ``users_without_profile``.

    Raises:
        ConfigError: a setting is unknown or not allowed, or the encoder cannot be loaded.
        ArtifactError: the data set is missing or damaged.
    """
    settings = SideinfoConfig.parse(config, STAGE.name)
    return run_stage(STAGE, settings, storage_root, {"ingest": ingest}, lambda built: _build(built, settings, ingest))


def _build(built: Path, config: SideinfoConfig, ingest: Manifest) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    from components.ingest.dataset import Dataset
    from components.sideinfo import encoder
    from components.sideinfo.metadata import MetadataWriter
    from components.sideinfo.profiles import ProfileWriter

    writer: ProfileWriter = MetadataWriter(config.max_words, config.max_user_items, config.seed)
    if not writer.uses_llm:
        emit(
            "warning",
            stage=STAGE.name,
            message=f"no LLM is used: backend '{config.backend}' puts the items' own text and summaries of the users' training "
            "items into sentences; results say nothing about an LLM's knowledge or its bias",
        )
    model = encoder.load(config.encoder)  # before the texts: a wrong name is told at once
    dataset = Dataset.load(ingest.path())
    training = dataset.only(TRAIN)
    items = writer.write_items(training)
    users = writer.write_users(training, items)
    missing = {"items": items.count(None), "users": users.count(None)}
    with progress(STAGE.name, len(items) + len(users) - sum(missing.values()), "texts") as bar:
        arrays = {
            "items": encoder.encode(model, items, config.batch_size, bar.advance),
            "users": encoder.encode(model, users, config.batch_size, bar.advance),
        }
    for kind, count in missing.items():
        if count:
            emit(
                "warning",
                stage=STAGE.name,
                message=f"{count} of {len(arrays[kind])} {kind} have no text: no profile, and a zero embedding",
            )
    save_file(arrays, built / EMBEDDINGS_FILE)
    for name, row, raw_id, frame, profiles in (
        ("items", ITEM, ITEM_ID, dataset.items, items),
        ("users", USER, USER_ID, dataset.users, users),
    ):
        columns = {
            row: pa.array(frame[row].to_numpy(), pa.int32()),
            raw_id: pa.array(frame[raw_id], pa.string()),
            "profile": pa.array(profiles, pa.string()),
        }
        pq.write_table(pa.table(columns), built / f"{name}.parquet")
    return {
        "backend": config.backend,
        "llm": writer.uses_llm,
        "encoder": config.encoder,
        "dim": arrays["items"].shape[1],
        "items_without_profile": missing["items"],
        "users_without_profile": missing["users"],
    }
