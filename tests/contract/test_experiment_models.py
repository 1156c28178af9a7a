"""Every kind of model in an experiment, ours and rivals, passes the inherited suite, and none is left out."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from components.errors import ConfigError
from components.experiment.config import BASELINES, Kind, ModelSpec
from components.experiment.dataset import ExperimentData, read
from components.experiment.models import KINDS, check
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


@pytest.mark.parametrize("suite", ModelContract.__subclasses__(), ids=lambda suite: suite.__name__)
def test_settings_that_are_fitted_pass_the_check(suite: type[ModelContract]) -> None:
    check(ModelSpec(name="mine", kind=suite.kind, settings=suite.settings))


@pytest.mark.parametrize("spec", BASELINES.values(), ids=lambda spec: spec.name)
def test_the_grids_of_all_baselines_pass_the_check(spec: ModelSpec) -> None:
    check(spec)


IALS = {"factors": 8, "alpha": 1.0, "regularization": 1}


@pytest.mark.parametrize(
    ("kind", "settings", "grid", "said"),
    [
        ("ials", {"factor": 3}, {}, r"unknown setting 'mine\.settings\.factor'\. Did you mean 'factors'\?"),
        ("ials", {"factors": 3}, {}, r"setting 'mine\.settings\.alpha' = .*: Field required\."),
        ("ials", IALS, {"factors": (8, "many")}, r"'mine\.settings\.factors' = 'many': Input should be a valid integer"),
        ("ials", IALS, {"seed": (1, 2)}, r"unknown setting 'mine\.settings\.seed'\."),
        ("popularity", {"l2": 3.0}, {}, r"unknown setting 'mine\.settings\.l2'\."),
        ("bm25", {"neighbors": 10, "b": 0.5}, {}, r"'mine\.settings\.neighbors'\. Did you mean 'neighbours'\?"),
        ("ease", {"l2": "1e3"}, {}, r"'mine\.settings\.l2' = '1e3': Input should be a valid number"),
        ("ials", IALS | {"factors": 0}, {}, r"'mine\.settings\.factors' = 0: Input should be greater than 0"),
        ("bm25", {"b": 0.5}, {"neighbours": (20, 0)}, r"'mine\.settings\.neighbours' = 0: Input should be greater than 0"),
        ("ease", {}, {"l2": (1, -2)}, r"'mine\.settings\.l2' = -2: Input should be greater than 0"),
        ("ease", {"l2": 1, "item_power": 2}, {}, r"'mine\.settings\.item_power' = 2: Input should be less than or equal to 1"),
        ("ease", {"l2": 1, "side_weight": 1}, {}, r"unknown setting 'mine\.settings\.side_weight'"),
        ("ease_text", {"l2": 1, "text_weight": -1}, {}, r"'mine\.settings\.text_weight' = -1: Input should be greater than or"),
        ("alpharec", {"temperature": 0.0}, {}, r"'mine\.settings\.temperature' = 0\.0: Input should be greater than 0"),
        ("recipe", {"spectrum_rank": "abc"}, {}, r"'model\.settings\.spectrum_rank' = 'abc': Input should be a valid integer"),
        ("ease_text", {"l2": 3.0}, {}, r"mine\.settings\.text_weight' = .*: Field required"),
        ("alpharec", {"temp": 0.1}, {}, r"'mine\.settings\.temp'\. Allowed: batch_size, .*temperature\."),
        ("graph", {}, {"model.temperature": (0.1, -1.0)}, r"'model\.settings\.model\.temperature' = -1\.0"),
        ("graph", {}, {"model.temperature": ()}, r"grid of model 'mine' has no value of 'model\.temperature'\. Give one or"),
        ("graph", {"seed": 7}, {}, r"'model\.settings\.seed' = 7: an experiment decides it\. Set first_seed and seeds"),
        ("graph", {}, {"seed": (1, 2)}, r"'model\.settings\.seed' = 1: an experiment decides it"),
        ("recipe", {"num_workers": 4}, {}, r"'model\.settings\.num_workers' = 4: .* Leave it out: .* by one worker"),
        ("recipe", {"warm_start": "champion"}, {}, r"'model\.settings\.warm_start' = 'champion': .* begin with nothing"),
        ("recipe", {}, {"effect": ("none",)}, r"grid of model 'mine' has 'effect': a recipe has a grid of its own.*Leave it"),
        ("ease", {}, {"l2": ()}, r"grid of model 'mine' has no value of 'l2'\. Give one or more, or leave it out\."),
    ],
)
def test_what_a_fit_would_refuse_is_told_before_it(
    kind: Kind, settings: dict[str, Any], grid: dict[str, tuple[Any, ...]], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check(ModelSpec(name="mine", kind=kind, settings=settings, grid=grid))


def test_no_kind_is_left_out() -> None:
    assert {suite.kind for suite in ModelContract.__subclasses__()} == set(KINDS)
