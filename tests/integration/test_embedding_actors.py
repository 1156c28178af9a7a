"""Text embeddings by Ray Data's actors: the same as in one process, in the same order, told as they come."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.sideinfo import encoder
from components.sideinfo.config import SideinfoConfig

ROWS = 60


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Texts of different length, some twice, some missing, in row groups of ten."""
    texts = [
        None if row % 7 == 3 else f"A book on {'the history of ' * (row % 5)}chess, part {row // 2}." for row in range(ROWS)
    ]
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item": range(ROWS), "profile": pa.array(texts, pa.string())}), path, row_group_size=10)
    return path


def test_actors_give_what_one_process_gives(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "BLOCK", 16)  # several blocks, the last one shorter
    told: dict[int, list[int]] = {0: [], 2: []}
    few = table.with_name("few.parquet")
    pq.write_table(pa.table({"profile": ["A book.", None, "A film."]}), few)
    tables = {"few": few, "items": table}
    both = {
        actors: encoder.embed(encoder.TextEncoder(SideinfoConfig(encoder_actors=actors)), tables, told[actors].append)
        for actors in told
    }
    assert {name: (rows.shape, rows.dtype) for name, rows in both[2].items()} == {
        "few": ((3, 384), np.float16),
        "items": ((ROWS, 384), np.float16),
    }
    for name in tables:
        np.testing.assert_allclose(both[2][name], both[0][name], atol=2e-3)
    found = {actors: rows["items"] for actors, rows in both.items()}
    assert not both[2]["few"][1].any()
    known = np.array([text is not None for text in pq.read_table(table)["profile"].to_pylist()])
    np.testing.assert_allclose(np.linalg.norm(found[2].astype(np.float32), axis=1), known, atol=1e-3)
    assert sum(told[0]) == sum(told[2]) == known.sum() + 2
    assert len(told[2]) > 1
