"""Every side encoder passes the inherited suite, and none is left out."""

from typing import Any, ClassVar

from components.cllmr.encoders import ENCODERS
from tests.contract.encoder_contract import EncoderContract


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
