"""MovieLens-100k as the `recbole` distribution carries it, found through package metadata: recbole is never imported."""

import csv
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from components.errors import DataError
from components.ids import ITEM_ID, RATING, TIMESTAMP, TITLE, USER_ID
from components.ingest.config import SAMPLE_DISTRIBUTION, SAMPLE_HINT, sample_version

ITEM_TEXT_COLUMNS = ("release_year", "genres")
FOLDER = "recbole/dataset_example/ml-100k"
_RENAMED = {"movie_title": TITLE, "class": "genres"}
# the data set's own way to say "no title, no year, no genre" (in one film misspelt)
_UNKNOWN = {"unknown", "unkonwn"}

_ARTICLES = "The|A|An|Das|Der|Die|Det|Il|L'|La|Le|Les|O|El|Los|Las|Lo|Un|Una|Une"
_ARTICLE_LAST = re.compile(rf"^(?P<rest>[^()]+), (?P<article>{_ARTICLES})$")
_OTHER_TITLE = re.compile(r"^(?P<title>.+?) \((?P<other>.+)\)$")


def locate(kind: str) -> Path:
    """Path of ``ml-100k.<kind>`` (inter, item or user).

    Raises:
        DataError: the distribution is not installed, or does not contain the file.
    """
    sample_version()
    wanted = f"{FOLDER}/ml-100k.{kind}"
    try:
        entries = distribution(SAMPLE_DISTRIBUTION).files or []
    except PackageNotFoundError:  # removed between the two look-ups
        entries = []
    for entry in entries:
        if entry.as_posix() == wanted and (path := Path(str(entry.locate()))).is_file():
            return path
    raise DataError(f"distribution '{SAMPLE_DISTRIBUTION}' has no file {wanted}.", f"Install it again: {SAMPLE_HINT}")


def interactions() -> Any:
    """DataFrame of text: user_id, item_id, rating (1 to 5), timestamp (Unix seconds); 100,000 rows."""
    return _read("inter")[[USER_ID, ITEM_ID, RATING, TIMESTAMP]]


def items() -> Any:
    """DataFrame of text: item_id, title, release_year, genres ("Comedy, Drama"); "" where unknown; 1,682 rows."""
    frame = _read("item")
    frame = frame.mask(frame.apply(lambda column: column.str.casefold().isin(_UNKNOWN)), "")
    frame[TITLE] = frame[TITLE].map(natural_title)
    frame["genres"] = frame["genres"].str.split().str.join(", ")
    return frame[[ITEM_ID, TITLE, *ITEM_TEXT_COLUMNS]]


def users() -> Any:
    """DataFrame of text: user_id, age, gender, occupation, zip_code; 943 rows."""
    return _read("user")


def natural_title(title: str) -> str:
    """A catalogue title as it is spoken.

    >>> natural_title("Tin Drum, The (Blechtrommel, Die)")
    'The Tin Drum (Die Blechtrommel)'
    """
    if found := _OTHER_TITLE.match(title):
        return f"{_article_first(found['title'])} ({_article_first(found['other'])})"
    return _article_first(title)


def _article_first(title: str) -> str:
    found = _ARTICLE_LAST.match(title)
    if not found:
        return title
    space = "" if found["article"].endswith("'") else " "
    return f"{found['article']}{space}{found['rest']}"


def _read(kind: str) -> Any:
    import pandas as pd

    frame = pd.read_csv(locate(kind), sep="\t", dtype=str, na_filter=False, quoting=csv.QUOTE_NONE, encoding="utf-8")
    return frame.rename(columns=lambda header: _RENAMED.get(name := header.partition(":")[0], name))
