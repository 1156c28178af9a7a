"""The spectrum stage on a small data set: files, facts, errors, repeatability."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from components.errors import ConfigError, DataError
from components.spectrum.stage import run
from tests.sideinfo_parents import HELD_OUT_ONLY, SMALL, write_ingest


def test_the_stage_writes_the_rows_of_every_user_and_item_and_an_energy_report(tmp_path: Path) -> None:
    ingest = write_ingest(tmp_path / "store", SMALL)
    found = run({"rank": 2.0}, str(tmp_path / "store"), ingest=ingest)  # KFP gives integers as floats
    arrays = load_file(found.path() / "spectrum.safetensors")
    assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == {
        "users": ((4, 2), "float32"),
        "items": ((5, 2), "float32"),
        "singular_values": ((2,), "float32"),
    }
    norms = np.linalg.norm(np.concatenate([arrays["users"], arrays["items"]]), axis=1)
    assert norms.mean() == pytest.approx(1.0, abs=1e-6)
    assert (arrays["users"][3] == 0).all()  # no training interaction
    energy = json.loads((found.path() / "energy.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(energy["singular_values"], arrays["singular_values"], rtol=1e-6)
    assert [entry["rank"] for entry in energy["energy_share"]] == [1, 2]
    assert energy["energy_share"][-1]["share"] == pytest.approx(found.facts["energy_share"], abs=1e-6)
    assert found.facts["rank"] == 2
    assert found.facts["largest_singular_value"] == pytest.approx(1.0)  # always, of a symmetrically normalised matrix
    assert 0 < found.facts["smallest_singular_value"] <= 1


def test_two_runs_write_the_same_bytes_and_a_third_is_skipped(tmp_path: Path) -> None:
    first, second = (
        run({"rank": 2}, str(tmp_path / name), ingest=write_ingest(tmp_path / name, SMALL)) for name in ("one", "two")
    )
    assert first.files == second.files
    again = run({"rank": 2}, str(tmp_path / "one"), ingest=write_ingest(tmp_path / "one", SMALL))
    assert again.created_at == first.created_at
    assert again.seconds == first.seconds
    assert (
        run({"rank": 3}, str(tmp_path / "one"), ingest=write_ingest(tmp_path / "one", SMALL)).fingerprint != first.fingerprint
    )


def test_held_out_interactions_do_not_change_the_spectrum(tmp_path: Path) -> None:
    spectra = [
        run({"rank": 3}, str(tmp_path / world.name), ingest=write_ingest(tmp_path / world.name, world))
        for world in (SMALL, SMALL.with_other_held_out())
    ]
    assert spectra[0].files == spectra[1].files


def test_a_rank_beyond_the_matrix_is_an_error_that_names_the_largest_one(tmp_path: Path) -> None:
    ingest = write_ingest(tmp_path, SMALL)
    with pytest.raises(ConfigError, match=r"'spectrum.rank' = 5: at most 4 with 4 users and 5 items.*spectrum.rank=4"):
        run({"rank": 5}, str(tmp_path), ingest=ingest)
    assert list((tmp_path / "spectrum").iterdir()) == []
    assert run({"rank": 4}, str(tmp_path), ingest=ingest).facts["rank"] == 4


def test_data_without_training_interactions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training interactions"):
        run({"rank": 2}, str(tmp_path), ingest=write_ingest(tmp_path, HELD_OUT_ONLY))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 0}, r"setting 'spectrum.rank' = 0: .*greater than 0"),
        ({"normalisation": "symm"}, r"setting 'spectrum.normalisation' = 'symm': .*'sym' or 'raw'"),
        ({"rnak": 3}, r"unknown setting 'spectrum.rnak'.*'rank'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config, str(tmp_path), ingest=write_ingest(tmp_path, SMALL))
