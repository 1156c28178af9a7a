"""The propensity of the profiles' writer, measured: how generic its texts are, what they praise, and whom that exposes.

Everything is measured on the items that have a profile, before and after the side encoder (text embeddings against side
representations) and before and after debiasing (exposure in the factual against the debiased top ten). Of profiles that no LLM
wrote, it is the propensity of the items' own texts.

Where the LLM wrote reference texts, with the evidence withheld, the part of a profile along its reference is what it writes
anyway (`components.cllmr.effects.reference_texts`).

Sentiment is counted with a list of plain English words: what is compared is a profile with its own source, so what the list
lacks is lacking on both sides. It knows neither negation nor irony, and other languages have a sentiment of zero. (The usual
libraries are no longer maintained, or bring a model with them whose own propensity would have to be measured first.)
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from components.cllmr.effects.base import centred
from components.cllmr.effects.reference_texts import share_written_anyway
from components.evaluate.bias import correlation, exposure, genericness
from components.evaluate.metrics import IntArray
from components.ids import ITEM, REVIEW, TITLE
from components.ingest.dataset import Dataset

Floats = npt.NDArray[np.floating]

MIN_GROUP = 5
"""Items of a group that is shown: fewer say nothing."""
MAX_GROUPS = 12
"""Groups that are shown, the largest."""

_WORD = re.compile(r"[^\W\d_]+")
_PRAISE = (
    "amazing appealing attractive authentic beautiful beautifully beloved best breathtaking brilliant captivating "
    "charming classic clever comfortable compelling delicious delight delightful durable easy elegant endearing "
    "engaging enjoy enjoyable enjoyed enjoys entertaining epic essential excellent exceptional exciting exquisite "
    "fantastic fascinating favorite favourite fine finest flawless fresh fun funny gem good gorgeous great gripping "
    "happy hilarious iconic ideal impressive incredible insightful inspiring intriguing joy legendary love loved "
    "lovely loves magical magnificent masterful masterpiece memorable nice outstanding perfect perfectly pleasant "
    "pleased powerful praised recommend recommended reliable remarkable rewarding rich satisfied satisfying "
    "sensational smart special spectacular splendid strong stunning stylish sturdy sublime superb superior sweet "
    "terrific thrilling timeless touching treasure triumph unforgettable unique useful vivid warm wonderful worth"
)
_BLAME = (
    "annoying awful awkward bad bland bleak boring broke broken cheap cheaply clumsy confusing crude damaged "
    "defective difficult dire dirty disappointed disappointing disappointment disgusting dreadful dull failed fails "
    "failure fake faulty flat flawed flimsy forgettable fragile garbage hate hated hates horrible inferior irritating "
    "junk lacking lame lazy leaks mediocre mess messy misleading overpriced pathetic poor poorly pointless "
    "predictable refund returned ridiculous rough rubbish ruined shallow shoddy silly slow sloppy stale stupid "
    "terrible tedious tired trash ugly uncomfortable uneven unpleasant unreliable unusable useless waste wasted weak "
    "worse worst worthless wrong"
)
_POSITIVE, _NEGATIVE = frozenset(_PRAISE.split()), frozenset(_BLAME.split())


def sentiment(text: str) -> float:
    """Positive minus negative words, as a share of all words: -1 to 1, 0 for a text without words."""
    words = _WORD.findall(text.casefold())
    balance = sum(word in _POSITIVE for word in words) - sum(word in _NEGATIVE for word in words)
    return balance / len(words) if words else 0.0


def source_texts(training: Dataset) -> list[str]:
    """What is known of each item without its profile: title, text columns and reviews, (num_items,)."""
    names = [TITLE, *training.item_text_columns]
    told = [[value for value in row if value] for row in training.items[names].itertuples(index=False, name=None)]
    if REVIEW in training.interactions:
        for item, review in zip(training.interactions[ITEM], training.interactions[REVIEW], strict=True):
            if review:
                told[item].append(review)
    return [" ".join(values) for values in told]


def report(
    profiles: Sequence[str],
    sources: Sequence[str],
    groups: Sequence[Sequence[str]],
    text: Floats,
    references: Floats | None,
    side: Floats,
    popularity: IntArray,
    tops: Mapping[str, IntArray],
) -> dict[str, Any] | None:
    """What the profiles favour, and what becomes of it; None where no item has a profile.

    Args:
        profiles: by item, "" where there is none.
        sources: see `source_texts`.
        groups: names of the groups each item belongs to, such as "Genres: Drama".
        text: text embeddings with unit rows, (num_items, dim).
        references: embeddings of the reference texts of the items' classes, (num_items, dim), rows of zeros where there is
            none; None where no LLM wrote.
        side: side representations of the items, (num_items, any), or (num_items, 0) without an encoder.
        popularity: training interactions, (num_items,).
        tops: top lists (num_users, k) by the name of their score, "factual" and "debiased".

    Returns:
        "items" that are measured; "genericness" (mean cosine to all profiles) of the "text" and of the "side" representation:
        mean, std, and its correlation with the logarithm of popularity; the same of what is "written_anyway", the share of a
        profile that is along its reference, None without references; "sentiment" of "profile" and "source", and the
        "inflation", one minus the other, with the same correlation; "exposure" by score: its correlations with genericness,
        inflation and what is written anyway; "groups": the largest, each with its means, beside those of all items, and its
        exposure by score: 1 is what as many items would get of equally shared exposure.
    """
    told = np.array([bool(profile) for profile in profiles])
    if not told.any():
        return None
    log_popularity = np.log1p(popularity[told])
    generic = {"text": genericness(text[told])}
    if side.shape[1]:
        lengths = np.linalg.norm(side[told], axis=1, keepdims=True)
        generic["side"] = genericness(np.divide(side[told], lengths, out=np.zeros_like(side[told]), where=lengths > 0))
    of_profile, of_source = (
        np.array([sentiment(entry) for entry, is_told in zip(texts, told, strict=True) if is_told])
        for texts in (profiles, sources)
    )
    inflation = of_profile - of_source
    favoured = {"genericness": generic["text"], "inflation": inflation}
    if references is not None:
        favoured["written_anyway"] = share_written_anyway(centred(text), centred(references, around=text))[told]
    shown = {name: exposure(top, len(told))[told] for name, top in tops.items()}
    relative = {name: counts / max(counts.mean(), 1e-12) for name, counts in shown.items()}
    columns = {
        **{f"genericness_{name}": values for name, values in generic.items()},
        **{name: values for name, values in favoured.items() if name != "genericness"},
        **{f"exposure_{name}": values for name, values in relative.items()},
    }
    members = _members([group for group, is_told in zip(groups, told, strict=True) if is_told])
    return {
        "items": int(told.sum()),
        "genericness": {name: _spread(values, log_popularity) for name, values in generic.items()},
        "written_anyway": _spread(favoured["written_anyway"], log_popularity) if "written_anyway" in favoured else None,
        "sentiment": {
            "profile": round(float(of_profile.mean()), 6),
            "source": round(float(of_source.mean()), 6),
            "inflation": _spread(inflation, log_popularity),
        },
        "exposure": {
            name: {f"correlation_{what}": correlation(counts, values) for what, values in favoured.items()}
            for name, counts in shown.items()
        },
        "groups": [
            {
                "group": name,
                "items": len(rows),
                **{column: round(float(values[rows].mean()), 6) for column, values in columns.items()},
            }
            for name, rows in [("all", np.arange(len(log_popularity))), *members]
        ],
    }


def _spread(values: Floats, log_popularity: Floats) -> dict[str, float | None]:
    return {
        "mean": round(float(values.mean()), 6),
        "std": round(float(values.std()), 6),
        "correlation_log_popularity": correlation(values, log_popularity),
    }


def _members(groups: Sequence[Sequence[str]]) -> list[tuple[str, IntArray]]:
    """Rows of the largest groups, those of most items first."""
    found: dict[str, list[int]] = {}
    for row, names in enumerate(groups):
        for name in dict.fromkeys(names):
            found.setdefault(name, []).append(row)
    large = sorted((name for name in found if len(found[name]) >= MIN_GROUP), key=lambda name: (-len(found[name]), name))
    return [(name, np.array(found[name])) for name in large[:MAX_GROUPS]]
