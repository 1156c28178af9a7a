"""Rankings that are not exact, and how far off they are: compact item vectors, an approximate index (faiss), ready-made lists.

All are options of the serve configuration, and all are measured when a bundle is loaded, on users of that bundle: what is
served says what it costs. An index and lists are taken only if they have the share of the best items that was asked for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import structlog
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from components.cllmr.linear.compact import READ_ROWS, ItemStorage
from components.errors import ConfigError
from serving.bundle import MODEL_FILE
from serving.ranking import Candidates, Floats, Ranking, Rows, top_k
from serving.scorer import Scorer
from serving.settings import IndexKind, Scoring

MEASURED_K = 20
_MOST_SCORES = 1 << 23  # of the users that are measured on, and all items: 32 MiB
_TRAINING_ROWS = 40  # for each cell of the index
_LINKS, _BUILDING_EFFORT = 16, 100  # of each item in a graph (M, efConstruction)
_MOST_FETCHED = 1_000  # where more items than this are left out, the exact ranking is no slower

log = structlog.get_logger()


class Exactness(BaseModel):
    """What was measured when the bundle was loaded."""

    model_config = ConfigDict(frozen=True)

    item_storage: ItemStorage = "float32"
    storage_overlap: float | None = None
    """Share of the twenty best by float32 that are among the twenty best as stored; None where float32 is stored."""
    storage_ndcg: float | None = None
    """NDCG@20 of the ranking as stored, where the twenty best by float32 are what is relevant."""
    ann: Literal["off", "on", "refused"] = "off"
    """``refused``: the index did not find the share that was asked for, or there is no one matrix to look through."""
    ann_recall: float | None = None
    """Share of the twenty best as stored that the index finds; None where there is none."""
    lists: Literal["off", "missing", "on", "refused"] = "off"
    """``missing``: none have been made with this model yet."""
    lists_recall: float | None = None
    """Share of the twenty best as stored that lists have; None where there are none."""


class ItemIndex:
    """The debiased items, of which a search looks at some: of the nearest cells, or along a graph.

    Args:
        scorer: whose items; at the bundle's own debias strength.
        storage: of the items in the index.
        kind: see `Scoring.ann_index`.
        num_cells: four times the root of the number of items when None; without effect on a graph.
        seed: of the rows that the index is trained on.
    """

    def __init__(
        self, scorer: Scorer, storage: ItemStorage, kind: IndexKind = "cells", num_cells: int | None = None, seed: int = 0
    ) -> None:
        assert scorer.debiased is not None
        self._model = scorer.debiased
        items = self._model.items
        self.num_cells = num_cells or max(1, min(len(items) // _TRAINING_ROWS, round(4 * len(items) ** 0.5)))
        self._radius = None if kind == "cells" else max(_squares(items[rows]).max() for rows in _blocks(len(items))) ** 0.5
        dim = items.shape[1]
        self._index = _graph(dim + 1, storage) if kind == "hnsw" else _cells(dim, self.num_cells, storage)
        if not self._index.is_trained:
            wanted = min(len(items), _TRAINING_ROWS * self.num_cells)
            self._index.train(self._seen(np.sort(np.random.default_rng(seed).choice(len(items), wanted, replace=False))))
        for rows in _blocks(len(items)):
            self._index.add(self._seen(rows))

    def _seen(self, rows: Rows | slice) -> Floats:
        """Some items as the index has them.

        In a graph all are made equally long by one more number each: then the nearest have the greatest inner products, and a
        graph of distances finds them, where one of inner products loses its way.
        """
        block: Floats = np.ascontiguousarray(self._model.items[rows])
        if self._radius is None:
            return block
        missing = np.sqrt(np.maximum(self._radius**2 - _squares(block), 0))
        return np.concatenate((block, missing[:, None]), axis=1, dtype=np.float32)

    @property
    def efforts(self) -> list[int]:
        """What `effort` may be, least first: a search that looked at more would be no faster than the exact ranking."""
        least, most = (4, max(4, self.num_cells // 4)) if self._radius is None else (32, max(32, len(self._model.items) // 32))
        return [least << doubled for doubled in range(32) if least << doubled <= most]

    @property
    def effort(self) -> int:
        """Cells that a search looks into, or items that it keeps in view along the graph."""
        return int(self._index.nprobe if self._radius is None else self._index.hnsw.efSearch)

    @effort.setter
    def effort(self, number: int) -> None:
        if self._radius is None:
            self._index.nprobe = number
        else:
            self._index.hnsw.efSearch = number

    def ranking(self, user: int, k: int, candidates: Candidates) -> Ranking | None:
        """The best of the candidates among what the index finds, by their exact scores; None where it finds too few.

        Items that are near the user's history by weight are looked at as well, wherever the index has them.
        """
        num_items = len(self._model.items)
        if (fetched := k + num_items - len(candidates)) > min(_MOST_FETCHED, num_items):
            return None
        vector = self._model.users[[user]]
        asked = vector if self._radius is None else np.pad(vector, ((0, 0), (0, 1)))
        rows: Rows = self._index.search(asked, fetched)[1][0]
        rows = rows[rows >= 0]  # less than asked for comes back as -1
        extra: Floats | None = None
        if self._model.weights.nnz:
            near = self._model.history[[user]] @ self._model.weights
            best = np.argpartition(-near.data, fetched)[:fetched] if near.nnz > fetched else slice(None)
            rows, extra = np.union1d(rows, near.indices[best]), near.toarray()[0]
        rows = np.sort(rows[candidates.contains(rows)]).astype(np.int64)
        if len(rows) < min(k, len(candidates)):
            return None
        scores: Floats = self._model.items[rows] @ vector[0]
        if extra is not None:
            scores = scores + extra[rows]
        best_of = top_k(scores, k)
        return Ranking(rows[best_of.rows], best_of.scores)


def _faiss() -> Any:  # its types know the C++ side of it only
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            "an approximate index needs faiss, which is not installed.",
            "Install cllmr-platform[ann], or leave scoring.ann_above out.",
        ) from None
    return faiss


def _cells(dim: int, number: int, storage: ItemStorage) -> Any:
    faiss = _faiss()
    quantizer = faiss.IndexFlatIP(dim)
    if storage == "float32":
        return faiss.IndexIVFFlat(quantizer, dim, number, faiss.METRIC_INNER_PRODUCT)
    kind = faiss.ScalarQuantizer.QT_fp16 if storage == "float16" else faiss.ScalarQuantizer.QT_8bit
    return faiss.IndexIVFScalarQuantizer(quantizer, dim, number, kind, faiss.METRIC_INNER_PRODUCT)


def _graph(dim: int, storage: ItemStorage) -> Any:
    faiss = _faiss()
    if storage == "float32":
        index = faiss.IndexHNSWFlat(dim, _LINKS)
    else:
        kind = faiss.ScalarQuantizer.QT_fp16 if storage == "float16" else faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexHNSWSQ(dim, kind, _LINKS)
    index.hnsw.efConstruction = _BUILDING_EFFORT
    return index


def _squares(items: Floats) -> Floats:
    """Of lengths: (num_items,)."""
    squares: Floats = np.einsum("nd,nd->n", items, items)
    return squares


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, READ_ROWS):
        yield slice(start, min(start + READ_ROWS, count))


def build_index(scorer: Scorer, args: Scoring) -> tuple[ItemIndex | None, float]:
    """An index that finds the share that is asked for, with the least effort that does, and that share; None: none does."""
    index = ItemIndex(scorer, args.item_storage, args.ann_index)
    users = _sample(scorer)
    exact = _best(scorer.score_all(users))
    everything, share = scorer.candidates(), 0.0
    for effort in index.efforts:
        index.effort = effort
        found = [index.ranking(user, MEASURED_K, everything) for user in users.tolist()]
        share = overlap([[] if one is None else one.rows.tolist() for one in found], exact)
        if share >= args.ann_recall:
            return index, share
    return None, share


def prepare(scorer: Scorer, args: Scoring, bundle_dir: Path) -> tuple[ItemIndex | None, Exactness]:
    """What a replica needs beside the scorer, and what was measured."""
    figures: dict[str, Any] = {"item_storage": args.item_storage}
    if args.item_storage != "float32":
        users = _sample(scorer)
        exact, found = _best(exact_scores(scorer, bundle_dir, users)), _best(scorer.score_all(users))
        figures.update(storage_overlap=overlap(found, exact), storage_ndcg=ndcg(found, exact))
    index = None
    if args.ann_above is not None and scorer.num_items >= args.ann_above and scorer.debiased is None:
        figures.update(ann="refused")
        log.warning("index refused", reason="compact items and a strength between 0 and 1", storage=args.item_storage)
    elif args.ann_above is not None and scorer.num_items >= args.ann_above:
        index, share = build_index(scorer, args)
        figures.update(ann="refused" if index is None else "on", ann_recall=share)
        if index is None:
            log.warning("index refused", recall=round(share, 4), wanted=args.ann_recall, num_items=scorer.num_items)
    return index, Exactness(**figures)


def exact_scores(scorer: Scorer, bundle_dir: Path, users: Rows) -> Floats:
    """Debiased scores by the item vectors in the bundle's file, which is read block by block: (num_asked, num_items)."""
    strength = scorer.debias_strength
    scores = np.zeros((len(users), scorer.num_items), dtype=np.float32)
    with safe_open(bundle_dir / MODEL_FILE, framework="numpy") as file:
        names = set(file.keys())
        for name, model, share in (
            ("factual", scorer.factual, 1 - strength),
            ("counterfactual", scorer.counterfactual, strength),
        ):
            if not share:
                continue
            tensor = f"{name}.items" if f"{name}.items" in names else "factual.items"  # the file holds once what is shared
            part: Any = file.get_slice(tensor)
            for block in _blocks(scorer.num_items):
                scores[:, block] += np.float32(share) * (model.users[users] @ part[block].T)
            if model.weights.nnz:
                scores += np.float32(share) * (model.history[users] @ model.weights).toarray()
    return scores


def overlap(found: list[list[int]], exact: list[list[int]]) -> float:
    """Mean share of the exact items that were found, 0 to 1."""
    return float(np.mean([len(set(one) & set(best)) / len(best) for one, best in zip(found, exact, strict=True)]))


def ndcg(found: list[list[int]], exact: list[list[int]]) -> float:
    """Mean NDCG of rankings, where the exact items are what is relevant, 0 to 1."""
    shares = []
    for one, best in zip(found, exact, strict=True):
        gains = 1 / np.log2(np.arange(2, len(best) + 2))
        shares.append(gains[: len(one)][np.isin(one, best)].sum() / gains.sum())
    return float(np.mean(shares))


def _sample(scorer: Scorer) -> Rows:
    count = min(scorer.num_users, 64, max(8, _MOST_SCORES // scorer.num_items))
    return np.sort(np.random.default_rng(0).choice(scorer.num_users, count, replace=False))


def _best(scores: Floats) -> list[list[int]]:
    return [top_k(row, MEASURED_K).rows.tolist() for row in scores]
