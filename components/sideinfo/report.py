"""What the stage says of itself: who wrote, how much was covered, what was set aside and what it cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from components.artifacts import write_json
from components.ids import ITEM_ID, TITLE, USER_ID
from components.ingest.dataset import Dataset
from components.pages import templates
from components.sideinfo.ondisk import Texts
from components.sideinfo.profiles import Account, Reference

REPORT_JSON, REPORT_HTML = "report.json", "report.html"

ROW_GROUP = 4096
"""Rows of a table that are held at once."""

PROFILE_TYPES = {
    "profile": pa.string(),
    "own_text": pa.string(),
    "tags": pa.list_(pa.string()),
    "confidence": pa.float64(),
    "groups": pa.list_(pa.string()),
}
"""Of what is written of a row."""

T = TypeVar("T")

_SAMPLES = 20  # rows of the quarantine
_PROFILES = 5  # of each side


def write(
    built: Path,
    dataset: Dataset,
    facts: Mapping[str, Any],
    account: Account | None,
    guarded: Mapping[str, int],
    references: Sequence[Reference],
    profiles: Mapping[str, Texts],
) -> None:
    """Writes report.json and report.html; without an LLM they depend on the data and settings alone."""
    items = zip(zip(dataset.items[TITLE], dataset.items[ITEM_ID], strict=True), profiles["items"], strict=True)
    users = zip(dataset.users[USER_ID], profiles["users"], strict=True)
    told = {
        "dataset": dataset.name,
        "facts": dict(facts),
        "profiles": {
            "items": [(f"{title} ({item_id})", text) for (title, item_id), text in _spread(items, profiles["items"].known())],
            "users": _spread(users, profiles["users"].known()),
        },
        "rejected": dict(account.rejected.most_common()) if account else {},
        "guarded": dict(sorted(guarded.items(), key=lambda pair: (-pair[1], pair[0]))),
        "quarantine": [asdict(row) for row in account.quarantine.samples(_SAMPLES)] if account else [],
        "references": [asdict(reference) for reference in references],
    }
    write_json(built / REPORT_JSON, told)
    environment = templates(Path(__file__).parent)
    environment.filters["dict_values"] = lambda row: list(row.values())
    page = environment.get_template("report.html.jinja").render(told)
    (built / REPORT_HTML).write_text(page, encoding="utf-8")


def references_table(references: Sequence[Reference]) -> pa.Table:
    """Columns side, group ("" where nothing was named), profile (null without an answer)."""
    names = ("side", "group", "profile")
    return pa.table({name: pa.array([getattr(row, name) for row in references], pa.string()) for name in names})


def write_quarantine(account: Account, path: Path) -> None:
    """Columns side, raw_id, reason, attempts, answer (beginning of the last one, neutralised)."""
    columns = {"side": pa.string(), "raw_id": pa.string(), "reason": pa.string(), "attempts": pa.int32(), "answer": pa.string()}
    write_table(path, pa.schema(columns), (asdict(row) for row in account.quarantine))


def write_table(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    """A Parquet file, of which no more than a row group is held in memory."""
    waiting = iter(rows)
    with pq.ParquetWriter(path, schema) as file:
        for group in iter(lambda: list(islice(waiting, ROW_GROUP)), []):
            file.write_batch(pa.RecordBatch.from_pylist(group, schema))


def _spread(pairs: Iterable[tuple[T, str | None]], known: int) -> list[tuple[T, str | None]]:
    """Some rows with a profile, from the first to the last of as many as are known."""
    step = max(1, known // _PROFILES)
    return list(islice((pair for pair in pairs if pair[1] is not None), 0, step * _PROFILES, step))
