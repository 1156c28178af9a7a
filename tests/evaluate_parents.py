"""A small world of two blocks as ingest, sideinfo and train write it, for what reads a finished model and its data."""

from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from components.artifacts import Manifest, write_json
from components.ids import TEST, TRAIN, VALIDATION
from components.ingest.dataset import Dataset
from components.settings import StageConfig
from components.stages import Stage, run_stage
from components.train.members import GraphFit
from serving.bundle import BUNDLE_DIRECTORY
from tests.bundles import graph_tensors, write_bundle

NUM_USERS, NUM_ITEMS = 60, 40


class Settings(StageConfig):
    """Of the stand-ins for the stages before."""

    name: str = ""
    backend: str = "metadata"


def world(seed: int = 0) -> pd.DataFrame:
    """Even users like even items and odd users odd ones; a user's 20 liked items are split 12, 4, 4."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(NUM_USERS):
        items = rng.permutation(np.arange(user % 2, NUM_ITEMS, 2))
        rows += [(user, item, split) for item, split in zip(items, [TRAIN] * 12 + [VALIDATION] * 4 + [TEST] * 4, strict=True)]
    table = pd.DataFrame(rows, columns=["user", "item", "split"]).astype({"user": "int32", "item": "int32"})
    table["user_id"], table["item_id"] = "u" + table["user"].astype(str), "i" + table["item"].astype(str)
    table["rating"], table["timestamp"] = np.float32(5), np.int64(880_000_000)
    return table


def ingest(root: str, interactions: pd.DataFrame, name: str = "blocks") -> Manifest:
    def build(built: Path) -> dict:
        interactions.to_parquet(built / "interactions.parquet")
        for kind, count in (("user", NUM_USERS), ("item", NUM_ITEMS)):
            table = pd.DataFrame(
                {kind: np.arange(count, dtype="int32"), f"{kind}_id": [f"{kind[0]}{row}" for row in range(count)]}
            )
            if kind == "item":
                table["title"] = table["item_id"]
            table.to_parquet(built / f"{kind}s.parquet")
        times = {"first": "1997-11-20T00:00:00+00:00", "last": "1998-04-22T00:00:00+00:00"}
        write_json(built / "data_card.json", {"name": name, "time_range": times, "removed_by_reason": {"rating below 4": 7}})
        return {}

    return run_stage(Stage("ingest", 1), Settings(name=name), root, {}, build)


def sideinfo(root: str, data: Manifest, llm: bool = False, profile: str | None = "A wonderful film.") -> Manifest:
    rng = np.random.default_rng(1)

    def build(built: Path) -> dict:
        rows = {
            name: rng.normal(size=(count, 8)).astype(np.float32) for name, count in (("users", NUM_USERS), ("items", NUM_ITEMS))
        }
        unit = {name: values / np.linalg.norm(values, axis=1, keepdims=True) for name, values in rows.items()}
        save_file(unit, built / "embeddings.safetensors")
        write_profiles(built, profile)
        return {"backend": "vllm" if llm else "metadata", "llm": llm, "encoder": "MiniLM", "model": "a-model" if llm else ""}

    return run_stage(Stage("sideinfo", 1), Settings(backend=f"{llm}{profile}"), root, {"ingest": data}, build)


def write_profiles(built: Path, profile: str | None) -> None:
    """The same of every item."""
    pd.DataFrame({"profile": pd.Series([profile] * NUM_ITEMS, dtype="str")}).to_parquet(built / "items.parquet")


MEMBER = {"validation": 0.4321, "weight": 0.75, "l2": 100.0}


def train(
    root: str,
    data: Manifest,
    num_items: int = NUM_ITEMS,
    settings: StageConfig | None = None,
    encoder: str | None = None,
    directory: str = BUNDLE_DIRECTORY,
) -> Manifest:
    """A bundle that knows the blocks, with a gate that favours the first half of the items, in a directory of that name."""

    def build(built: Path) -> dict:
        rng = np.random.default_rng(2)
        seen = Dataset.load(data.path()).matrix(TRAIN)[:, :num_items]
        side = np.stack([np.arange(NUM_USERS) % 2 == 0, np.arange(NUM_USERS) % 2 == 1], axis=1)
        items = np.stack([np.arange(num_items) % 2 == 0, np.arange(num_items) % 2 == 1], axis=1)
        noise = 0.3 * rng.normal(size=(num_items, 2))
        graph = GraphFit(
            users=np.hstack([side, np.ones((NUM_USERS, 1))]).astype(np.float32),
            items=np.hstack([items + noise, np.full((num_items, 1), 1.5)]).astype(np.float32),
            user_gate=np.full(NUM_USERS, 0.5, dtype=np.float32),
            item_gate=np.where(np.arange(num_items) < num_items / 2, 0.9, 0.5).astype(np.float32),
            user_side=np.empty((NUM_USERS, 0), dtype=np.float32),
            item_side=np.empty((num_items, 0), dtype=np.float32),
            table=np.empty((0, 2), dtype=np.float32),
            run={},
        )
        model = {
            **graph_tensors(graph),
            "popularity": np.asarray(seen.sum(axis=0)).astype(np.int64),
            "seen_indptr": seen.indptr.astype(np.int64),
            "seen_items": seen.indices.astype(np.int32),
        }
        write_bundle(
            built / directory,
            model=model,
            header={"name": "blocks", "debias_strength": 0.5}
            | ({"text": {"encoder": encoder, "power": 2.0}} if encoder else {}),
            users=[f"u{row}" for row in range(NUM_USERS)],
            items=[
                {"item_id": f"i{row}", "title": f"Film {row}", "profile": "It is a film, and a wonderful one."}
                for row in range(num_items)
            ],
        )
        write_json(
            built / "curve.json", [{"epoch": epoch, "ranking": 2 / epoch, "ndcg@10": 0.1 * epoch} for epoch in (3, 6, 9)]
        )
        learned_from = {"evaluated": seen.nnz, "served": seen.nnz if directory == BUNDLE_DIRECTORY else 12_345}
        training = {"epochs": 9, "best_epoch": 9, "members": {"ease": MEMBER}, "learned_from": learned_from}
        write_json(built / "training.json", training)
        save_file(
            {"users": rng.normal(size=(NUM_USERS, 4)), "items": rng.normal(size=(num_items, 4))},
            built / "side_representations.safetensors",
        )
        return {}

    return run_stage(
        Stage("train", 1), settings or Settings(name=f"{num_items}{encoder}{directory}"), root, {"ingest": data}, build
    )
