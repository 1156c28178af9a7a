"""One self-contained HTML page: what was measured, what it means, with which settings.

The page needs nothing but itself (no script, no address) and is a function of its inputs: no clock, no random ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from components.artifacts import Manifest
from components.evaluate import figures
from components.evaluate.config import ACTIVITY, LABELS, NEW_ITEMS, NEW_USERS, SCORES
from components.evaluate.metrics import METRICS, PRIMARY
from components.evaluate.summary import percent, signed
from components.pages import templates
from components.settings import flat

REPRESENTATIONS = {
    "side_items": "Side representation, items",
    "side_users": "Side representation, users",
    "text_items": "Text embedding, items",
    "text_users": "Text embedding, users",
}
EXPOSURE = {
    "average_popularity": "Average popularity",
    "coverage": "Coverage",
    "gini": "Gini",
    "head_share": "Head share",
    "tail_share": "Tail share",
}
GROUP_COLUMNS = {
    "genericness_text": "Genericness, text",
    "genericness_side": "Genericness, side",
    "inflation": "Inflation",
    "written_anyway": "Written anyway",
    "exposure_factual": "Exposure, factual",
    "exposure_debiased": "Exposure, debiased",
}
PACKAGES = ("cllmr-platform", "numpy", "scipy", "implicit", "torch", "matplotlib")


@dataclass(frozen=True)
class Facts:
    """All that the page shows."""

    metrics: Mapping[str, Any]
    """Contents of metrics.json."""
    data_card: Mapping[str, Any]
    """Contents of ingest's data_card.json."""
    popularity: npt.NDArray[np.int64]
    """Training interactions by item, (num_items,)."""
    curve: Sequence[Mapping[str, Any]]
    """Contents of train's curve.json."""
    bundle: Mapping[str, Any]
    """Contents of bundle.json."""
    training: Mapping[str, Any]
    """Contents of train's training.json."""
    manifests: Mapping[str, Manifest]
    """Of the parents, by stage name."""
    settings: Mapping[str, Any]
    """Of the evaluate stage."""


def render(facts: Facts) -> str:
    """The page as HTML text."""
    environment = templates(Path(__file__).parent)
    environment.filters["number"] = number
    environment.filters["percent"] = percent
    environment.filters["signed"] = signed
    environment.filters["metric"] = metric
    return environment.get_template("report.html.jinja").render(_context(facts))


def number(value: Any) -> str:
    """A value as people read it: thousands separated, four significant digits, yes and no, lists joined."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(number(entry) for entry in value) or "none"
    return "none" if value is None or value == "" else str(value)


def metric(name: str) -> str:
    """``ndcg@10`` as NDCG@10, ``recall@10`` as Recall@10."""
    return name.upper() if name.startswith("ndcg") else name.capitalize()


def backend_banner(sideinfo: Manifest) -> dict[str, Any]:
    """Where the side information comes from: {uses_llm, text}."""
    known = {**sideinfo.config, **sideinfo.facts}
    backend = known["backend"]
    embedded = f" The texts are embedded with {known['encoder']}."
    if not known["llm"]:
        text = (
            "No LLM was used. Profiles are put together from the items' own text and a summary of each user's training items "
            f"(backend “{backend}”), so nothing on this page measures an LLM's knowledge or its bias."
        )
        return {"uses_llm": False, "text": text + embedded}
    model = f", model {known['model']}" if known.get("model") else ""
    return {"uses_llm": True, "text": f"The profiles were written by an LLM (backend “{backend}”{model}).{embedded}"}


def _context(facts: Facts) -> dict[str, Any]:
    metrics = facts.metrics
    exposure = metrics["bias"]["exposure"]
    return {
        "metrics": metrics,
        "models": [name for name in LABELS if name in metrics["results"]],  # JSON does not keep the order of the table
        "groups": [name for name in ACTIVITY if name in metrics["slices"]],
        "labels": metrics["labels"],
        "new_users": NEW_USERS,
        "new_items": NEW_ITEMS,
        "scores": SCORES,
        "primary": PRIMARY,
        "compared": ("ndcg@10", "recall@10", "ndcg@20", "recall@20"),
        "metric_names": METRICS,
        "best": {name: max(entry[name]["mean"] for entry in metrics["results"].values()) for name in METRICS},
        "sentences": metrics["summary"],
        "banner": backend_banner(facts.manifests["sideinfo"]),
        "dates": [facts.data_card["time_range"][end][:10] for end in ("first", "last")]
        if facts.data_card["time_range"]
        else None,
        "density": sum(metrics["dataset"]["num_interactions"].values())
        / (metrics["dataset"]["num_users"] * metrics["dataset"]["num_items"]),
        "data_card": _shown(facts.data_card),
        "exposure": exposure,
        "exposure_names": EXPOSURE,
        "profile_rows": _profile_rows(metrics["bias"]["profiles"]),
        "group_columns": GROUP_COLUMNS,
        "representations": REPRESENTATIONS,
        "training": _shown({name: value for name, value in facts.training.items() if name != "members"}),
        "members": facts.training.get("members", {}),
        "learned_from": facts.training["learned_from"],
        "settings": {
            **{name: _shown(manifest.config) for name, manifest in facts.manifests.items()},
            "evaluate": _shown(facts.settings),
        },
        "fingerprints": {name: manifest.fingerprint for name, manifest in facts.manifests.items()},
        "versions": _versions(facts.bundle),
        "bundle": facts.bundle,
        "figures": {name: Markup(svg) for name, svg in _figures(facts).items() if svg},  # our own drawing, not a user's text
    }


def _profile_rows(found: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any]]]:
    """Genericness, inflation and what is written anyway, as the page lists them."""
    if found is None:
        return []
    genericness = found["genericness"]
    rows = [(f"Genericness, {name}", genericness[name]) for name in ("text", "side") if name in genericness]
    anyway = found["written_anyway"]
    return [
        *rows,
        ("Inflation of sentiment", found["sentiment"]["inflation"]),
        *([("Written anyway, without evidence", anyway)] if anyway else []),
    ]


def _figures(facts: Facts) -> dict[str, str | None]:
    metrics = facts.metrics
    bias = metrics["bias"]
    return {
        "intervals": figures.intervals(metrics["results"], metrics["labels"]),
        "popularity": figures.popularity(facts.popularity),
        "training": figures.training(facts.curve),
        "debias": figures.debias_curve(metrics["lambda_curve"], metrics["debias_strength"]),
        "singular": figures.singular_values(metrics["singular_values"], REPRESENTATIONS),
        "exposure": figures.exposure(bias["exposure_by_popularity_decile"], bias["propensity"]["exposure_by_decile"]),
    }


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings flat, without long lists (curves have figures)."""
    return {name: value for name, value in flat(values).items() if not (isinstance(value, list) and len(value) > 12)}


def _versions(bundle: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an evaluation without the bare backbone runs without torch
    return {**{name: str(value) for name, value in bundle.get("versions", {}).items()}, **found}
