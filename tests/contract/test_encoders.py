"""Every side encoder passes the inherited suite, and none is left out."""

from typing import Any, ClassVar

import pytest
import torch

from components.cllmr.config import ENCODER_NAMES
from components.cllmr.encoders import ENCODERS
from components.errors import ConfigError
from components.train.config import TrainConfig
from tests.contract.encoder_contract import DIM, EncoderContract


class TestSSE(EncoderContract):
    name = "sse"


class TestSSEWithZeroPriorAndNoiseInAnyDirection(EncoderContract):
    name = "sse"
    settings: ClassVar[dict[str, Any]] = {"prior_mean": "zero", "noise_sign": False, "spectrum_noise": 0.1}


class TestSSEConcat(EncoderContract):
    name = "sse"
    settings: ClassVar[dict[str, Any]] = {"spectrum_input": "concat", "spectrum_dropout": 0.3}


class TestContrastiveMLP(EncoderContract):
    name = "mlp"


class TestMaskedGenerative(EncoderContract):
    name = "generative"

    def test_alignment_is_least_for_representations_that_agree(self) -> None:
        """What agrees here is the text that is told from a representation: a step down the loss makes it the node's own."""
        encoder, (text, spectrum) = self.make(), self.inputs()
        hidden, text = torch.randn(len(text) - 1, DIM, generator=torch.Generator().manual_seed(4)), text[:-1]
        optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
        losses = []
        for _ in range(200):
            losses.append(encoder.alignment(hidden, encoder.encode(text, spectrum[:-1]), text))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.5 * losses[0]
        assert encoder.alignment(hidden, hidden, text) < encoder.alignment(hidden.roll(1, 0), hidden, text)


class TestMaskedGenerativeThatHidesNothing(EncoderContract):
    name = "generative"
    settings: ClassVar[dict[str, Any]] = {"mask_ratio": 0.0}
    test_alignment_is_least_for_representations_that_agree = (
        TestMaskedGenerative.test_alignment_is_least_for_representations_that_agree
    )


class TestAttentionPooling(EncoderContract):
    name = "attention"


class TestPCA(EncoderContract):
    name = "pca"
    learns = False


class TestWhitening(EncoderContract):
    name = "whitening"
    learns = False


def test_every_registered_encoder_is_tested() -> None:
    assert {suite.name for suite in EncoderContract.__subclasses__()} == set(ENCODERS)


def test_the_setting_allows_every_encoder_none_and_no_other() -> None:
    assert set(ENCODER_NAMES) == {*ENCODERS, "none"}
    with pytest.raises(ConfigError, match=r"'model.side_encoder' = 'vae': (Did you mean .*)?Allowed: attention, .*whitening\."):
        TrainConfig.parse({"model": {"side_encoder": "vae"}}, "")
