"""Rankings of batch scoring in a real online store, read back as any reader of Feast would."""

import json
import sqlite3
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from components.artifacts import Manifest
from components.batch import stage
from components.errors import ArtifactError, StorageError
from components.features import stage as features_stage
from feature_repo.store import SHARED_PROJECT, open_shared_store, sqlite_path
from pipelines.cli import app
from serving.events import open_history
from serving.schemas import Event
from tests.bundles import stored_bundle, write_random_bundle
from tests.features_parents import Small

pytestmark = pytest.mark.ray

NUM_USERS, NUM_ITEMS = 25, 40
USERS = [f"u{row}" for row in range(NUM_USERS)]
FIELDS = ("item_ids", "scores", "method", "model_version")


@dataclass(frozen=True)
class World:
    """A storage root with a feature set and a model that was trained on it."""

    root: str
    features: Manifest
    trained: Manifest

    def run(self, **config: Any) -> Manifest:
        return stage.run({"train": self.trained.fingerprint, "users_per_part": 10, "to_feast": True, **config}, self.root)

    def online(self, users: list[str]) -> pd.DataFrame:
        """What Feast has of them; ages as seconds."""
        store = open_shared_store(self.features.path(), self.root)
        refs = [f"user_recommendations:{field}" for field in FIELDS]
        answer = store.get_online_features(features=refs, entity_rows=[{"user_id": user} for user in users])
        written = [stamp.seconds for stamp in answer.proto.results[1].event_timestamps]
        return pd.DataFrame(answer.to_dict()).set_index("user_id").assign(age=time.time() - np.array(written))


def train(root: str, feature_fingerprint: str | None) -> Manifest:
    write = partial(write_random_bundle, num_users=NUM_USERS, num_items=NUM_ITEMS, feature_fingerprint=feature_fingerprint)
    return stored_bundle(root, write, str(feature_fingerprint))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = str(tmp_path_factory.mktemp("store"))
    seen = [(user, user, 1_000_000_000 + user, "train") for user in range(NUM_USERS)]
    items = [f"i{row}" for row in range(NUM_ITEMS)]
    features = features_stage.run({}, root, **Small(root, users=USERS, items=items, events=seen).write().as_arguments())
    return World(root, features, train(root, features.fingerprint))


def same_as_table(world: World, manifest: Manifest) -> None:
    rankings = pq.read_table(manifest.path() / stage.TABLE_DIRECTORY).to_pandas()
    online = world.online(USERS)
    assert list(dict.fromkeys(rankings["user_id"])) == USERS
    for user, rows in rankings.groupby("user_id"):
        assert online.loc[user, "item_ids"] == rows["item_id"].tolist()
        np.testing.assert_array_equal(np.array(online.loc[user, "scores"], dtype=np.float32), rows["score"])
        assert (online.loc[user, "method"], online.loc[user, "model_version"]) == ("personalised", world.trained.fingerprint)
    assert online["age"].between(-1, 300).all()


def test_every_users_ranking_is_in_the_online_store_and_events_stay_beside_it(world: World) -> None:
    history = open_history(world.root, world.features.fingerprint)
    assert history.write([Event(user_id="u3", item_id="i9", timestamp=int(time.time()))]) == ["stored"]
    first = world.run(k=5)
    same_as_table(world, first)
    assert world.online(["nobody"])["item_ids"].tolist() == [None]
    longer = world.run(k=7)
    same_as_table(world, longer)
    assert history.read(["u3"]) == [["i9"]]
    # the table of the first is there already and is not made again, the store gets its rankings all the same
    assert world.run(k=5) == first
    same_as_table(world, first)


def test_the_table_is_the_same_one_with_and_without(world: World) -> None:
    without = world.run(k=6, to_feast=False)
    assert len(world.online(["u1"])["item_ids"].iloc[0]) != 6
    assert world.run(k=6).fingerprint == without.fingerprint
    assert len(world.online(["u1"])["item_ids"].iloc[0]) == 6


def test_a_model_without_features_is_refused_before_anything_is_scored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "score_parts", lambda *_: pytest.fail("scored"))
    without, gone = train(world.root, None), train(world.root, "0" * 16)
    with pytest.raises(ArtifactError, match=r"trained without a feature set.*Leave batch.to_feast out"):
        world.run(train=without.fingerprint)
    with pytest.raises(ArtifactError, match=r"feature set 0{16} is not below"):
        world.run(train=gone.fingerprint)


def test_the_command_writes_them_and_says_what_is_wrong_with_the_store(world: World, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = ["batch", "--model", world.trained.fingerprint, "--to-feast", "--k", "4", "--storage", world.root]
    done = CliRunner().invoke(app, [*command, "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "online store" in done.output
    assert json.loads(file.read_text())["k"] == 4
    assert world.online(USERS)["item_ids"].map(len).unique().tolist() == [4]
    with sqlite3.connect(sqlite_path(world.root, SHARED_PROJECT)) as other:
        other.execute("BEGIN EXCLUSIVE")  # by somebody who never ends
        with pytest.raises(StorageError, match="the online store 'sqlite' cannot be used: database is locked"):
            world.run(k=4)
