"""Warm start: what a training begins with, what it gains, and that nothing held out today is in it."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from components.artifacts import Manifest, write_json
from components.cllmr.model import SideInformation
from components.errors import ConfigError
from components.ids import TEST, TRAIN, VALIDATION
from components.ingest import stage as ingest_stage
from components.ingest.dataset import Dataset
from components.registry import Registry, default_tracking_uri
from components.settings import StageConfig
from components.spectrum.decompose import spectrum
from components.stages import Stage, run_stage
from components.train import warm
from components.train.config import TrainConfig
from components.train.graph import as_arrays, trained_here
from components.train.loop import SingleProcess, Start, TrainData, build_model, fit
from components.train.members import RecipeData
from components.train.recipe import fit_recipe
from components.train.stage import STAGE
from components.train.workers import pack, unpack
from tests.behaviour.training import SMALL_RECIPE, small_config, small_data
from tests.planted import World, block_world

PLANTED = block_world(num_blocks=4, users_per_block=20, items_per_block=15, keep=0.9)
MODEL = {"embedding_dim": 8, "num_negatives": 16, "max_aligned_nodes": 32}


class Named(StageConfig):
    """Settings of the stand-ins for other stages."""

    name: str


def write_day(folder: Path, share: float, world: World = PLANTED) -> Path:
    """The first `share` of the world's interactions in some order, and on day one not the last user and item."""
    users, items = world.train
    order = np.random.default_rng(7).permutation(len(users))[: int(share * len(users))]
    table = pd.DataFrame({"user_id": users[order], "item_id": items[order], "rating": 5})
    if share < 1:
        table = table[(table["user_id"] != world.num_users - 1) & (table["item_id"] != world.num_items - 1)]
    file = folder / f"day-{share}.csv"
    table.to_csv(file, index=False)
    return file


@dataclass
class Days:
    """A storage root with the data sets of several days, and an empty registry."""

    root: str
    folder: Path

    def ingest(self, share: float, method: str = "stable") -> Manifest:
        config = {
            "source": "files",
            "interactions": str(write_day(self.folder, share)),
            "k_core": 1,
            "split": {"method": method},
        }
        return ingest_stage.run(config, self.root)

    def features(self, name: str) -> Manifest:
        return run_stage(Stage("features", 1), Named(name=name), self.root, {}, lambda built: {})

    def train(self, ingest: Manifest, warm_start: str = "none", embedding: float = 0.0, graph: bool = True) -> Manifest:
        """What the train stage leaves for a later training, with a table of one number."""
        config = TrainConfig(warm_start=warm_start, model=TrainConfig().model.model_copy(update=MODEL))
        dataset = Dataset.load(ingest.path())

        def build(built: Path) -> dict[str, Any]:
            (built / "bundle").mkdir()
            write_json(built / "bundle" / "users.json", dataset.users["user_id"].tolist())
            write_json(built / "bundle" / "items.json", [{"item_id": one} for one in dataset.items["item_id"]])
            if graph:
                table = np.full((dataset.num_users + dataset.num_items, 8), embedding, dtype=np.float32)
                warm.write(built / warm.WARM_FILE, {"factual": table}, config, self.root, dataset)
            return {}

        parents = {"ingest": ingest, "features": self.features(ingest.fingerprint)}
        return run_stage(STAGE, config, self.root, parents, build)

    def champion(self, trained: Manifest) -> None:
        registry = Registry(default_tracking_uri(self.root), "cllmr")
        registry.register(trained.fingerprint, self.root, f"train/{trained.fingerprint}/bundle", {})
        registry.promote(trained.fingerprint)

    def resolve(self, ingest: Manifest, warm_start: str = "champion", **settings: Any) -> str:
        """What training on a data set begins with."""
        config = {"warm_start": warm_start, "model": MODEL, **settings}
        found = warm.resolve(config, self.root, ingest, self.features(ingest.fingerprint))
        assert found.get("registry", "null") == "null", "an address may hold a password, and the training needs none"
        return str(found["warm_start"])


@pytest.fixture
def days(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Days:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("CLLMR_EVENTS", str(tmp_path / "events.jsonl"))
    return Days(str(tmp_path), tmp_path)


def told(days: Days) -> str:
    path = days.folder / "events.jsonl"
    return path.read_text() if path.exists() else ""


# -- which output a training begins with ------------------------------------------------------------------------------------


def test_the_first_training_is_cold_and_the_next_begins_with_the_champion(days: Days) -> None:
    first = days.ingest(0.7)
    assert days.resolve(first) == "none"
    champion = days.train(first)
    days.champion(champion)
    assert days.resolve(days.ingest(1.0)) == champion.fingerprint
    assert days.resolve(days.ingest(1.0), warm_start="none") == "none"
    assert "begins without" not in told(days)


def test_on_the_data_of_the_champion_it_begins_as_the_champion_did_so_that_nothing_is_trained_again(days: Days) -> None:
    champion = days.train(days.ingest(0.7))
    days.champion(champion)
    second = days.train(days.ingest(1.0), warm_start=champion.fingerprint)
    days.champion(second)
    assert days.resolve(days.ingest(1.0)) == champion.fingerprint
    shutil.rmtree(champion.path())
    assert days.resolve(days.ingest(1.0)) == champion.fingerprint, "nothing is trained, so nothing is begun with"
    assert "begins without" not in told(days)


@pytest.mark.parametrize("gone", [False, True])
def test_on_the_data_of_the_champion_other_settings_begin_as_it_did_only_where_they_can(days: Days, gone: bool) -> None:
    first = days.train(days.ingest(0.7))
    days.champion(days.train(days.ingest(1.0), warm_start=first.fingerprint))
    other: dict[str, Any] = {"learning_rate": 0.5} if gone else {"model": {**MODEL, "embedding_dim": 4}}
    if gone:
        assert days.resolve(days.ingest(1.0), **other) == first.fingerprint
        shutil.rmtree(first.path())
    assert days.resolve(days.ingest(1.0), **other) == "none"
    reason = "its output is not in the store any more" if gone else "its graph member has other settings (train.model)"
    assert f"begins without train/{first.fingerprint}, with which champion version 1 began: {reason}" in told(days)


def test_a_champion_that_has_learned_from_what_is_held_out_today_is_left_aside_and_told_of(days: Days) -> None:
    """The random split moves interactions of a user who has new ones from the training part to the held-out ones."""
    champion = days.train(days.ingest(0.7, "random"))
    days.champion(champion)
    today = days.ingest(1.0, "random")
    train, later = (Dataset.load(one.path()).interactions for one in (days.ingest(0.7, "random"), today))
    pairs = [
        set(zip(part["user_id"], part["item_id"], strict=True))
        for part in (train[train.split == TRAIN], later[later.split != TRAIN])
    ]
    moved = len(pairs[0] & pairs[1])
    assert moved
    assert days.resolve(today) == "none"
    assert f"held-out interactions it has learned from {moved}, and " in told(days)
    assert "training begins without champion version 1" in told(days)
    with pytest.raises(ConfigError, match=rf"'train\.warm_start' = '{champion.fingerprint}': of today's .*'stable' neither"):
        days.resolve(today, warm_start=champion.fingerprint)


def test_what_a_champion_began_with_counts_too(days: Days) -> None:
    """The champion has seen nothing that is held out today, but the model it began with has."""
    tainted = days.train(days.ingest(0.7, "random"))
    stable = days.ingest(0.9)
    clean = days.train(stable)
    heir = days.train(stable, warm_start=tainted.fingerprint, embedding=1.0)
    today = days.ingest(1.0)
    assert days.resolve(today, warm_start=clean.fingerprint) == clean.fingerprint
    with pytest.raises(ConfigError, match=r"held-out interactions it has learned from \d\d+"):
        days.resolve(today, warm_start=heir.fingerprint)


def test_a_test_interaction_by_which_the_champion_was_chosen_counts_and_a_validation_one_does_not(days: Days) -> None:
    ingest = days.ingest(1.0)
    dataset = Dataset.load(ingest.path())
    nothing = np.empty(0, np.uint64)
    parts = {name: warm.hashes(dataset, name) for name in (TRAIN, VALIDATION, TEST)}
    held_out = len(parts[VALIDATION]) + len(parts[TEST])
    for learned, chosen, expected in (
        (parts[TRAIN], parts[VALIDATION], (0, 0)),
        (parts[VALIDATION][:3], nothing, (3, 0)),
        (parts[TEST][:2], nothing, (2, 0)),
        (nothing, parts[TEST][:4], (0, 4)),
    ):
        assert warm._leaks({warm.LEARNED: learned, warm.CHOSEN: chosen}, dataset) == (held_out, *expected)


@pytest.mark.parametrize(
    ("settings", "graph", "reason"),
    [
        ({"model": {**MODEL, "embedding_dim": 16}}, True, "its graph member has other settings (train.model)"),
        ({}, False, "it has no graph member"),
    ],
)
def test_a_champion_of_another_kind_is_left_aside(days: Days, settings: dict[str, Any], graph: bool, reason: str) -> None:
    days.champion(days.train(days.ingest(0.7), graph=graph))
    assert days.resolve(days.ingest(1.0), **settings) == "none"
    assert f"training begins without champion version 1: {reason}" in told(days)


def test_a_champion_that_was_cleaned_away_or_damaged_is_left_aside(days: Days) -> None:
    champion = days.train(days.ingest(0.7))
    days.champion(champion)
    directory = champion.path()
    file = directory / warm.WARM_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert days.resolve(days.ingest(1.0)) == "none"
    assert "is not what its manifest says" in told(days)
    shutil.rmtree(directory)
    assert days.resolve(days.ingest(1.0)) == "none"
    assert "its output is not in the store any more" in told(days)


# -- what it begins with, and what that gains --------------------------------------------------------------------------------


def test_rows_are_joined_by_id_and_new_users_and_items_are_drawn(days: Days) -> None:
    champion = days.train(days.ingest(0.7), embedding=3.0)
    dataset = Dataset.load(days.ingest(1.0).path())
    (start,) = warm.starts(TrainConfig(warm_start=champion.fingerprint), days.root, dataset).values()
    new = {dataset.users.index[dataset.users["user_id"] == str(PLANTED.num_users - 1)][0]}
    new |= {dataset.num_users + dataset.items.index[dataset.items["item_id"] == str(PLANTED.num_items - 1)][0]}
    assert set(range(dataset.num_users + dataset.num_items)) - set(start.rows.tolist()) == new
    data = TrainData(dataset.matrix(TRAIN), dataset.matrix(VALIDATION), None, start)
    config = small_config(effect="none", model={"side_encoder": "none", "counterfactual": False})
    table = build_model(data, config).backbone.embedding.detach().numpy()
    assert (table[start.rows] == 3.0).all()
    assert (np.abs(table[sorted(new)]) < 1.0).all()


def test_what_a_training_begins_with_reaches_the_workers() -> None:
    start = Start(np.array([3, 5]), np.ones((2, 8), dtype=np.float32))
    found = unpack(pack(replace(small_data(), start=start))).start
    assert found is not None
    np.testing.assert_array_equal(found.rows, start.rows)
    np.testing.assert_array_equal(found.values, start.values)
    assert unpack(pack(small_data())).start is None


def test_a_warm_start_reaches_what_the_cold_one_reaches_in_fewer_epochs(days: Days) -> None:
    config = small_config(model={"embedding_dim": 16}, max_epochs=16, seed=1, learning_rate=5e-3)

    def data(share: float) -> TrainData:
        dataset = Dataset.load(days.ingest(share).path())
        train, found = dataset.matrix(TRAIN), spectrum(dataset.matrix(TRAIN), 8)
        world = PLANTED
        users, items = (dataset.users["user_id"].astype(int), dataset.items["item_id"].astype(int))
        text = np.concatenate([world.user_text[users], world.item_text[items]])
        modes = np.concatenate([found.users, found.items]).astype(np.float32)
        return TrainData(train, dataset.matrix(VALIDATION), SideInformation(torch.from_numpy(text), torch.from_numpy(modes)))

    yesterday, today = data(0.8), data(1.0)
    table = as_arrays(*fit(yesterday, config, SingleProcess())).table
    _, cold = fit(today, config, SingleProcess())
    names = [Dataset.load(days.ingest(share).path()) for share in (0.8, 1.0)]
    ids = [[*("u" + one for one in name.users["user_id"]), *("i" + one for one in name.items["item_id"])] for name in names]
    row = {name: place for place, name in enumerate(ids[0])}
    known = [place for place, name in enumerate(ids[1]) if name in row]
    start = Start(np.array(known), table[[row[ids[1][place]] for place in known]])
    _, warmed = fit(replace(today, start=start), config, SingleProcess())
    goal = max(point["ndcg@10"] for point in cold.curve)

    def first(curve: list[dict[str, float]]) -> float:
        return next(point["epoch"] for point in curve if point["ndcg@10"] >= goal)

    assert warmed.curve[0]["epoch"] == 0, "what it begins with is a candidate"
    assert first(warmed.curve) <= first(cold.curve) / 2


def test_the_file_holds_the_tables_and_what_the_lineage_has_seen(days: Days) -> None:
    first = days.train(days.ingest(0.7), embedding=1.0)
    second = days.train(days.ingest(1.0), warm_start=first.fingerprint, embedding=2.0)
    before, after = (load_file(one.path() / warm.WARM_FILE) for one in (first, second))
    assert set(after) == {"factual", warm.LEARNED, warm.CHOSEN}
    for name in (warm.LEARNED, warm.CHOSEN):
        assert np.isin(before[name], after[name]).all()
        assert after[name].dtype == np.uint64


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_users_whom_the_stable_split_leaves_nothing_to_train_on_are_no_obstacle(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = [(user, item) for user in range(120) for item in rng.choice(30, 4, replace=False)]
    file = tmp_path / "clicks.csv"
    pd.DataFrame(pairs, columns=["user_id", "item_id"]).to_csv(file, index=False)
    config = {"source": "files", "interactions": str(file), "k_core": 1, "split": {"method": "stable"}}
    dataset = Dataset.load(ingest_stage.run(config, str(tmp_path)).path())
    train, found = dataset.matrix(TRAIN), spectrum(dataset.matrix(TRAIN), 4)
    without = np.diff(train.indptr) == 0
    assert without.any()
    text = rng.normal(size=(150, 8)).astype(np.float32)
    text[:120][without] = 0.0  # no interaction to summarise
    modes = found.users.astype(np.float32), found.items.astype(np.float32)
    data = RecipeData(train, dataset.matrix(VALIDATION), text[:120], text[120:], *modes)
    fitted = fit_recipe(data, TrainConfig.parse({**SMALL_RECIPE, "max_epochs": 4}, "train"), trained_here())
    assert np.isfinite(fitted.factual.score(np.arange(120))).all()
    assert fitted.validation["ensemble"] > 0
