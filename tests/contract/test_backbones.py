"""Every backbone passes the inherited suite, and none is left out."""

import doctest
from typing import Any, ClassVar, get_args

from components.cllmr import backbones
from components.cllmr.backbones import BACKBONES
from components.cllmr.config import ModelConfig
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


class TestAutoCF(BackboneContract):
    name = "autocf"


def test_every_registered_backbone_is_tested() -> None:
    assert {suite.name for suite in BackboneContract.__subclasses__()} == set(BACKBONES)


def test_the_setting_allows_every_registered_backbone_and_no_other() -> None:
    assert set(get_args(ModelConfig.model_fields["backbone"].annotation)) == set(BACKBONES)


def test_the_example_of_adding_a_backbone_works() -> None:
    result = doctest.testmod(backbones)
    assert result.attempted > 0
    assert result.failed == 0
