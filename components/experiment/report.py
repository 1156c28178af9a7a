"""One self-contained HTML page for a set of studies: tables, figures, settings. No script, no address, no clock."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from components.evaluate.figures import COLOURS, INK, MUTED, draw
from components.evaluate.metrics import PRIMARY
from components.experiment.suites import Study
from components.experiment.tables import grids
from components.pages import templates

CYCLE = (*COLOURS.values(), "#cc79a7", "#56b4e9")  # the rest of the same palette


def render(studies: Sequence[Study], facts: Mapping[str, Any]) -> str:
    """The page as HTML text.

    Args:
        studies: in the order of the page.
        facts: "seeds", "text_encoder", "versions", "hardware": what the figures were measured with.
    """
    environment = templates(Path(__file__).parent)
    sections = [
        {
            "study": study,
            "grids": [
                (grid, [list(zip(cells, marks, strict=True)) for cells, marks in zip(grid.rows, grid.best, strict=True)])
                for grid in grids(study)
            ],
            "figures": [(caption, Markup(svg)) for caption, svg in figures(study)],  # our own drawing, not a user's text
        }
        for study in studies
    ]
    return environment.get_template("report.html.jinja").render(sections=sections, facts=facts)


def figures(study: Study) -> list[tuple[str, str]]:
    """(caption, SVG) of each figure of a study."""
    found = []
    for number, (dataset, result) in enumerate(study.datasets.items()):
        name = f"{study.name}-{number}"
        if study.name == "collapse" and result.get("singular_values"):
            caption = (
                f"{dataset}: singular values of the side representations at {max(study.extra['levels']['dim'])} dimensions."
            )
            found.append((caption, _singular(name, result["singular_values"])))
            caption = f"{dataset}: {PRIMARY.upper()} and effective rank by number of dimensions."
            found.append((caption, _by_dimension(f"{name}-dim", result["models"], study.extra["levels"])))
        elif study.name == "noise" and result["models"]:
            levels = study.extra["levels"]
            found.append((f"{dataset}: {PRIMARY.upper()} by noise, a line per rank.", _lines(name, result["models"], levels)))
        elif study.name in ("coldstart", "coldusers"):
            found.append(
                (
                    f"{dataset}: mean and standard deviation over draws.",
                    _bars(name, result["models"], ("ndcg@10", "recall@10")),
                )
            )
        elif study.name == "bias":
            found.append((f"{dataset}: share of the top ten that injected items hold.", _exposure(name, result["propensity"])))
        elif result["models"]:
            found.append((f"{dataset}: mean and standard deviation over seeds.", _bars(name, result["models"], (PRIMARY,))))
    return found


def _bars(name: str, models: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Mean and deviation of every model as dots, a panel per metric."""
    names = list(models)[::-1]

    def panel(metric: str) -> Any:
        def of(axes: Axes) -> None:
            values = [models[one]["test"][metric] for one in names]
            axes.errorbar(
                [value["mean"] for value in values],
                range(len(names)),
                xerr=[value["std"] for value in values],
                fmt="o",
                color=COLOURS["debiased"],
                ecolor=MUTED,
            )
            axes.set_yticks(range(len(names)), [models[one].get("label", one) for one in names] if metric == metrics[0] else [])
            axes.tick_params(axis="y", labelcolor=INK)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(f"{metric.upper() if metric.startswith('ndcg') else metric.capitalize()} on test")

        return of

    return draw(name, (8.6, 0.9 + 0.28 * len(names)), [panel(metric) for metric in metrics], "accuracy of every model")


def _lines(name: str, models: Mapping[str, Mapping[str, Any]], levels: Mapping[str, Sequence[float]]) -> str:
    noises, ranks = levels["noise"], levels["rank"]

    def panel(axes: Axes) -> None:
        for rank, colour in zip(ranks, CYCLE, strict=False):
            values = [models[f"noise {noise:g}, rank {rank}"]["test"][PRIMARY] for noise in noises]
            place = np.arange(len(noises))
            axes.errorbar(
                place,
                [value["mean"] for value in values],
                yerr=[value["std"] for value in values],
                color=colour,
                marker="o",
                markersize=4,
                label=f"rank {rank}",
            )
        axes.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
        axes.set_xlabel("noise: length of the perturbation of a spectrum row of length 1")
        axes.set_ylabel(f"{PRIMARY.upper()} on test")
        axes.legend(loc="best")

    return draw(name, (8.6, 3.4), [panel], "accuracy by noise and rank")


def _by_dimension(name: str, models: Mapping[str, Mapping[str, Any]], levels: Mapping[str, Sequence[Any]]) -> str:
    def points(encoder: str, value: Any) -> list[float]:
        found = (models.get(f"{encoder}, d = {dim}") for dim in levels["dim"])
        return [math.nan if one is None else value(one) for one in found]

    def share(model: Mapping[str, Any]) -> float:
        ranks = model["effective_rank"]
        return float((ranks["side_users"] + ranks["side_items"]) / (2 * model["dim"]))

    def panel(title: str, value: Any, deviation: Any, top: float | None = None) -> Any:
        def of(axes: Axes) -> None:
            for encoder, colour in zip(levels["encoder"], CYCLE, strict=False):
                axes.errorbar(
                    range(len(levels["dim"])),
                    points(encoder, value),
                    yerr=points(encoder, deviation),
                    color=colour,
                    marker="o",
                    markersize=4,
                    label=encoder,
                )
            axes.set_xticks(range(len(levels["dim"])), [str(dim) for dim in levels["dim"]])
            axes.set_xlabel("dimensions")
            axes.set_title(title)
            if top is not None:
                axes.set_ylim(0, top)

        return of

    panels = [
        panel(f"{PRIMARY.upper()} on test", lambda one: one["test"][PRIMARY]["mean"], lambda one: one["test"][PRIMARY]["std"]),
        panel("Effective rank, share of the dimensions", share, lambda one: 0.0, top=1.05),
    ]
    return draw(name, (8.6, 3.6), panels, "accuracy and effective rank of each encoder by dimension", shared_legend=True)


def _singular(name: str, encoders: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    def panel(side: str, title: str) -> Any:
        def of(axes: Axes) -> None:
            for (encoder, values), colour in zip(encoders.items(), CYCLE, strict=False):
                shown = [value if value > 0 else math.nan for value in values.get(side, [])]
                axes.plot(range(1, len(shown) + 1), shown, color=colour, label=encoder)
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("component")
            axes.set_ylabel("singular value, relative")
            axes.legend(loc="lower left")

        return of

    panels = [panel("side_users", "Users"), panel("side_items", "Items")]
    return draw(name, (8.6, 3.4), panels, "singular values of the side representations of each encoder")


def _exposure(name: str, conditions: Sequence[Mapping[str, Any]]) -> str:
    kinds = (("clean", COLOURS["text"]), ("inflated", COLOURS["factual"]), ("debiased", COLOURS["debiased"]))

    def panel(axes: Axes) -> None:
        for number, (kind, colour) in enumerate(kinds):
            values = [one[f"exposure_{kind}"] for one in conditions]
            place = np.arange(len(conditions)) + (number - 1) * 0.27
            axes.bar(
                place,
                [value["mean"] for value in values],
                0.27,
                yerr=[value["std"] for value in values],
                color=colour,
                label=kind,
            )
        axes.set_xticks(
            range(len(conditions)),
            [f"{one['formulation']}\n{one['kind']}, {one['strength']:g}" for one in conditions],
            rotation=60,
            ha="right",
        )
        axes.set_ylabel("share of the top ten")
        axes.grid(axis="x", visible=False)

    return draw(name, (8.6, 4.4), [panel], "exposure of injected items of three models", shared_legend=True)
