"""Warm start: training that begins with the ID table of an earlier model, rows joined by raw id.

Nothing may leak. The table has learned from interactions of an earlier day; were one of them held out today, validation and
test would measure memory. So a model remembers every interaction that it or a model it began with has seen, and it is begun
with only where today's held-out interactions are none of them. ``ingest.split.method=stable`` keeps it so for ever: there an
interaction's part depends on nothing but itself. The other splits move some interactions whenever a user has new ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.artifacts import Manifest, Store, read_json
from components.errors import ArtifactError, ConfigError
from components.ids import ITEM_ID, SPLIT, TEST, TRAIN, USER_ID, VALIDATION
from components.progress import emit
from components.stages import failure_told, fingerprint
from components.train.config import CHAMPION, NONE, RegistryConfig, TrainConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from components.ingest.dataset import Dataset
    from components.train.loop import Start

WARM_FILE = "warm_start.safetensors"
"""What a later training needs: the ID table of every run of the graph model by the run's name, (num_nodes, embedding_dim),
users first; and hashes of the interactions seen, `LEARNED` and `CHOSEN`, (any,)."""
LEARNED, CHOSEN = "learned", "chosen"
"""Interactions that weights were fitted to, and those by which models were chosen."""


def resolve(config: Mapping[str, Any], storage_root: str, ingest: Manifest, features: Manifest) -> dict[str, Any]:
    """The train stage's settings with ``warm_start`` decided: a fingerprint, or "none".

    With the data of the champion itself the champion's own beginning is the answer: then nothing has changed and nothing is
    trained, instead of a little further at every run.

    Raises:
        ConfigError: an output that is named by its fingerprint cannot be begun with; the champion that cannot is told of, and
            training begins without it.
        RegistryError: the registry cannot be reached.
    """
    if config.get("warm_start", NONE) == NONE:
        return dict(config)
    from components.train.stage import STAGE

    with failure_told(STAGE):
        settings = TrainConfig.parse(config, STAGE.name)
        start = _start(settings, storage_root, {"ingest": ingest, "features": features})
    return settings.model_copy(update={"warm_start": start, "registry": None}).as_parameter()


def _start(settings: TrainConfig, storage_root: str, parents: Mapping[str, Manifest]) -> str:
    if settings.warm_start != CHAMPION:
        if reason := _reason_against(Store(storage_root).find("train", settings.warm_start), settings, parents["ingest"]):
            raise ConfigError(f"setting 'train.warm_start' = '{settings.warm_start}': {reason}.", f"Set it to {NONE}.")
        return settings.warm_start
    from components.registry import Registry, default_tracking_uri

    where = settings.registry or RegistryConfig()
    champion = Registry(default_tracking_uri(storage_root, where.tracking_uri), where.model_name).champion()
    if champion is None:
        return NONE  # the first run
    found = Store(champion.storage_root).find("train", champion.fingerprint)
    if found is not None and found.parents == _fingerprints(parents):
        return _start_of(found, champion.version, settings, storage_root, parents)
    reason = _reason_against(found, settings, parents["ingest"])
    if found is not None and Store(storage_root).find("train", found.fingerprint) is None:
        reason = f"it lies below another storage root, '{champion.storage_root}'"
    if reason:
        emit("warning", stage="train", message=f"training begins without champion version {champion.version}: {reason}")
        return NONE
    return champion.fingerprint


def _start_of(
    champion: Manifest, version: str, settings: TrainConfig, storage_root: str, parents: Mapping[str, Manifest]
) -> str:
    """What a champion of the same data began with, if a training with these settings can begin with it too."""
    from components.train.stage import STAGE

    begun, store = str(champion.config.get("warm_start", NONE)), Store(storage_root)
    again = settings.model_copy(update={"warm_start": begun}).identity()
    # an output that is there is not trained again, and what it began with may be gone
    if begun == NONE or store.find("train", fingerprint(STAGE, again, _fingerprints(parents))):
        return begun
    if reason := _reason_against(store.find("train", begun), settings, parents["ingest"]):
        said = f"training begins without train/{begun}, with which champion version {version} began: {reason}"
        emit("warning", stage="train", message=said)
        return NONE
    return begun


def _fingerprints(parents: Mapping[str, Manifest]) -> dict[str, str]:
    return {name: parent.fingerprint for name, parent in parents.items()}


def _reason_against(found: Manifest | None, settings: TrainConfig, ingest: Manifest) -> str | None:
    """Why a training on `ingest` cannot begin with an output; None if it can."""
    if found is None:
        return "its output is not in the store any more"
    if WARM_FILE not in found.files:
        return "it has no graph member"
    if found.config["model"] != settings.model.model_dump(mode="json"):
        return "its graph member has other settings (train.model)"
    from components.ingest.dataset import Dataset

    try:
        held_out, learned, held_again = _leaks(_warm_tensors(found), Dataset.load(ingest.path()))
    except ArtifactError as error:
        return error.message.rstrip(".")
    if learned or held_again:
        method = ingest.config["split"]["method"]
        return (
            f"of today's {held_out} held-out interactions it has learned from {learned}, and {held_again} tested today were "
            f"among those by which it was chosen (ingest.split.method is '{method}'; with 'stable' neither happens)"
        )
    return None


def _leaks(warm: "Mapping[str, npt.NDArray[Any]]", dataset: "Dataset") -> tuple[int, int, int]:
    """Held-out interactions; those the table was fitted to; and test interactions by which it was chosen."""
    import numpy as np

    validation, test = hashes(dataset, VALIDATION), hashes(dataset, TEST)
    learned = np.isin(np.concatenate([validation, test]), warm[LEARNED]).sum()
    return len(validation) + len(test), int(learned), int(np.isin(test, warm[CHOSEN]).sum())


def hashes(dataset: "Dataset", split: str) -> "npt.NDArray[np.uint64]":
    """A number per interaction of a split that depends on its two raw ids only."""
    from components.ingest.splits import draws

    chosen = dataset.interactions[dataset.interactions[SPLIT] == split]
    return draws(chosen[USER_ID].to_numpy(object), chosen[ITEM_ID].to_numpy(object), seed=0)


def _warm_tensors(found: Manifest) -> "dict[str, npt.NDArray[Any]]":
    from safetensors.numpy import load_file

    return load_file(found.path() / WARM_FILE)


def starts(config: TrainConfig, storage_root: str, dataset: "Dataset") -> "dict[str, Start]":
    """What each run of the graph model begins with, by the run's name; empty for a cold start.

    Raises ArtifactError when the output to begin with is gone or damaged.
    """
    from components.ids import UNKNOWN, Vocabulary
    from components.train.loop import Start
    from serving.bundle import ITEMS_FILE, USERS_FILE

    assert config.warm_start != CHAMPION, "decided before: see resolve"
    if config.warm_start == NONE:
        return {}
    import numpy as np

    found = _earlier(config, storage_root)
    bundle = found.path() / "bundle"
    users = Vocabulary(read_json(bundle / USERS_FILE))
    items = Vocabulary([item[ITEM_ID] for item in read_json(bundle / ITEMS_FILE)])
    item_rows = items.rows(dataset.items[ITEM_ID])
    # (num_nodes,), rows of their table: users first
    rows = np.concatenate([users.rows(dataset.users[USER_ID]), np.where(item_rows == UNKNOWN, UNKNOWN, item_rows + len(users))])
    known = np.flatnonzero(rows != UNKNOWN)
    tables = {name: table for name, table in _warm_tensors(found).items() if name not in (LEARNED, CHOSEN)}
    return {name: Start(known, table[rows[known]]) for name, table in tables.items()}


def _earlier(config: TrainConfig, storage_root: str) -> Manifest:
    found = Store(storage_root).find("train", config.warm_start)
    if found is None:
        raise ArtifactError(
            f"train/{config.warm_start}, with which training is to begin, is not below '{storage_root}'.",
            f"Set train.warm_start={NONE}.",
        )
    return found


def write(
    file: Path, tables: "Mapping[str, npt.NDArray[np.float32]]", config: TrainConfig, storage_root: str, dataset: "Dataset"
) -> None:
    """Writes `WARM_FILE`: the tables, and what they, and those they began with, have seen."""
    import numpy as np
    from safetensors.numpy import save_file

    seen = {LEARNED: hashes(dataset, TRAIN), CHOSEN: hashes(dataset, VALIDATION)}
    if config.warm_start != NONE:
        before = _warm_tensors(_earlier(config, storage_root))
        seen = {name: np.concatenate([mine, before[name]]) for name, mine in seen.items()}
    unique = {name: np.unique(found) for name, found in seen.items()}
    save_file({**{name: np.ascontiguousarray(table) for name, table in tables.items()}, **unique}, file)
