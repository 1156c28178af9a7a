"""What is as long as the data, on disk: memory does not grow with the texts of a million rows.

Each of these is a temporary database of SQLite, which holds two MiB of it in memory and the rest in a file without a name that
is gone with the process, also when that is killed. `SQLITE_TMPDIR` or `TMPDIR` says where; without them it is /var/tmp.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import SupportsIndex, cast, overload


def _database(schema: str) -> sqlite3.Connection:
    database = sqlite3.connect("", isolation_level=None)  # "": temporary
    database.executescript(f"PRAGMA journal_mode = OFF; {schema}")
    return database


class Texts(Sequence[str | None]):
    """A text per row, None where there is none; read by row or one after the other.

    Args:
        texts: in the order of the rows; read once.
    """

    def __init__(self, texts: Iterable[str | None]) -> None:
        self._database = _database("CREATE TABLE texts (row INTEGER PRIMARY KEY, text TEXT)")
        self._database.executemany("INSERT INTO texts VALUES (?, ?)", enumerate(texts))
        (self._length,) = self._database.execute("SELECT count(*) FROM texts").fetchone()

    def __len__(self) -> int:
        return int(self._length)

    @overload
    def __getitem__(self, row: SupportsIndex) -> str | None: ...
    @overload
    def __getitem__(self, row: slice) -> list[str | None]: ...
    def __getitem__(self, row: SupportsIndex | slice) -> str | list[str | None] | None:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        index = int(row) + (len(self) if int(row) < 0 else 0)
        found = self._database.execute("SELECT text FROM texts WHERE row = ?", (index,)).fetchone()
        if found is None:
            raise IndexError(f"row {int(row)} of {len(self)} texts")
        return cast(str | None, found[0])

    def __iter__(self) -> Iterator[str | None]:
        return (text for (text,) in self._database.execute("SELECT text FROM texts ORDER BY row"))

    def known(self) -> int:
        """Rows with a text."""
        (known,) = self._database.execute("SELECT count(text) FROM texts").fetchone()
        return int(known)


@dataclass(frozen=True)
class Quarantined:
    """A row without a profile although something is known of it."""

    side: str
    raw_id: str
    """Of the item or user; of a reference its group."""
    reason: str
    attempts: int
    """Answers that were looked at; 0 when none came."""
    answer: str
    """Beginning of the last answer, neutralised."""


class Quarantine:
    """The rows that were set aside, in the order of side and id."""

    def __init__(self) -> None:
        self._database = _database("CREATE TABLE rows (side TEXT, raw_id TEXT, reason TEXT, attempts INTEGER, answer TEXT)")

    def add(self, row: Quarantined) -> None:
        """One more."""
        self._database.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", astuple(row))

    def __len__(self) -> int:
        (count,) = self._database.execute("SELECT count(*) FROM rows").fetchone()
        return int(count)

    def __iter__(self) -> Iterator[Quarantined]:
        return (Quarantined(*row) for row in self._database.execute("SELECT * FROM rows ORDER BY side, raw_id"))

    def reasons(self, side: str) -> Counter[str]:
        """Rows of one side by reason."""
        counted = "SELECT reason, count(*) FROM rows WHERE side = ? GROUP BY reason"
        return Counter(dict(self._database.execute(counted, (side,))))

    def samples(self, count: int) -> list[Quarantined]:
        """Some rows, with as many different reasons as there are."""
        ranked = "SELECT *, row_number() OVER (PARTITION BY reason ORDER BY side, raw_id) AS place FROM rows"
        chosen = f"SELECT side, raw_id, reason, attempts, answer FROM ({ranked}) ORDER BY place, reason, side, raw_id LIMIT ?"
        return [Quarantined(*row) for row in self._database.execute(chosen, (count,))]


class Desk:
    """Rows on their way to a profile: what is shown of each, the request that asks for it, and what was written of it.

    A row is shown for one attempt after the other; equal data are one request. `settle` or `show` for the next attempt ends the
    waiting for this one.
    """

    def __init__(self) -> None:
        self._database = _database(
            """
            CREATE TABLE shown (row INTEGER PRIMARY KEY, attempt INTEGER, key TEXT, data TEXT);
            CREATE INDEX by_key ON shown (attempt, key);
            CREATE TABLE written (row INTEGER PRIMARY KEY, profile TEXT, tags TEXT, confidence REAL);
            """
        )

    def show(self, attempt: int, rows: Iterable[tuple[int, str, str]]) -> None:
        """Rows, each with its request's key and data, that wait for an answer of that attempt."""
        shown = ((row, attempt, key, data) for row, key, data in rows)
        self._database.executemany("INSERT OR REPLACE INTO shown VALUES (?, ?, ?, ?)", shown)

    def waiting(self, attempt: int) -> int:
        """Rows that wait for an answer of that attempt."""
        (count,) = self._database.execute("SELECT count(*) FROM shown WHERE attempt = ?", (attempt,)).fetchone()
        return int(count)

    def wanted(self, attempt: int, keys: Iterable[str]) -> set[str]:
        """Those of some keys that a row waits for."""
        asked = "SELECT key FROM shown WHERE attempt = ? AND key IN (SELECT value FROM json_each(?))"
        return {key for (key,) in self._database.execute(asked, (attempt, json.dumps(list(keys))))}

    def rows(self, attempt: int, key: str) -> tuple[list[int], str]:
        """The rows that wait for the answer to a request, and its data."""
        found = self._database.execute("SELECT row, data FROM shown WHERE attempt = ? AND key = ?", (attempt, key)).fetchall()
        return [row for row, _ in found], found[0][1] if found else ""

    def requests(self, attempt: int) -> Iterator[str]:
        """Data of the requests that rows wait for, each once, in the order of the rows; rows may be settled meanwhile."""
        self._database.executescript(
            f"""
            DROP TABLE IF EXISTS requests;
            CREATE TABLE requests AS SELECT min(row) AS row FROM shown WHERE attempt = {attempt} GROUP BY key ORDER BY 1;
            """
        )
        for (row,) in self._database.execute("SELECT row FROM requests"):
            yield self._database.execute("SELECT data FROM shown WHERE row = ?", (row,)).fetchone()[0]

    def settle(
        self, rows: Iterable[int], profile: str | None = None, tags: Sequence[str] = (), confidence: float = 0.0
    ) -> None:
        """These rows wait no more; they have that profile, or none."""
        for row in rows:
            self._database.execute("DELETE FROM shown WHERE row = ?", (row,))
            if profile is not None:
                entry = (row, profile, json.dumps(list(tags)), confidence)
                self._database.execute("INSERT INTO written VALUES (?, ?, ?, ?)", entry)

    def covered(self) -> int:
        """Rows with a profile."""
        (count,) = self._database.execute("SELECT count(*) FROM written").fetchone()
        return int(count)

    def written(self, count: int) -> Iterator[tuple[str | None, list[str] | None, float | None]]:
        """Profile, tags and confidence of the first `count` rows; None each where nothing was written."""
        following = 0
        for row, profile, tags, confidence in self._database.execute("SELECT * FROM written ORDER BY row"):
            yield from ((None, None, None) for _ in range(following, row))
            yield profile, json.loads(tags), confidence
            following = row + 1
        yield from ((None, None, None) for _ in range(following, count))
