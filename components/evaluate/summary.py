"""What the figures say, in plain sentences: also when a simple baseline wins."""

from collections.abc import Mapping
from typing import Any

from components.evaluate.metrics import PRIMARY

METRIC = PRIMARY.upper()


def sentences(figures: Mapping[str, Any]) -> list[str]:
    """The verdict of an evaluation, the most important first.

    Args:
        figures: contents of metrics.json (results, labels, comparison, bias, debias_strength).
    """
    result = [_against(figures, figures["comparison"]["strongest_baseline"], "the strongest baseline")]
    if "lightgcn" in figures["results"] and figures["comparison"]["strongest_baseline"] != "lightgcn":
        result.append(_against(figures, "lightgcn", "the same backbone without side information"))
    result += [_debiasing(figures), _text(figures)]
    return [sentence for sentence in result if sentence]


def _against(figures: Mapping[str, Any], rival: str | None, role: str) -> str:
    """Debiased score against one rival: ahead, behind, or level when the interval of the difference holds zero."""
    if rival is None:
        return "No baseline was evaluated: the figures below stand alone."
    ours, theirs = (figures["results"][name][PRIMARY]["mean"] for name in ("debiased", rival))
    difference = figures["comparison"]["debiased_minus"][rival][PRIMARY]
    low, high = difference["ci95"]
    us, them = (figures["labels"][name] for name in ("debiased", rival))
    if low > 0:
        return f"{us} is ahead of {them}, {role}, by {_relative(ours, theirs)} ({_measured(ours, theirs, low, high)})."
    if high < 0:
        return f"{them}, {role}, is ahead of {us} by {_relative(theirs, ours)} ({_measured(theirs, ours, -high, -low)})."
    return f"{us} and {them}, {role}, are level within the noise ({_measured(ours, theirs, low, high)})."


def _measured(first: float, second: float, low: float, high: float) -> str:
    interval = f"{signed(low)} to {signed(high)}"
    return f"{METRIC} {first:.4f} against {second:.4f}, difference {interval} with 95 % confidence"


def _debiasing(figures: Mapping[str, Any]) -> str:
    strength = figures["debias_strength"]
    if strength == 0:
        return (
            "The debias strength is 0, as no propensity was found or validation chose so: the ranking that is served is the "
            "factual one."
        )
    exposure, results = figures["bias"]["exposure"], figures["results"]
    before, after = (exposure[name] for name in ("factual", "debiased"))
    change = results["debiased"][PRIMARY]["mean"] - results["factual"][PRIMARY]["mean"]
    low, high = figures["comparison"]["debiased_minus"]["factual"][PRIMARY]["ci95"]
    noise = "" if low > 0 or high < 0 else ", within the noise"
    return (
        f"Debiasing (strength {strength:g}) changes {METRIC} by {signed(change)}{noise}, coverage of the top 10 from "
        f"{percent(before['coverage'])} to {percent(after['coverage'])}, and the average popularity of a recommended item "
        f"from {before['average_popularity']:.1f} to {after['average_popularity']:.1f} interactions; an item of the factual "
        f"top 10 moves by {figures['bias']['rank_shift']['top10']:.1f} places on average."
    )


def _text(figures: Mapping[str, Any]) -> str:
    results = figures["results"]
    if "text_cosine" not in results or "popularity" not in results:
        return ""
    text, popularity = (results[name][PRIMARY]["mean"] for name in ("text_cosine", "popularity"))
    measured = f"({METRIC} {text:.4f} against {popularity:.4f})"
    if text > popularity:
        return f"The text alone ranks better than popularity {measured}: it says something about taste."
    return f"The text alone ranks no better than popularity {measured}: expect little from side information on these data."


def _relative(better: float, worse: float) -> str:
    return percent(better / worse - 1) if worse > 0 else "any factor"


def percent(share: float, digits: int = 1) -> str:
    """0.123 as "12.3 %"."""
    return f"{100 * share:.{digits}f} %"


def signed(value: float, digits: int = 4) -> str:
    """A difference with its sign, and a minus as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "−")
