"""Results as tables: one form, drawn on a terminal, in Markdown and in the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.evaluate.metrics import PRIMARY
from components.experiment.suites import SHOWN, Study

if TYPE_CHECKING:
    from rich.table import Table

HEADS = {"recall@10": "R@10", "recall@20": "R@20", "ndcg@10": "N@10", "ndcg@20": "N@20"}


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: list[list[bool]]
    """Which cells are the best of their column, same shape as `rows`."""
    notes: list[str]


def grids(study: Study) -> list[Grid]:
    """One table per data set, and those over data sets."""
    found = []
    for name, result in study.datasets.items():
        if "propensity" in result:
            found.append(_propensity(name, result["propensity"]))
        else:
            found.append(_models(name, result))
        if study.name == "ablation" and result["models"]:
            found.append(_remaining(name, result["models"]))
    if "anova" in study.extra:
        found.append(_anova(study.extra))
    return found


def _models(dataset: str, result: Mapping[str, Any]) -> Grid:
    models: Mapping[str, Mapping[str, Any]] = result["models"]
    has_rank = any(one.get("effective_rank") for one in models.values())
    compared = any("minus" in one for one in models.values())
    columns = ["model", *(HEADS[metric] for metric in SHOWN)]
    columns += ["eff. rank"] if has_rank else []
    columns += [f"Δ {HEADS[PRIMARY]}", "t-test p", "Wilcoxon p"] if compared else []
    top = {metric: max(one["test"][metric]["mean"] for one in models.values()) for metric in SHOWN} if models else {}
    rows, best = [], []
    for name, one in models.items():
        label = one.get("label", name)
        cells = [label, *(spread(one["test"][metric]) for metric in SHOWN)]
        marks = [False, *(one["test"][metric]["mean"] == top[metric] for metric in SHOWN)]
        if has_rank:
            cells.append(_rank(one))
        if compared:
            minus = one.get("minus", {}).get(PRIMARY)
            cells += [signed(minus), p_value(minus["t_p"]), p_value(minus["wilcoxon_p"])] if minus else ["", "", ""]
        rows.append(cells)
        best.append(marks + [False] * (len(cells) - len(marks)))
    notes = [f"{name} was left out: {reason}." for name, reason in result["skipped"].items()]
    if "cold_items" in result:
        notes.append(f"{result['cold_items']:,} cold items are ranked among themselves; popularity ranks them at random.")
    if "cold_users" in result:
        notes.append(f"All items are ranked for {result['cold_users']:,} cold users.")
    return Grid(f"{dataset}, test interactions", columns, rows, best, notes)


def _propensity(dataset: str, conditions: Sequence[Mapping[str, Any]]) -> Grid:
    columns = [
        "formulation",
        "propensity",
        "length",
        "lured",
        "clean",
        "inflated",
        "debiased",
        "removed",
        "Δ N@10",
    ]
    rows = [
        [
            one["formulation"],
            one["kind"],
            f"{one['strength']:g}",
            percent(one["lured_share"]),
            *(percent(one[f"exposure_{name}"]) for name in ("clean", "inflated", "debiased")),
            spread(one["removed_percent"], 0) + " %" if one["removed_percent"] else "nothing to remove",
            spread(one["ndcg_change_percent"], 1) + " %" if one["ndcg_change_percent"] else "N@10 was 0",
        ]
        for one in conditions
    ]
    notes = [
        "Lured: share of the training clicks that the praise brought in. Clean, inflated, debiased: exposure of the injected "
        "items. Δ N@10: change on the items that were not injected. Seeds with nothing to remove, or with an N@10 of 0 before, "
        "are left out of these means."
    ]
    return Grid(dataset, columns, rows, [[False] * len(columns) for _ in rows], notes)


def _remaining(dataset: str, models: Mapping[str, Mapping[str, Any]]) -> Grid:
    """What propensity the variants of the ablation leave."""
    columns = ["model", "ARP@10", "coverage", "Gini", "clean", "inflated", "induced", "removed"]
    rows = []
    for name, one in models.items():
        bias, found = one["bias"], one.get("propensity")
        cells = [name, f"{bias['average_popularity']:.1f}", f"{100 * bias['coverage']:.1f} %", f"{bias['gini']:.2f}"]
        if found is None:
            cells += ["", "", "", ""]
        else:
            cells += [percent(found[key]) for key in ("exposure_clean", "exposure_inflated", "induced")]
            removed = found["removed_percent"]
            cells.append(spread(removed, 0) + " %" if removed else "nothing to remove")
        rows.append(cells)
    notes = [
        "ARP: training interactions of a recommended item; coverage: share of the items in anybody's top ten. Clean, inflated: "
        "exposure of the injected items in the variant fitted on the data as they are, and on those with praise and its clicks."
    ]
    return Grid(f"{dataset}, propensity that remains", columns, rows, [[False] * len(columns) for _ in rows], notes)


def _anova(extra: Mapping[str, Any]) -> Grid:
    first, second = extra["levels"]
    names = {"a": first, "b": second, "interaction": f"{first} x {second}"}
    rows = []
    for key, name in names.items():
        part = extra["anova"][key]
        f = "" if part["f"] is None else f"{part['f']:.2f}"
        rows.append(
            [name, f"{part['sum_of_squares']:.3f}", str(part["df"]), f, "" if part["p"] is None else p_value(part["p"])]
        )
    error = extra["anova"]["error"]
    rows.append(["error", f"{error['sum_of_squares']:.3f}", str(error["df"]), "", ""])
    columns = ["source", "sum of squares", "df", "F", "p"]
    on = extra["anova"]["datasets"]
    note = (
        f"Means over seeds of {', '.join(on)}; the error is how much the data sets disagree."
        if len(on) > 1
        else f"The error is between seeds: this speaks for {on[0]} alone."
    )
    return Grid(f"Analysis of variance ({extra['anova']['metric']})", columns, rows, [[False] * 5 for _ in rows], [note])


def spread(value: Mapping[str, Any], digits: int = 4) -> str:
    """``.1234 ± .0012``; the mean alone where nothing varies."""
    mean, deviation = (f"{value[name]:.{digits}f}" for name in ("mean", "std"))
    if digits > 3:  # of a share: the zero before the point says nothing
        mean, deviation = mean.removeprefix("0"), deviation.removeprefix("0")
    return f"{mean} ± {deviation}" if value["std"] else mean


def percent(value: Mapping[str, Any]) -> str:
    """A share with its deviation, in percent."""
    return spread({"mean": 100 * value["mean"], "std": 100 * value["std"]}, 1) + " %"


def signed(difference: Mapping[str, float | None]) -> str:
    """``+4.5 %``, of the other's mean; of nothing there is no share."""
    relative = difference["relative_percent"]
    return "theirs is 0" if relative is None else f"{relative:+.1f} %".replace("-", "−")


def p_value(p: float) -> str:
    """Three digits, ``< .001`` below."""
    return "< .001" if p < 0.001 else f"{p:.3f}"


def _rank(model: Mapping[str, Any]) -> str:
    ranks = model.get("effective_rank") or {}
    shown = [ranks[name] for name in ("side_users", "side_items") if name in ranks] or [
        ranks[name] for name in ("users", "items") if name in ranks
    ]
    return ", ".join(f"{value:.1f}" for value in shown)


def as_rich(grid: Grid) -> "Table":
    """For a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=grid.title, title_justify="left")
    for number, column in enumerate(grid.columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for cells, marks in zip(grid.rows, grid.best, strict=True):
        table.add_row(*(Text(cell, "bold" if mark else "") for cell, mark in zip(cells, marks, strict=True)))
    if grid.notes:
        table.caption, table.caption_justify = "\n".join(grid.notes), "left"
    return table


def as_markdown(grid: Grid) -> str:
    """With a heading."""
    lines = [f"### {grid.title}", "", "| " + " | ".join(grid.columns) + " |", "|" + "---|" * len(grid.columns)]
    for cells, marks in zip(grid.rows, grid.best, strict=True):
        told = (f"**{cell}**" if mark else cell for cell, mark in zip(cells, marks, strict=True))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in told) + " |")
    return "\n".join([*lines, "", *grid.notes]).rstrip() + "\n"


def markdown(studies: Sequence[Study]) -> str:
    """All studies as one Markdown page."""
    parts = []
    for study in studies:
        parts += [f"## {study.title}\n", f"{study.text}\n", *(as_markdown(grid) for grid in grids(study))]
    return "\n".join(parts)
