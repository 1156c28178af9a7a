"""The recipe on a planted world: what takes part, that seeds share settings, that wrong settings are told before any work."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
from structlog.testing import capture_logs

from components.artifacts import Manifest
from components.cllmr.effects.click_propensity import ClickPropensity
from components.cllmr.linear.ensemble import by_lot
from components.cllmr.linear.scores import LinearScores
from components.errors import ArtifactError, ConfigError, DataError
from components.evaluate.metrics import rank
from components.experiment.config import ModelSpec
from components.experiment.models import check
from components.features.reader import TrainingFeatures
from components.spectrum.decompose import spectrum
from components.train import counterfactual, members, stage
from components.train.bundle import model_tensors
from components.train.config import MEMBERS, TrainConfig
from components.train.graph import trained_here
from components.train.members import GraphFit, RecipeData, TasteData
from components.train.recipe import FittedRecipe, fit_again, fit_recipe
from serving.bundle import models_of
from serving.scorer import Scorer
from tests.planted import block_world, propensity_world

RECIPE: dict[str, Any] = {
    "graph_settings": [],
    "ease_l2": [10.0, 100.0],
    "ease_side_weight": [0.0, 12.0],
    "ease_user_power": [0.15],
    "ease_item_power": [0.2],
    "ease_popularity_power": [0.0, 0.2],
    "ials_factors": [8],
    "ials_alpha": [10.0],
    "ials_regularization": [10.0],
    "ials_iterations": 3,
    "text_power": [1.0, 3.0],
}
SMALL: dict[str, Any] = {
    "model": {"embedding_dim": 8, "num_negatives": 16},
    "batch_size": 256,
    "max_epochs": 4,
    "evaluate_every": 2,
    "recipe": RECIPE,
}


def world(text: bool = True) -> tuple[RecipeData, sp.csr_array]:
    """Three blocks; half of what is held out is for validation, the rest the test."""
    planted = block_world(num_blocks=3, users_per_block=15, items_per_block=12)
    held_out = planted.matrix(planted.test)
    first = np.random.default_rng(7).random(held_out.shape) < 0.5  # not the stream that the world was drawn with
    validation, test = (sp.csr_array(np.where(part, held_out, 0).astype(np.float32)) for part in (first, ~first))
    width = slice(None) if text else slice(0, 0)
    train = sp.csr_array(planted.matrix(planted.train))
    found = spectrum(train, 6)
    places = (rows.astype(np.float32) for rows in (found.users, found.items))
    return RecipeData(train, validation, planted.user_text[:, width], planted.item_text[:, width], *places), test


def lured_world() -> tuple[RecipeData, npt.NDArray[np.bool_]]:
    """Some items' texts lure clicks, (num_items,); a fifth of the clicks is for validation."""
    planted = propensity_world(4, 40, 40, seed=1)
    seen = planted.matrix(planted.train)
    later = np.random.default_rng(1).random(seen.shape) < 0.2
    train, validation = (sp.csr_array(np.where(part, seen, 0)) for part in (~later, later))
    found = spectrum(train, 6)
    places = (rows.astype(np.float32) for rows in (found.users, found.items))
    return RecipeData(train, validation, planted.user_text, planted.item_text, *places), planted.inflated


def fitted(data: RecipeData, seed: int = 1, settings: Any = None, recipe: Any = None, **changes: Any) -> FittedRecipe:
    config = TrainConfig.parse({**SMALL, "seed": seed, "recipe": {**RECIPE, **(recipe or {})}, **changes}, "train")
    return fit_recipe(data, config, trained_here(), settings)


def test_all_members_take_part_and_the_ensemble_is_no_worse_than_the_best_on_validation() -> None:
    data, test = world()
    found = fitted(data)
    assert tuple(found.members) == tuple(found.weights) == MEMBERS
    assert found.left_out == {}
    members = {name: value for name, value in found.validation.items() if name != "ensemble"}
    assert found.validation["ensemble"] >= max(members.values()) - 1e-9
    assert found.graph is not None
    assert found.graph.item_side.shape == (36, 8)
    recall = rank(found.factual.score, sp.csr_array(data.train + data.validation), test).mean()["recall@10"]
    assert recall > 0.9, f"recall@10 {recall:.3f}"  # by chance about a third


@pytest.mark.parametrize("effect", ["none", "counterfactual_log"])
def test_a_graph_may_lend_its_side_representations_to_the_gram_matrix_without_a_part_in_the_score(effect: str) -> None:
    data, _ = world()
    found = fitted(data, recipe={"members": ["graph", "ease"], "graph_joins": False, "side_mix": [0.3]}, effect=effect)
    assert found.weights["graph"] == 0
    assert found.weights["ease"] > 0
    users = np.arange(data.train.shape[0])
    standardised = found.members["ease"].scores.score(users)
    first, of_ease = (
        np.argsort(-scores, axis=1, kind="stable")[:, :10] for scores in (found.factual.score(users), standardised)
    )
    np.testing.assert_array_equal(first, of_ease)
    without = fitted(data, recipe={"members": ["ease"], "side_mix": [0.0]}, effect=effect)
    assert not np.allclose(without.members["ease"].scores.score(users), standardised), "z is in the Gram matrix"


def test_the_gram_matrix_of_the_counterfactual_has_side_representations_of_its_own() -> None:
    found = fitted(lured_world()[0], recipe={"members": ["graph", "ease"], "graph_joins": False, "side_mix": [0.3]})
    assert found.counterfactual is not found.factual
    assert set(found.graphs) == {"factual", "counterfactual"}


def test_no_member_but_popularity_may_count_against_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    choose = members.choose_weights
    monkeypatch.setattr(
        members, "choose_weights", lambda found, negative, start: asked.append(negative) or choose(found, negative=negative)
    )
    fitted(world()[0], effect="none", recipe={"members": ["popularity", "text"]})
    assert asked == [[True, False]]


def test_a_member_without_weight_has_no_block_of_a_history() -> None:
    """Its weights between items are not in the model either, and a bundle in which the two differ is refused."""
    found = fitted(world()[0], effect="none", recipe={"members": ["ease", "text", "popularity"]})
    weights = {"ease": 0.0, "text": 0.5, "popularity": 0.5}
    found = replace(found, weights=weights, counterfactual_weights={**weights, "ease": 0.2, "text": 0.3})
    assert found.history_blocks == {"factual": [("text", 0.5)], "counterfactual": [("ease", 0.2), ("text", 0.3)]}


def test_the_same_seed_repeats_and_another_one_uses_the_settings_it_is_given() -> None:
    data, _ = world()
    users = np.arange(data.train.shape[0])
    first = fitted(data)
    np.testing.assert_array_equal(first.factual.score(users), fitted(data).factual.score(users))
    other = fitted(data, seed=2, settings=first.settings)
    assert other.settings == first.settings
    assert all(member.tried == [] for member in other.members.values())
    assert any(member.tried for member in first.members.values())


def as_factors(model: LinearScores) -> list[Any]:
    return [model.users, model.items, model.history.toarray(), model.weights.toarray()]


@pytest.mark.parametrize("effect", ["counterfactual_log", "none"])
def test_fitted_again_to_the_same_interactions_with_what_was_chosen_it_is_the_same_model(effect: str) -> None:
    data, _ = lured_world()
    config = TrainConfig.parse(
        {**SMALL, "effect": effect, "recipe": {**RECIPE, "graph_settings": [{"alignment_weight": 0.1}]}}, "train"
    )
    first = fit_recipe(data, config, trained_here())
    assert (first.counterfactual is not first.factual) == (effect != "none")
    runs: list[str] = []

    def train(data: RecipeData, config: TrainConfig, run: str) -> GraphFit:
        runs.append(run)
        return trained_here()(data, config, run)

    nothing = replace(data, validation=sp.csr_array(data.validation.shape, dtype=np.float32))
    again = fit_again(first.choices, nothing, config, train)
    for name in ("factual", "counterfactual"):
        for one, other in zip(as_factors(getattr(first, name)), as_factors(getattr(again, name)), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
    np.testing.assert_array_equal(again.propensity, first.propensity)
    assert again.choices == first.choices
    assert runs == [f"{run}.all" for run in first.graphs]
    assert not any(member.tried for member in again.members.values())


def test_fitted_again_it_knows_users_of_whom_all_was_held_out() -> None:
    data, test = world()
    keep = sp.diags_array((np.arange(45) % 3 > 0).astype(np.float32))
    train = sp.csr_array(keep @ data.train, dtype=np.float32)
    train.eliminate_zeros()
    everything = sp.csr_array(data.train + data.validation)
    config = TrainConfig.parse({**SMALL, "effect": "none", "recipe": {**RECIPE, "members": ["ease", "factors"]}}, "train")
    first = fit_recipe(replace(data, train=train, validation=sp.csr_array(everything - train)), config, trained_here())
    nothing = sp.csr_array(data.validation.shape, dtype=np.float32)
    again = fit_again(first.choices, replace(data, train=everything, validation=nothing), config, trained_here())
    users = np.arange(0, 45, 3)
    before, after = (rank(found.factual.score, everything, test, users=users).mean()["recall@10"] for found in (first, again))
    assert before < 0.6 < 0.9 < after, f"{before:.2f}, {after:.2f}"
    assert (again.weights, again.settings) == (first.weights, first.settings)


def test_of_several_settings_of_the_graph_the_best_on_validation_is_kept_and_the_counterfactual_has_it() -> None:
    data, _ = world()
    none, much = {"alignment_weight": 1e-6}, {"alignment_weight": 3.0, "temperature": 0.3, "num_layers": 1}
    names: list[tuple[str, float, float, int]] = []

    def train(data: RecipeData, config: TrainConfig, run: str) -> GraphFit:
        names.append((run, config.model.alignment_weight, config.model.temperature, config.model.num_layers))
        return trained_here()(data, config, run)

    config = TrainConfig.parse({**SMALL, "recipe": {**RECIPE, "graph_settings": [none, much], "members": ["graph"]}}, "train")
    member = fit_recipe(data, config, train).members["graph"]
    assert names == [("factual", 0.5, 0.15, 2), ("factual.1", 1e-6, 0.15, 2), ("factual.2", 3.0, 0.3, 1)]
    values = [settings.pop("value") for settings in member.tried]
    assert [{}, none, much][values.index(max(values))] == member.settings
    assert len(set(values)) == 3
    assert member.graph is not None
    assert data.validation_ndcg(member.graph.factual) == pytest.approx(max(values), abs=1e-6)
    names.clear()
    fit_recipe(data, config, train, {"graph": much})
    assert names == [("factual", 3.0, 0.3, 1)]
    names.clear()
    fit_recipe(world(text=False)[0], config, train)
    assert [run for run, *_ in names] == ["factual"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"alignement_weight": 0.1}, r"unknown setting 'recipe\.graph_settings\.alignement_weight'"),
        ({"temperature": 0.0}, r"setting 'recipe\.graph_settings\.temperature' = 0\.0: Input should be greater than 0"),
    ],
)
def test_other_settings_of_the_graph_are_checked_before_any_work(other: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig.parse({"recipe": {"graph_settings": [other]}}, "train")


@pytest.mark.parametrize("rows", ["of zeros", "of no length"])
def test_without_text_the_rest_of_the_recipe_stands(rows: str) -> None:
    data, _ = world(text=rows == "of zeros")
    data = replace(data, user_text=0 * data.user_text, item_text=0 * data.item_text)  # as the sideinfo stage writes no text
    found = fitted(data)
    assert found.left_out == {"text": "the items have no text"}
    assert found.graph is not None
    assert found.graph.item_side.shape == (36, 0)
    assert found.counterfactual is found.factual
    assert found.settings["ease"]["side_weight"] == found.settings["factors"]["prior"] == 0


def test_of_very_many_users_some_choose_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = world()
    shape = data.validation.shape
    member = LinearScores.of_factors(np.eye(shape[0]), np.random.default_rng(0).normal(size=shape[::-1]))
    everybody = rank(member.score, data.train, data.validation)
    monkeypatch.setattr(members, "MOST_CHOOSING", 20)
    some = by_lot(data.validation, 20)
    assert len(some) == 20 < len(everybody.users)
    expected = everybody.per_user["ndcg@10"][np.isin(everybody.users, some)].mean()
    assert data.validation_ndcg(member) == pytest.approx(expected)


def test_a_graph_whose_epochs_take_very_long_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = world()
    monkeypatch.setattr("components.train.recipe.MANY_EDGES", data.train.nnz - 1)
    monkeypatch.setattr("components.train.recipe.fit_members", lambda *args: 1 / 0)
    for changes, told in (({"batch_size": data.train.nnz}, 1), ({"batch_size": 2 * data.train.nnz}, 0)):
        with capture_logs() as logs, pytest.raises(ZeroDivisionError):
            fit_recipe(data, TrainConfig(**changes), trained_here())
        assert len([log for log in logs if "train.batch_size" in log.get("message", "")]) == told


@pytest.mark.parametrize(("fewest", "told"), [(42, 1), (41, 0)])
def test_where_few_users_choose_a_warning_says_how_many(fewest: int, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = world()
    monkeypatch.setattr("components.train.recipe.FEWEST_CHOOSING", fewest)
    monkeypatch.setattr("components.train.recipe.fit_members", lambda *args: 1 / 0)
    with capture_logs() as logs, pytest.raises(ZeroDivisionError):
        fit_recipe(data, TrainConfig(), trained_here())
    assert len([log for log in logs if log.get("message", "").startswith("41 users have validation")]) == told


def test_without_validation_interactions_nothing_is_fitted() -> None:
    data, _ = world()
    with pytest.raises(DataError, match=r"there are no validation interactions: \d+ are in the training split\. Give more"):
        fitted(replace(data, validation=sp.csr_array(data.validation.shape, dtype=np.float32)))


def test_a_catalogue_that_is_too_large_for_item_matrices_does_without_them_and_still_answers_who_is_new() -> None:
    data, test = world()
    found = fitted(data, recipe={"max_items": 35})
    reason = "36 items are more than recipe.max_items = 35"
    assert found.left_out == {"ease": reason, "text": reason}
    assert tuple(found.members) == ("graph", "factors", "popularity")
    assert found.history_blocks == {"factual": [], "counterfactual": []}

    def as_new(users: np.ndarray) -> np.ndarray:
        histories = (data.train.indices[slice(*data.train.indptr[[user, user + 1]])] for user in users)
        return np.stack([found.factual.folded([], history) for history in histories])

    new, known, popular = (
        rank(score, data.train, test).mean()["ndcg@10"]
        for score in (as_new, found.factual.score, found.members["popularity"].scores.score)
    )
    assert new > 0.8 * known
    assert new > 1.5 * popular


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        (False, {"members": ["text"]}, r"without 'text' \(the items have no text\)\. Add 'graph', 'factors' or 'popularity'"),
        (True, {"members": ["ease", "text"], "max_items": 35}, r"without 'ease' \(36 items .* = 35\), 'text' \(36 items .*Add"),
    ],
)
def test_where_the_data_allow_no_member_the_message_says_why_and_which_they_allow(
    text: bool, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=rf"train\.recipe\.members has none that these data allow: {said}"):
        fitted(world(text)[0], recipe=settings)


def test_gates_take_out_the_direct_effect_in_the_standard_deviations_of_the_factual_score() -> None:
    data, _ = world()
    model = {**SMALL["model"], "counterfactual": True}
    found = fitted(data, effect="gates", model=model, recipe={"members": ["graph", "popularity"]})
    assert found.graph is not None
    assert found.weights["graph"] > 0
    everyone = np.arange(data.train.shape[0])
    total, indirect = (one.score(everyone) for one in (found.graph.factual, found.graph.counterfactual))
    direct = found.weights["graph"] * (total - indirect) / total.std(axis=1, keepdims=True)
    assert np.abs(direct).max() > 0.1
    np.testing.assert_allclose(found.factual.score(everyone) - found.counterfactual.score(everyone), direct, atol=1e-4)


@pytest.mark.parametrize("model", [{}, {"side_encoder": "none"}])
def test_gates_without_side_representations_are_no_second_model(model: dict[str, Any]) -> None:
    data, _ = world(text=bool(model))
    settings = {**SMALL["model"], "counterfactual": True, **model}
    with capture_logs() as logs:
        found = fitted(data, recipe={"members": ["graph", "popularity"]}, effect="gates", model=settings)
    told = [log for log in logs if "'gates' has no effect with train.model.side_encoder = 'none'" in log.get("message", "")]
    assert len(told) == len(model), "with an encoder, it is the texts that are not there"
    assert found.counterfactual is found.factual
    np.testing.assert_array_equal(found.propensity, 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"recipe.members": ["graph", "esae"]}, r"model\.settings\.recipe\.members\.1' = 'esae'"),
        ({"recipe": {"members": []}}, r"model\.settings\.recipe\.members' = \[\]"),
        ({"recipe.ease_l2": [0.0]}, r"model\.settings\.recipe\.ease_l2\.0' = 0\.0"),
        ({"recipe.ease_l3": [1.0]}, r"unknown setting 'model\.settings\.recipe\.ease_l3'"),
        (
            {"recipe.members": ["graph"], "recipe.graph_joins": False},
            r"graph_joins' = False: members are graph; it is true unless",
        ),
        (
            {"recipe.members": ["ease", "graph"], "recipe.graph_joins": False},
            r"graph_joins' = False: members are ease, graph; it is true unless 'graph' is among them, before 'ease'",
        ),
        (
            {"recipe.members": ["ease", "text"], "effect": "gates", "model.counterfactual": True},
            r"model\.settings\.effect' = 'gates': recipe\.members are ease, text; the gates are those of 'graph'",
        ),
        ({"effect": "gates"}, r"model\.settings\.effect' = 'gates': model\.counterfactual is False"),
    ],
)
def test_wrong_settings_are_told_before_any_work(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(ModelSpec(name="mine", kind="recipe", settings=settings))


def test_what_texts_of_a_class_say_anyway_is_taken_out_of_the_score_and_no_more_is_fitted() -> None:
    data, _ = world()
    of_first = np.arange(36)[:, None] < 12  # a block, whose mean text is written of every item of it
    references = np.where(of_first, data.item_text[:12].mean(axis=0), 0).astype(np.float32)
    found = fitted(replace(data, item_references=references), effect="reference_texts")
    assert list(found.graphs) == ["factual"]
    assert found.counterfactual_weights == found.weights
    assert (found.propensity[:12] > 0.4).all()
    np.testing.assert_array_equal(found.propensity[12:], 0)
    everyone = np.arange(data.train.shape[0])
    factual, counterfactual = (model.score(everyone) for model in (found.factual, found.counterfactual))
    np.testing.assert_allclose(counterfactual[:, 12:], factual[:, 12:], atol=1e-4)
    assert np.abs(counterfactual[:, :12] - factual[:, :12]).max() > 0.1


@pytest.mark.parametrize("all_of_taste", [True, False])
def test_the_counterfactuals_weights_are_chosen_anew_only_where_validation_clicks_were_lured(
    all_of_taste: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the difference of two choices that are as good would be told as a direct effect."""
    data, _ = lured_world()
    if all_of_taste:
        monkeypatch.setattr(counterfactual, "_of_taste", lambda data: data.validation.copy())
    asked: list[int] = []
    choose = members.choose_weights
    monkeypatch.setattr(members, "choose_weights", lambda *args, **settings: asked.append(1) or choose(*args, **settings))
    found = fitted(data, recipe={"members": ["ease", "text", "popularity"]})
    assert found.counterfactual is not found.factual
    assert len(asked) == (1 if all_of_taste else 2)
    assert (found.counterfactual_weights == {name: weight for name, weight in found.weights.items() if weight}) == all_of_taste


def test_a_counterfactual_without_members_that_know_users_folds_nobody_by_the_factual_ones() -> None:
    data, _ = world()
    found = fitted(data, effect="none", recipe={"members": ["ease", "factors"]})
    assert found.factual.folding is not None
    found = replace(found, counterfactual=found.members["ease"].scores)
    factual, counterfactual = models_of(model_tensors(found, data.item_text, data.train))
    assert factual.folding is not None
    assert counterfactual.folding is None


@pytest.mark.parametrize("member", ["ease", "text"])
def test_a_counterfactual_is_not_asked_with_clicks_that_were_lured(member: Any) -> None:
    data, _ = world()
    log = data.train.copy()
    log.data[log.indptr[3] : log.indptr[4]] = [0.0] + [1.0] * (log.indptr[4] - log.indptr[3] - 1)  # user 3's first click
    places = data.user_spectrum, data.item_spectrum
    taste = TasteData(data.train, data.validation, data.user_text, data.item_text, *places, log=log)
    powers = dict.fromkeys(("user_power", "item_power", "popularity_power"), 0.0)
    settings = {"ease": {"l2": 10.0, "side_weight": 12.0, "side_mix": 0.0, **powers}, "text": {"power": 2.0}}[member]
    config = TrainConfig.parse(SMALL, "train")
    task = members.Task(taste, config, lambda config, name: pytest.fail("no graph"), None, settings, lambda **figures: None, "")
    scores, user = members._FITS[member](task).scores, np.array([3])
    assert (scores.history[[3]] != log[[3]]).nnz == 0
    assert np.abs(scores.score(user) - replace(scores, history=data.train).score(user)).max() > 1e-3


@pytest.mark.parametrize(
    ("effect", "names"), [("counterfactual_log", ["ease", "text", "popularity"]), ("reference_texts", ["popularity"])]
)
def test_a_known_users_history_told_by_somebody_new_has_the_same_scores_at_every_strength(
    effect: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of members that need no more than a history. So popularity is debiased for new users as it is for known ones."""
    monkeypatch.setattr(ClickPropensity, "taste_log", ClickPropensity.likely_taste)  # an item is in a history or it is not
    data, lured = lured_world()
    references = np.where(lured[:, None], data.item_text[lured].mean(axis=0), 0).astype(np.float32)
    data = replace(data, item_references=references)
    settings = {"members": names, "ease_l2": [50.0], "ease_side_weight": [20.0], "ease_popularity_power": [0.2]}
    found = fitted(data, effect=effect, recipe={**settings, "text_power": [1.0]})
    assert min(found.weights["popularity"], found.counterfactual_weights["popularity"]) > 0.2
    parts: Any = ("0123456789abcdef", SimpleNamespace(name="lured"), None, _features(), None)
    chosen = stage._Chosen(None, {"used": False}, [], 0.0)
    described = stage._Bundles(TrainConfig(), *parts)._header(found, 32, chosen)
    ids = [str(row) for row in range(160)]
    items = [{"item_id": name, "title": ""} for name in ids]
    scorer, users = Scorer(model_tensors(found, data.item_text, data.train), described, ids, items), np.arange(160)
    exposure = []
    for debias, model in ((0.0, scorer.factual), (1.0, scorer.counterfactual)):
        entries = [model.history[[user]].indices for user in users]
        folded = np.stack([scorer.fold_in(history[history < 160], debias) for history in entries])
        np.testing.assert_allclose(folded, scorer.score_all(users, debias), atol=1e-5)
        exposure.append(lured[np.argsort(-folded, axis=1)[:, :10]].mean())
    assert exposure[1] < 0.8 * exposure[0]


def test_where_no_reference_is_usable_there_is_no_propensity() -> None:
    data, _ = world()
    nothing = replace(data, item_references=0 * data.item_text)
    found = fitted(nothing, effect="reference_texts")
    assert found.counterfactual is found.factual


def test_without_an_llm_there_are_no_reference_texts_and_the_message_says_so_before_anything_is_fitted() -> None:
    told: list[dict[str, Any]] = []
    config = TrainConfig.parse({**SMALL, "effect": "reference_texts"}, "train")
    with pytest.raises(DataError, match=r"'reference_texts' and there are none: only an LLM writes them\. Set"):
        fit_recipe(world()[0], config, trained_here(), on_progress=lambda **figures: told.append(figures))
    assert told == []


def test_reference_texts_are_less_what_the_items_texts_share_and_not_what_they_share_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, references = (np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32) for seed in (0, 1))
    monkeypatch.setattr(stage, "_sideinfo", lambda features: features)
    monkeypatch.setattr("components.sideinfo.reader.reference_embeddings", lambda directory, kind: references)
    inputs = TrainingFeatures(texts, texts, texts, texts, texts, [])
    found = stage._item_references(_features(str(tmp_path)), inputs)
    np.testing.assert_allclose(found, references - texts.mean(axis=0), atol=1e-6)


def test_reference_texts_that_have_been_removed_are_told_with_what_to_do(tmp_path: Path) -> None:
    nobody = np.zeros((0, 2), np.float32)
    inputs = TrainingFeatures(nobody, nobody, nobody, nobody, nobody, [])
    with pytest.raises(ArtifactError, match=r"sideinfo fedcba9876543210 has been removed\. Run the pipeline from sideinfo"):
        stage._item_references(_features(str(tmp_path)), inputs)


def _features(storage_root: str = "") -> Manifest:
    facts = {"project": "planted"}
    known = {"stage": "features", "version": 1, "fingerprint": "0123456789abcdef", "config": {}, "files": {}, "facts": facts}
    costs = {"seconds": 0.0, "peak_memory_mb": 0.0, "created_at": "2026-01-01T00:00:00Z"}
    return Manifest(**known, **costs, storage_root=storage_root, parents={"sideinfo": "fedcba9876543210"})
