"""What the stage says of itself: who wrote, how much was covered, what was set aside and what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.artifacts import write_json
from components.ids import ITEM_ID, TITLE, USER_ID
from components.ingest.dataset import Dataset
from components.pages import templates
from components.sideinfo.profiles import Account, Profiles, Quarantined, Reference

if TYPE_CHECKING:
    import pyarrow as pa

REPORT_JSON, REPORT_HTML = "report.json", "report.html"

_SAMPLES = 20  # rows of the quarantine
_PROFILES = 5  # of each side


def write(
    built: Path,
    dataset: Dataset,
    facts: Mapping[str, Any],
    account: Account | None,
    guarded: Mapping[str, int],
    references: Sequence[Reference],
    texts: Mapping[str, Profiles],
) -> None:
    """Writes report.json and report.html; without an LLM they depend on the data and settings alone."""
    items = zip(dataset.items[TITLE] + " (" + dataset.items[ITEM_ID] + ")", texts["items"], strict=True)
    users = zip(dataset.users[USER_ID], texts["users"], strict=True)
    told = {
        "dataset": dataset.name,
        "facts": dict(facts),
        "profiles": {"items": _spread(items), "users": _spread(users)},
        "rejected": dict(account.rejected.most_common()) if account else {},
        "guarded": dict(sorted(guarded.items(), key=lambda pair: (-pair[1], pair[0]))),
        "quarantine": [asdict(row) for row in _by_reason(account.quarantine)] if account else [],
        "references": [asdict(reference) for reference in references],
    }
    write_json(built / REPORT_JSON, told)
    environment = templates(Path(__file__).parent)
    environment.filters["dict_values"] = lambda row: list(row.values())
    page = environment.get_template("report.html.jinja").render(told)
    (built / REPORT_HTML).write_text(page, encoding="utf-8")


def references_table(references: Sequence[Reference]) -> "pa.Table":
    """Columns side, group ("" where nothing was named), profile (null without an answer)."""
    import pyarrow as pa

    names = ("side", "group", "profile")
    return pa.table({name: pa.array([getattr(row, name) for row in references], pa.string()) for name in names})


def quarantine_table(account: Account) -> "pa.Table":
    """Columns side, raw_id, reason, attempts, answer (beginning of the last one, neutralised)."""
    import pyarrow as pa

    fields = {"side": pa.string(), "raw_id": pa.string(), "reason": pa.string(), "attempts": pa.int32(), "answer": pa.string()}
    rows = [asdict(row) for row in account.quarantine]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: (row["side"], row["raw_id"])), pa.schema(fields))


def _spread(pairs: Any) -> list[tuple[str, str]]:
    """Some rows with a profile, from the first to the last."""
    told = [(name, text) for name, text in pairs if text]
    return told[:: max(1, len(told) // _PROFILES)][:_PROFILES]


def _by_reason(quarantine: Sequence[Quarantined]) -> list[Quarantined]:
    """Samples with as many different reasons as there are."""
    seen: dict[str, int] = {}
    ranked = []
    for row in quarantine:
        seen[row.reason] = seen.get(row.reason, 0) + 1
        ranked.append((seen[row.reason], row))
    return [
        row for _, row in sorted(ranked, key=lambda pair: (pair[0], pair[1].reason, pair[1].side, pair[1].raw_id))[:_SAMPLES]
    ]
