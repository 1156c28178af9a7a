"""What a run says at its end: a machine-readable summary, and the tables a person reads."""

import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from components.artifacts import read_json
from components.evaluate.config import LABELS, SCORES
from components.ids import ITEM, TIMESTAMP, TITLE, USER, USER_ID
from pipelines.config import PlatformConfig
from pipelines.display import memory
from pipelines.local import PlatformRun
from pipelines.plan import PlannedStage

if TYPE_CHECKING:
    import pandas as pd

    from components.registry import ModelVersion
    from pipelines.retention import Removable

PACKAGES = ("cllmr-platform", "torch", "ray", "kfp", "feast", "mlflow-skinny", "numpy", "scipy", "sentence-transformers")
TABLE_METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20")
TITLE_WIDTH = 46


def summarise(run: PlatformRun, config: PlatformConfig, preset: str, seconds: float) -> dict[str, Any]:
    """Everything about a run that a script may ask for; stages that did not run are absent.

    Args:
        run: how it went.
        config: its settings.
        preset: name of the preset they were built on.
        seconds: wall-clock seconds of the whole command, questions to the endpoint included.
    """
    summary: dict[str, Any] = {
        "run_id": run.run_id,
        "preset": preset,
        "config_fingerprint": config.fingerprint(),
        "config": config.model_dump(mode="json"),
        "storage_root": run.storage_root,
        "log": str(run.directory / "log.txt"),
        "total_seconds": round(seconds, 3),
        "everything_reused": run.all_reused,
        "stages": {
            name: {
                "fingerprint": stage.manifest.fingerprint,
                "uri": stage.manifest.uri,
                "reused": stage.reused,
                "seconds": stage.manifest.seconds,
                "peak_memory_mb": stage.manifest.peak_memory_mb,
                "facts": stage.manifest.facts,
            }
            for name, stage in run.stages.items()
        },
        "versions": {"python": platform.python_version(), **versions()},
        "hardware": hardware(),
    }
    if "ingest" in run.stages:
        summary["dataset"] = run.manifest("ingest").facts
    if "train" in run.stages:
        summary["bundle"] = f"{run.manifest('train').uri}/bundle"
    if "evaluate" in run.stages:
        folder = run.manifest("evaluate").path()
        summary["metrics"] = metrics = read_json(folder / "metrics.json")
        summary["effective_rank"] = metrics["effective_rank"]
        summary["report"] = str(folder / "report.html")
    if "promote" in run.stages:
        summary["verdict"] = read_json(run.manifest("promote").path() / "verdict.json")
    return summary


def hardware() -> dict[str, Any]:
    """The machine a figure was measured on."""
    return {
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that figures depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an image carries only what it runs
    return found


def plan_table(planned: Sequence[PlannedStage], storage_root: str) -> Table:
    """What a run would do: stage, fingerprint, state, where its output lies."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "fingerprint", "state", "where"):
        table.add_column(column, overflow="fold")
    for stage in planned:
        where = f"{storage_root.rstrip('/')}/{stage.name}/{stage.fingerprint or '...'}"
        style = {"done": "green", "to run": "yellow"}.get(stage.state, "dim")
        table.add_row(stage.name, stage.fingerprint or "", Text(stage.state, style), where)
    return table


def stage_table(run: PlatformRun) -> Table:
    """Seconds and peak memory of every stage, and what was reused."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("peak memory", justify="right")
    table.add_column("")
    for name, stage in run.stages.items():
        made = stage.manifest
        table.add_row(name, f"{made.seconds:.1f}", memory(made.peak_memory_mb), "reused" if stage.reused else "built")
    return table


def result_table(metrics: Mapping[str, Any]) -> Table:
    """The figures of every model on the test interactions, best of each column in bold; ours below the baselines.

    Args:
        metrics: contents of evaluate's metrics.json.
    """
    results: Mapping[str, Any] = {name: metrics["results"][name] for name in LABELS if name in metrics["results"]}
    best = {metric: max(float(result[metric]["mean"]) for result in results.values()) for metric in TABLE_METRICS}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("test interactions, full ranking")
    for metric in TABLE_METRICS:
        table.add_column(metric.replace("recall", "Recall").replace("ndcg", "NDCG"), justify="right")
    ours_begun = False
    for name, result in results.items():
        if name in SCORES and not ours_begun:
            table.add_section()
            ours_begun = True
        values = [float(result[metric]["mean"]) for metric in TABLE_METRICS]
        cells = [
            Text(f"{value:.4f}", "bold" if value >= best[metric] else "")
            for metric, value in zip(TABLE_METRICS, values, strict=True)
        ]
        table.add_row(metrics["labels"][name], *cells)
    return table


def verdict_line(verdict: Mapping[str, Any]) -> Text:
    """The gate's decision and why, in one line."""
    failed = [reason["text"] for reason in verdict["reasons"] if not reason["passed"]]
    champion = verdict["champion"]
    served = f"champion: version {champion['version']}, {champion['fingerprint']}" if champion else "there is no champion"
    words = {
        "promoted": "promoted: the new model is the champion",
        "unchanged": "unchanged: this model is the champion already",
        "kept": "kept: the new model was not promoted",
    }
    style = "yellow" if failed else "green"
    return Text(f"{words[verdict['verdict']]}{': ' + '; '.join(failed) if failed else ''} ({served})", style)


def next_commands(settings: PlatformConfig, user_id: str) -> list[str]:
    """What to type next, as a shell takes it."""
    default = PlatformConfig.model_fields["storage_root"].default
    storage = [] if settings.storage_root == default else ["--storage", settings.storage_root]
    question = json.dumps({"users": [user_id], "k": 10, "compare": True}, ensure_ascii=False)
    begins_like_an_option = ["--"] if user_id.startswith("-") else []
    return [
        "next:",
        f"  {shlex.join(['cllmr', 'serve', *storage])}   (with make: make serve), then",
        f"  curl -s http://{settings.serve.host}:{settings.serve.port}/v1/recommend -H 'content-type: application/json' "
        f"-d {shlex.quote(question)}",
        f"  {shlex.join(['cllmr', 'recommend', '--compare', *storage, *begins_like_an_option, user_id])}",
        "  cllmr run --interactions clicks.csv --items books.csv --column user_id=reader   (your own data)",
    ]


def data_table(facts: Mapping[str, Any]) -> Table:
    """Sizes of a data set, from the facts of the ingest stage."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.items():
        if isinstance(value, int):
            table.add_row(name, f"{value:,}")
        elif isinstance(value, float):
            table.add_row(name, f"{value:.4g}")
    for reason, count in facts.get("removed_by_reason", {}).items():
        table.add_row(f"removed: {reason}", f"{count:,}")
    return table


def removed_table(removed: "pd.DataFrame") -> Table:
    """For each reason two of the rows that were removed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="removed rows, for example", title_justify="left")
    shown = removed.groupby("reason", sort=True).head(2).sort_values("reason", kind="stable")
    for column in shown.columns:
        table.add_column(str(column), max_width=TITLE_WIDTH, overflow="ellipsis", no_wrap=True)
    for row in shown.itertuples(index=False):
        table.add_row(*("" if value is None else str(value) for value in row))
    return table


def last_liked(folder: Path, user_id: str | None) -> tuple[str, list[str]]:
    """One user and the titles of the last five items in the user's history, newest first.

    Args:
        folder: of the ingest artifact.
        user_id: the user; None: the most active one with less than 100 interactions (a readable profile).
    """
    from components.ingest.dataset import Dataset

    dataset = Dataset.load(folder)
    users = dataset.users.set_index(USER)[USER_ID]
    if user_id is None:
        activity = dataset.interactions[USER].value_counts()
        readable = activity[activity < 100]
        user_id = str(users.to_dict()[(readable if len(readable) else activity).sort_index().idxmax()])
    rows = users[users == user_id].index
    theirs = dataset.interactions[dataset.interactions[USER].isin(rows)].sort_values([TIMESTAMP, ITEM], ascending=False)
    titles = dataset.items.set_index(ITEM)[TITLE]
    return user_id, [str(titles[row]) for row in theirs[ITEM].head(5)]


def side_by_side(answer: Mapping[str, Any], debias: float) -> RenderableType:
    """One user's rankings with and without debiasing, as ``/v1/recommend`` with ``compare`` answers them.

    Args:
        answer: one entry of the response's ``results``.
        debias: the strength used.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column(f"debiased (λ = {debias:g})", max_width=TITLE_WIDTH, overflow="ellipsis", no_wrap=True)
    table.add_column("was", justify="right")
    table.add_column("without debiasing", max_width=TITLE_WIDTH, overflow="ellipsis", no_wrap=True)
    factual = answer.get("factual") or []
    for place, item in enumerate(answer["items"]):
        beside = factual[place]["title"] if place < len(factual) else ""
        table.add_row(str(item["rank"]), item["title"], moved(item.get("rank_change"), item.get("factual_rank")), beside)
    return _remarked(table, answer)


def moved(rank_change: int | None, factual_rank: int | None) -> str:
    """A rank before debiasing and the direction it moved: ``14 ↑``; empty when it stayed or is unknown."""
    if not rank_change:
        return ""
    return f"{factual_rank} {'↑' if rank_change > 0 else '↓'}"


def ranking_table(answer: Mapping[str, Any]) -> RenderableType:
    """One user's ranking."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("item")
    table.add_column("title", max_width=60, overflow="ellipsis", no_wrap=True)
    table.add_column("score", justify="right")
    for item in answer["items"]:
        table.add_row(str(item["rank"]), item["item_id"], item["title"], f"{item['score']:.4g}")
    return _remarked(table, answer)


def _remarked(table: Table, answer: Mapping[str, Any]) -> RenderableType:
    """A ranking below what has to be said of it."""
    if not answer["items"]:
        return Text("no item is left: none passes the filters, or the user knows them all", "yellow")
    if answer["method"] == "personalised":
        return table
    return Group(Text(f"{answer['reason']}: the ranking is by {answer['method']}.", "yellow"), table)


def explanation_table(answer: Mapping[str, Any]) -> RenderableType:
    """One score taken apart, as ``/v1/explain`` answers it: a sum to read downwards, and the same again for what is served."""
    title = Text(f"user {answer['user_id']}, item {answer['item_id']}: {answer['title'] or 'unknown'}", "bold")
    parts = answer["explanation"]
    if parts is None:
        return Group(title, Text(f"no explanation: {answer['reason']}", "yellow"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    direct, removed = (round(parts[name], 5) for name in ("natural_direct_effect", "removed"))
    table.add_row("match of tastes (indirect effect)", f"{parts['total_natural_indirect_effect']:.5f}")
    table.add_row("side information by itself (direct effect)", f"{direct:+.5f}")
    table.add_row("= score without debiasing (total effect)", f"{parts['total_effect']:.5f}")
    table.add_row(f"taken out by debiasing: λ {answer['debias']:g} x direct effect", f"{0.0 - removed:+.5f}")  # no -0
    table.add_row("= debiased score", Text(f"{parts['debiased_score']:.5f}", "bold"))
    table.add_row("rank among all items, seen or not: before, after", f"{parts['factual_rank']}, {parts['debiased_rank']}")
    rows: list[RenderableType] = [title, table]
    if answer["already_seen"]:
        rows.append(Text("the user knows this item already: it is not recommended", "yellow"))
    if answer["nearest_liked_items"]:
        near = ", ".join(f"{item['title']} ({item['similarity']:.2f})" for item in answer["nearest_liked_items"])
        rows.append(Text(f"nearest of the user's items: {near}"))
    return Group(*rows)


def versions_table(versions: "Sequence[ModelVersion]") -> RenderableType:
    """The registered models, newest first."""
    if not versions:
        return Text("no model is registered yet: cllmr run")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("version", "fingerprint", "role", "registered", "NDCG@10"):
        table.add_column(column)
    for version in versions:
        role = ", ".join(version.aliases) + (" withdrawn" if version.withdrawn_at else "")
        ndcg = version.metrics.get("debiased.ndcg@10")
        table.add_row(version.version, version.fingerprint, role, version.created_at, "" if ndcg is None else f"{ndcg:.4f}")
    return table


def removable_table(found: "Sequence[Removable]") -> Table:
    """What nothing needs any more, as it was found."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("what", "where", "made", "size"):
        table.add_column(column, overflow="fold")
    for one in found:
        table.add_row(one.what, one.where, one.manifest.created_at if one.manifest else "", decimal(one.bytes))
    return table


def runs_table(runs: Sequence[Any]) -> RenderableType:
    """Runs on a cluster (KFP's V2beta1Run), as they come."""
    if not runs:
        return Text("no run yet: cllmr submit")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "name", "state", "created", "minutes"):
        table.add_column(column, overflow="fold")
    styles = {"SUCCEEDED": "green", "FAILED": "red", "CANCELED": "yellow"}
    for run in runs:
        ended = run.finished_at and run.finished_at.timestamp() > run.created_at.timestamp()  # KFP's zero time: not yet
        minutes = f"{(run.finished_at - run.created_at).total_seconds() / 60:.1f}" if ended else ""
        state = Text(str(run.state or ""), styles.get(run.state, ""))
        table.add_row(run.run_id, run.display_name, state, f"{run.created_at:%Y-%m-%d %H:%M}", minutes)
    return table
