"""Reads the training features through Feast, in vocabulary order."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from components.artifacts import Manifest
from components.errors import ArtifactError
from components.features.repository import ENTITIES_DIRECTORY, quiet_feast
from components.features.tables import EVENT_TIMESTAMP
from components.ids import ITEM_ID, USER_ID
from feature_repo.store import feature_refs, open_store

if TYPE_CHECKING:
    from feast import FeatureStore

Floats = npt.NDArray[np.float32]

SERVICE = "training"


@dataclass(frozen=True)
class TrainingFeatures:
    """Features of all users and items; row r is the entity of vocabulary row r."""

    item_embeddings: Floats
    """(num_items, dim), embeddings of `item_profiles`, L2-normalised."""
    user_embeddings: Floats
    """(num_users, dim)."""
    user_introductions: Floats
    """(num_users, dim), of the users' own text columns alone: zeros where there is none; dim is 0 where nobody has any."""
    item_spectrum: Floats
    """(num_items, q), scaled spectrum of the training matrix (CLLMR, E1-E3)."""
    user_spectrum: Floats
    """(num_users, q)."""
    item_profiles: list[str]
    """The text of every item that was embedded, empty where there is none."""


def training_features(manifest: Manifest) -> TrainingFeatures:
    """The features of the ``training`` service, as of the feature set's snapshot.

    Only the offline tables are read, so no online store has to be up.

    Args:
        manifest: the features stage's manifest.

    Raises:
        ArtifactError: an entity did not come back from Feast, or its vectors differ in length.
    """
    directory = manifest.path()
    store = open_store(directory, manifest.storage_root, online=False)
    snapshot = datetime.fromisoformat(manifest.facts["snapshot"])
    items = _entity_features(store, directory, "items", ITEM_ID, snapshot)
    users = _entity_features(store, directory, "users", USER_ID, snapshot)
    return TrainingFeatures(
        item_embeddings=_matrix(items, "item_side_information__embedding"),
        user_embeddings=_matrix(users, "user_side_information__embedding"),
        user_introductions=_matrix(users, "user_side_information__introduction"),
        item_spectrum=_matrix(items, "item_spectrum__spectrum"),
        user_spectrum=_matrix(users, "user_spectrum__spectrum"),
        item_profiles=items["item_side_information__profile"].to_list(),
    )


def _entity_features(store: "FeatureStore", directory: Path, name: str, key: str, snapshot: datetime) -> pd.DataFrame:
    """One row per entity in vocabulary order, indexed by id, columns ``view__feature``."""
    ids = pq.read_table(directory / ENTITIES_DIRECTORY / f"{name}.parquet", columns=[key])[key].to_pylist()
    entities = pd.DataFrame({key: ids, EVENT_TIMESTAMP: pd.Timestamp(snapshot)})
    with quiet_feast():
        retrieved = store.get_historical_features(
            entities, features=feature_refs(store, SERVICE, key), full_feature_names=True
        ).to_df()
    text = {column: "" for column in retrieved if str(column).endswith("__profile")}  # no profile is no missing feature
    return in_vocabulary_order(retrieved.drop(columns=EVENT_TIMESTAMP).fillna(text).set_index(key), ids, name)


def in_vocabulary_order(retrieved: pd.DataFrame, ids: list[str], name: str) -> pd.DataFrame:
    """`retrieved`, which Feast returns in any order and with gaps for what it did not find, as one full row per id.

    Args:
        retrieved: features indexed by id.
        ids: the vocabulary.
        name: ``users`` or ``items``, for the message.

    Raises ArtifactError naming the ids without features.
    """
    complete = retrieved[~retrieved.index.duplicated()].reindex(ids)
    missing = complete.index[complete.isna().any(axis=1)].tolist()
    if missing or len(retrieved) != len(ids):
        named = ", ".join(f"'{raw_id}'" for raw_id in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ArtifactError(
            f"Feast returned {len(retrieved)} rows for {len(ids)} {name}; {len(missing)} lack features"
            + (f": {named}." if missing else "."),
            "Build the feature set again: cllmr run --from features",
        )
    return complete


def _matrix(features: pd.DataFrame, column: str) -> Floats:
    """A column of equally long vectors as one array."""
    vectors = features[column].to_list()
    lengths = {len(vector) for vector in vectors}
    if len(lengths) > 1:
        raise ArtifactError(
            f"the vectors of {column} have different lengths: {sorted(lengths)}.",
            "Build the feature set again: cllmr run --from features",
        )
    return np.stack(vectors).astype(np.float32, copy=False)
