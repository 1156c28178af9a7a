"""The report's figures, as inline SVG: no file, no script, and the same bytes for the same numbers."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from components.cllmr.linear.ranking import HEAD_SHARE
from components.evaluate.config import LABELS, SCORES
from components.evaluate.metrics import PRIMARY

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
# Okabe and Ito's palette: told apart with any colour vision
COLOURS = {"debiased": "#0072b2", "factual": "#d55e00", "text": "#009e73", "warm": "#e69f00"}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


def draw(
    name: str,
    size: tuple[float, float],
    panels: Sequence[Callable[[Axes], None]],
    description: str,
    shared_legend: bool = False,
) -> str:
    """An SVG element with one axes for each of `panels`, side by side.

    Args:
        name: keeps the ids of one figure apart from those of the others on the page.
        size: width and height in inches at full width of the page; the element scales with the page.
        panels: each draws into the axes it is given.
        description: what the figure shows, for screen readers.
        shared_legend: one legend for all panels, below them: where what is drawn may fill an axes to its corners.
    """
    style: Any = {**STYLE, "svg.hashsalt": name}  # matplotlib types the keys as one long literal
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            panel(axes)
        if shared_legend:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _inline(buffer.getvalue(), description)


def _inline(svg: str, description: str) -> str:
    """A stand-alone SVG file as an element of an HTML page: no prologue, no addresses, no ids that other figures have too."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    return re.sub(r"<svg[^>]*>", f'<svg {box.group()} role="img" aria-label="{description}">', svg, count=1)


def intervals(results: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    """Mean and interval of each model, best at the top."""
    names = sorted((name for name in LABELS if name in results), key=lambda name: results[name][PRIMARY]["mean"])

    def panel(axes: Axes) -> None:
        for row, name in enumerate(names):
            entry = results[name][PRIMARY]
            colour = COLOURS.get(name, MUTED)
            axes.plot(entry["ci95"], [row, row], color=colour, linewidth=3 if name in SCORES else 2, solid_capstyle="round")
            axes.plot(entry["mean"], row, "o", color=colour, markersize=7 if name in SCORES else 5)
        axes.set_yticks(range(len(names)), [labels[name] for name in names])
        for label, name in zip(axes.get_yticklabels(), names, strict=True):
            label.set_color(INK)
            label.set_fontweight("bold" if name in SCORES else "normal")
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{PRIMARY.upper()} on test, mean and 95 % interval")

    return draw("intervals", (8.6, 0.9 + 0.32 * len(names)), [panel], f"{PRIMARY} of every model with its interval")


def popularity(counts: npt.NDArray[np.integer]) -> str:
    """Training interactions of the items, most popular first, with the head shaded."""
    ordered = np.sort(counts)[::-1]
    head = max(1, round(HEAD_SHARE * len(ordered)))

    def curve(axes: Axes) -> None:
        axes.fill_between(np.arange(1, head + 1), ordered[:head], color=COLOURS["debiased"], alpha=0.18, linewidth=0)
        axes.plot(np.arange(1, len(ordered) + 1), ordered, color=COLOURS["debiased"])
        axes.set_title("Popularity of the items")
        axes.set_xlabel(f"item, most popular first (shaded: the head, {100 * HEAD_SHARE:.0f} %)")
        axes.set_ylabel("training interactions")
        axes.set_xlim(0, len(ordered))
        axes.set_ylim(bottom=0)

    def share(axes: Axes) -> None:
        cumulative = np.concatenate([[0], np.cumsum(ordered)]) / max(ordered.sum(), 1)
        axes.plot(np.linspace(0, 1, len(cumulative)), cumulative, color=COLOURS["debiased"])
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        axes.plot(HEAD_SHARE, cumulative[head], "o", color=COLOURS["factual"])
        axes.set_title(f"The head holds {100 * cumulative[head]:.0f} % of the interactions")
        axes.set_xlabel("share of the items, most popular first")
        axes.set_ylabel("share of the interactions")
        _percent(axes, "x", "y")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)

    return draw("popularity", (8.6, 3.1), [curve, share], "how interactions spread over items")


def training(curve: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss and validation metrics by epoch; None when there is nothing to draw."""
    losses = _series(curve, lambda name: "@" not in name and name not in ("epoch", "step", "seconds", "learning_rate"))
    losses = {name: points for name, points in losses.items() if points[1][0]}
    found = _series(curve, lambda name: "@" in name)
    panels = []
    if losses:

        def loss(axes: Axes) -> None:
            for (name, (epochs, values)), colour in zip(losses.items(), _cycle(), strict=False):
                axes.plot(epochs, np.asarray(values) / values[0], color=colour, marker="o", markersize=3.5, label=name)
            axes.set_title("Parts of the loss, relative to the first")
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(loc="best")

        panels.append(loss)
    if found:

        def validation(axes: Axes) -> None:
            for (name, points), colour in zip(found.items(), _cycle(), strict=False):
                axes.plot(*points, color=colour, marker="o", markersize=3.5, label=name)
            axes.set_title("Validation")
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylim(bottom=0)
            axes.legend(loc="lower right")

        panels.append(validation)
    return draw("training", (8.6, 3.0), panels, "loss and validation metrics by epoch") if panels else None


def debias_curve(rows: Sequence[Mapping[str, float]], chosen: float) -> str:
    """NDCG, average popularity and coverage on validation against the debias strength."""
    strength = [row["debias"] for row in rows]

    def line(key: str, title: str, is_share: bool) -> Callable[[Axes], None]:
        def panel(axes: Axes) -> None:
            values = [row[key] for row in rows]
            axes.plot(strength, values, color=COLOURS["debiased"], marker="o", markersize=3.5)
            axes.axvline(chosen, color=COLOURS["factual"], linewidth=1.2, linestyle=(0, (4, 3)))
            axes.set_title(title)
            axes.set_xlabel("debias strength λ")
            axes.set_xlim(-0.03, 1.03)
            low, high = min(values), max(values)
            pad = max((high - low) * 0.15, abs(high) * 0.02, 1e-4)  # a flat line must look flat
            axes.set_ylim(max(0.0, low - pad), high + pad)
            if is_share:
                _percent(axes, "y", decimals=1)

        return panel

    panels = [
        line(PRIMARY, PRIMARY.upper(), False),
        line("average_popularity", "Popularity of the top 10", False),
        line("coverage", "Coverage of the top 10", True),
    ]
    return draw("debias", (8.6, 2.7), panels, "trade-off between accuracy and exposure by debias strength")


def singular_values(values: Mapping[str, Sequence[float]], labels: Mapping[str, str]) -> str | None:
    """Relative singular values of centred representations, largest first, on a log scale; None where nothing varies."""
    if not any(values[name][0] > 0 for name in labels if name in values):
        return None  # without text there is no side information
    colours = {
        "side_items": COLOURS["debiased"],
        "side_users": COLOURS["debiased"],
        "text_items": COLOURS["text"],
        "text_users": COLOURS["text"],
    }

    def panel(axes: Axes) -> None:
        for name in (name for name in labels if name in values):
            shown = np.asarray(values[name])
            shown = shown[shown > 1e-7]
            style = "-" if name.endswith("items") else (0, (4, 2))
            axes.plot(np.arange(1, len(shown) + 1), shown, color=colours[name], linestyle=style, label=labels[name])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rank of the singular value")
        axes.set_ylabel("relative to the largest")
        axes.legend(loc="lower left")

    return draw("singular", (8.6, 3.3), [panel], "singular values of side representations and of the raw text embeddings")


def exposure(by_popularity: Mapping[str, Sequence[float]], by_propensity: Mapping[str, Sequence[float]]) -> str:
    """Share of the top-10 places by decile of the items, by popularity and by propensity."""

    def bars(shares: Mapping[str, Sequence[float]], title: str, xlabel: str) -> Callable[[Axes], None]:
        def panel(axes: Axes) -> None:
            width = 0.8 / len(shares)
            for number, name in enumerate(name for name in SCORES if name in shares):
                place = np.arange(1, 11) + (number - (len(shares) - 1) / 2) * width
                axes.bar(place, shares[name], width, color=COLOURS[name], label=LABELS[name])
            axes.axhline(1 / 10, color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
            axes.set_title(title)
            axes.set_xlabel(xlabel)
            axes.set_xticks(range(1, 11))
            axes.grid(axis="x", visible=False)
            _percent(axes, "y")

        return panel

    panels = [
        bars(by_popularity, "Exposure by popularity of the item", "decile of popularity, 10 the most popular"),
        bars(by_propensity, "Exposure by propensity of the item", "decile of the items' propensity, 10 the largest"),
    ]
    description = "share of the top-10 places by popularity and by propensity of the item"
    return draw("exposure", (8.6, 3.5), panels, description, shared_legend=True)


def _series(curve: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> (epochs, values) of the wanted numbers of a learning curve, nested names joined by dots."""
    from components.settings import flat

    series: dict[str, tuple[list[float], list[float]]] = {}
    for number, row in enumerate(curve):
        for name, value in flat(row).items():
            if wanted(name) and isinstance(value, int | float):
                epochs, values = series.setdefault(name, ([], []))
                epochs.append(float(row.get("epoch", number)))
                values.append(float(value))
    return series


def _cycle() -> Iterator[str]:
    while True:
        yield from (COLOURS["debiased"], COLOURS["factual"], COLOURS["text"], COLOURS["warm"])


def _percent(axes: Axes, *sides: str, decimals: int = 0) -> None:
    for side in sides:
        getattr(axes, f"{side}axis").set_major_formatter(PercentFormatter(1.0, decimals=decimals))
