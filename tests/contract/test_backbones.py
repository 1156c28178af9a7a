"""Every backbone passes the inherited suite, and none is left out."""

from typing import Any, ClassVar

import pytest

from components.cllmr.backbones import BACKBONES, Backbone
from components.cllmr.config import BACKBONE_NAMES
from components.cllmr.registry import classes
from components.errors import ConfigError
from components.train.config import TrainConfig
from tests.contract.backbone_contract import BackboneContract


class TestMatrixFactorisation(BackboneContract):
    name = "mf"


class TestLightGCN(BackboneContract):
    name = "lightgcn"


class TestLightGCNAsPublishedByRLMRec(BackboneContract):
    name = "lightgcn"
    settings: ClassVar[dict[str, Any]] = {"layer_combination": "sum", "edge_keep": 0.8, "num_layers": 3}


class TestGCCF(BackboneContract):
    name = "gccf"


class TestSGL(BackboneContract):
    name = "sgl"


class TestSimGCL(BackboneContract):
    name = "simgcl"


class TestSimGCLAmongTheBatch(BackboneContract):
    name = "simgcl"
    settings: ClassVar[dict[str, Any]] = {"ssl_candidates": "batch"}


class TestDCCF(BackboneContract):
    name = "dccf"
    settings: ClassVar[dict[str, Any]] = {"ssl_weight": 1e-3}

    def test_without_layers_no_parameter_is_left_without_a_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self, "settings", {**self.settings, "num_layers": 0})
        self.test_the_gradient_of_a_step_reaches_the_table_and_every_parameter("softmax")


class TestAutoCF(BackboneContract):
    name = "autocf"


def test_every_registered_backbone_is_tested() -> None:
    assert {suite.name for suite in BackboneContract.__subclasses__()} == set(BACKBONES)


def test_the_setting_allows_every_backbone_and_no_other() -> None:
    assert set(BACKBONE_NAMES) == set(BACKBONES)
    said = r"'model.backbone' = 'lightgnc': Did you mean 'lightgcn'\? Allowed: autocf, .*simgcl\."
    with pytest.raises(ConfigError, match=said):
        TrainConfig.parse({"model": {"backbone": "lightgnc"}}, "")


def test_a_file_defines_one_kind_or_is_refused() -> None:
    with pytest.raises(TypeError, match=r"linear\.analytic defines none: a file here defines one Backbone"):
        classes("linear", Backbone)
    with pytest.raises(TypeError, match=r"linear\.ease defines EaseSettings, EaseScores, Ease: a file here defines one object"):
        classes("linear", object)
