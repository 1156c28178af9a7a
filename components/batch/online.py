"""Rankings in the online store, view ``user_recommendations``: for a reader that asks Feast and no endpoint.

They lie in the project that belongs to no feature set, beside the online history: a user has the ranking that was written last,
whichever model it is of.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from components.artifacts import Manifest, Store, read_json
from components.errors import ArtifactError
from components.features.online import user_errors
from components.ids import USER_ID
from components.progress import progress
from feature_repo.store import open_shared_store

if TYPE_CHECKING:
    import pandas as pd
    from feast import FeatureStore

VIEW = "user_recommendations"


def open_online(trained: Manifest) -> "FeatureStore":
    """The store that rankings go to: of the kind that the model's feature set has. One user is looked up, so that it is known
    to answer.

    Raises:
        ArtifactError: the model has no feature set, or it is gone.
        ConfigError: the online store is not usable with this storage root or environment.
        StorageError: it cannot be reached.
    """
    from serving.bundle import BUNDLE_DIRECTORY, BUNDLE_FILE

    bundle = read_json(trained.path(BUNDLE_DIRECTORY) / BUNDLE_DIRECTORY / BUNDLE_FILE)
    name, root = bundle.get("feature_fingerprint"), trained.storage_root
    if name is None:
        raise ArtifactError(
            f"model {trained.fingerprint} was trained without a feature set, so it has no online store to write to.",
            "Leave batch.to_feast out, or train a model with features: cllmr run",
        )
    if (features := Store(root).find("features", name)) is None:
        raise ArtifactError(f"feature set {name} is not below '{root}'.", "Build it again: cllmr run --from features")
    with user_errors(features.facts["online_store"]):
        store = open_shared_store(features.path(), root)
        store.get_online_features(features=[f"{VIEW}:method"], entity_rows=[{USER_ID: ""}])
    return store


def write_online(store: "FeatureStore", table: Path, num_users: int, model_version: str) -> None:
    """Writes every user's ranking to the online store, file by file; written again, it replaces what was there.

    Args:
        store: see `open_online`.
        table: directory of the rankings' files, see `components.batch.stage.run`.
        num_users: in them.
        model_version: what made them.

    Raises:
        StorageError: it cannot be written.
    """
    from components.features.repository import quiet_feast

    now = datetime.now(UTC)
    with user_errors(store.config.online_store.type), progress("batch", num_users, "users in the online store") as bar:
        for file in sorted(table.glob("part-*.parquet")):
            rows = as_rows(pq.read_table(file), model_version, now)
            if len(rows):
                with quiet_feast():
                    store.write_to_online_store(VIEW, rows)
            bar.advance(len(rows))


def as_rows(rankings: pa.Table, model_version: str, when: datetime) -> "pd.DataFrame":
    """One row of the view per user, from one row per place of his ranking."""
    places = rankings.to_pandas()
    rows: pd.DataFrame = places.groupby(USER_ID, sort=False).agg(
        item_ids=("item_id", list), scores=("score", list), method=("method", "first")
    )
    rows = rows.reset_index()
    rows["model_version"], rows["event_timestamp"] = model_version, when
    return rows
