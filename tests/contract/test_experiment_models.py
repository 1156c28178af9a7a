"""Every kind of model in an experiment, ours and rivals, passes the inherited suite, and none is left out."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from components.experiment.dataset import ExperimentData, read
from components.experiment.models import KINDS
from components.experiment.planted import write_blocks
from tests.behaviour.training import SMALL_RECIPE
from tests.contract.model_contract import ModelContract


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ExperimentData:
    root: Path = tmp_path_factory.mktemp("models")
    return read(write_blocks(root / "blocks", users_per_block=15, items_per_block=15)).embedded("all-MiniLM-L6-v2", root)


class TestPopularity(ModelContract):
    kind = "popularity"
    personal = False


class TestTextCosine(ModelContract):
    kind = "text_cosine"
    settings: ClassVar[dict[str, Any]] = {"centred": True}


class TestBM25(ModelContract):
    kind = "bm25"
    settings: ClassVar[dict[str, Any]] = {"neighbours": 50, "b": 0.5}


class TestIALS(ModelContract):
    kind = "ials"
    settings: ClassVar[dict[str, Any]] = {"factors": 8, "alpha": 10.0, "regularization": 3.0}


class TestEASE(ModelContract):
    kind = "ease"
    settings: ClassVar[dict[str, Any]] = {"l2": 30.0}


class TestEASEWithText(ModelContract):
    kind = "ease_text"
    settings: ClassVar[dict[str, Any]] = {"l2": 30.0, "text_weight": 10.0}


class TestAlphaRec(ModelContract):
    kind = "alpharec"
    settings: ClassVar[dict[str, Any]] = {"max_epochs": 8, "batch_size": 256, "embedding_dim": 16}


class TestGraph(ModelContract):
    kind = "graph"
    settings: ClassVar[dict[str, Any]] = {
        "model.embedding_dim": 8,
        "model.num_negatives": 32,
        "max_epochs": 8,
        "batch_size": 256,
        "effect": "tnie",
    }


class TestRecipe(ModelContract):
    kind = "recipe"
    settings: ClassVar[dict[str, Any]] = SMALL_RECIPE


class TestEASEWithSideRepresentations(ModelContract):
    kind = "recipe"
    settings: ClassVar[dict[str, Any]] = {
        **SMALL_RECIPE,
        "recipe": {**SMALL_RECIPE["recipe"], "members": ["graph", "ease"], "side_mix": [0.3]},
    }


class TestIALSTowardsItsText(ModelContract):
    kind = "recipe"
    settings: ClassVar[dict[str, Any]] = {**SMALL_RECIPE, "recipe": {**SMALL_RECIPE["recipe"], "members": ["factors"]}}


def test_no_kind_is_left_out() -> None:
    assert {suite.kind for suite in ModelContract.__subclasses__()} == set(KINDS)
