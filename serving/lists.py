"""Rankings that are ready: what ``cllmr batch`` wrote for the model that is served, looked up instead of computed.

A table is of one model at its own debias strength, with the users' training interactions left out; so it answers nothing but
that question. What a user did since is left out of his list, as it is of any ranking.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import structlog

from components.artifacts import Manifest, Store
from components.errors import UserError
from components.ids import UNKNOWN, USER_ID, Vocabulary
from serving.approximate import MEASURED_K, Exactness, overlap
from serving.ranking import Candidates, Ranking
from serving.scorer import Scorer
from serving.settings import Scoring

BATCH = "batch"
"""Stage that makes them."""
BATCH_VERSION = 5
"""Of what that stage writes; tables of another one are not looked at."""
TABLE_DIRECTORY = "recommendations"

_MEASURED_USERS = 64

log = structlog.get_logger()


class RankedLists:
    """The best items of many users, best first.

    Args:
        rows: item rows by user row, (num_users, k) int32; `UNKNOWN` after the end of a list.
        scores: of those items, (num_users, k).
    """

    def __init__(self, rows: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> None:
        self._rows, self._scores = rows, scores
        self.lengths: npt.NDArray[np.int64] = np.count_nonzero(rows != UNKNOWN, axis=1)

    def ranking(self, user: int, k: int, candidates: Candidates) -> Ranking | None:
        """The best k of the candidates; None where the list is too short to tell."""
        rows = self._rows[user, : self.lengths[user]]
        kept = np.flatnonzero(candidates.contains(rows))[:k]
        return Ranking(rows[kept].astype(np.int64), self._scores[user, kept]) if len(kept) == k else None


class Looked(NamedTuple):
    """What came of a look for lists."""

    lists: RankedLists | None
    exactness: Exactness
    """With what was measured of them."""
    table: str | None
    """Fingerprint of what was measured, which need not be read again; None: nothing was, and the next look may find more."""


def ready_made(
    storage_root: str, train: str, scorer: Scorer, args: Scoring, exactness: Exactness, known: str | None = None
) -> Looked:
    """Lists of the model `train`, if there are any and they have the share of the best items that is asked for.

    Lists are never needed: what is wrong with them is logged, and the exact ranking is served.

    Args:
        storage_root: where tables lie.
        train: fingerprint of the model.
        scorer: of that model.
        args: what is asked for.
        exactness: what was measured of the model so far.
        known: the table that was measured before; unless there is another one, nothing is read.
    """
    if not args.lists:
        return Looked(None, exactness, None)
    try:
        if (table := find(storage_root, train, scorer)) is None:
            return Looked(None, exactness.model_copy(update={"lists": "missing", "lists_recall": None}), None)
        if table.fingerprint == known:
            return Looked(None, exactness, known)
        lists = read(table, scorer)
        share = measured(lists, scorer)
    except Exception as error:  # whatever it is: the thread that asks must go on following the champion
        reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log.warning("lists refused", train=train, reason=reason)
        return Looked(None, exactness.model_copy(update={"lists": "refused", "lists_recall": None}), None)
    figures: dict[str, Any] = {"lists": "on" if share >= args.ann_recall else "refused", "lists_recall": share}
    if figures["lists"] == "on":
        log.info("lists loaded", batch=table.fingerprint, num_users=table.facts["num_users"], recall=round(share, 4))
        return Looked(lists, exactness.model_copy(update=figures), table.fingerprint)
    log.warning("lists refused", batch=table.fingerprint, recall=round(share, 4), wanted=args.ann_recall)
    return Looked(None, exactness.model_copy(update=figures), table.fingerprint)


def measured(lists: RankedLists, scorer: Scorer) -> float:
    """Mean share of the twenty best unseen items that lists have, 0 to 1, over some users who have one; 0 where nobody has."""
    listed = np.flatnonzero(lists.lengths)
    if not len(listed):
        return 0.0
    users = np.sort(np.random.default_rng(0).choice(listed, min(len(listed), _MEASURED_USERS), replace=False))
    found, best = [], []
    for user in users.tolist():
        k = min(MEASURED_K, int(lists.lengths[user]))
        candidates = scorer.candidates(exclude=scorer.seen(user))
        ranking = lists.ranking(user, k, candidates)
        found.append([] if ranking is None else ranking.rows.tolist())
        best.append(scorer.recommend(user, k, exclude=scorer.seen(user)).rows.tolist())
    return overlap(found, best)


def find(storage_root: str, train: str, scorer: Scorer) -> Manifest | None:
    """The table with most rows of what a model answers when nothing else is asked for, the newest of equals; None: no table."""
    tables = [
        table
        for table in Store(storage_root).outputs(BATCH)
        if table.version == BATCH_VERSION  # an earlier one may be wrong, which is why there is a later one
        and table.parents.get("train") == train
        and table.config["exclude_seen"]
        and table.config["debias"] in (None, scorer.debias_strength)
    ]
    return max(tables, key=lambda table: (int(table.facts["num_rows"]), table.created_at), default=None)


def read(table: Manifest, scorer: Scorer) -> RankedLists:
    """The table's rankings of the users that the model knows.

    Raises ArtifactError when a file is missing or is not what the manifest says.
    """
    shape = scorer.num_users, int(table.config["k"])
    rows, scores = np.full(shape, UNKNOWN, dtype=np.int32), np.zeros(shape, dtype=np.float32)
    for file in sorted((table.path(TABLE_DIRECTORY) / TABLE_DIRECTORY).glob("part-*.parquet")):
        _fill(file, scorer, rows, scores)
    return RankedLists(rows, scores)


def _fill(file: Path, scorer: Scorer, rows: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> None:
    part = pq.read_table(file)
    part = part.filter(pc.equal(part["method"], "personalised"))
    users = _rows_of(part[USER_ID], scorer.user_vocabulary)
    place = part["rank"].to_numpy() - 1
    rows[users, place] = _rows_of(part["item_id"], scorer.item_vocabulary)
    scores[users, place] = part["score"].to_numpy()


def _rows_of(ids: pa.ChunkedArray, vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """Each id is looked up once, however often it is there."""
    encoded = ids.combine_chunks().dictionary_encode()
    found: npt.NDArray[np.int64] = vocabulary.rows(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]
    return found
