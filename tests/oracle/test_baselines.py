"""Baselines against closed forms, against their libraries, and on a world whose right answers are known."""

import sys
import types
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from components.evaluate import baselines, metrics
from components.evaluate.baselines import Inputs
from components.evaluate.config import EvaluateConfig


def world(num_users: int = 60, num_items: int = 50, seed: int = 0) -> Inputs:
    """Users of even rows like the even items, others the odd ones; three quarters of it is seen, the rest is validation."""
    rng = np.random.default_rng(seed)
    likes = np.add.outer(np.arange(num_users), np.arange(num_items)) % 2 == 0
    held = likes & (rng.random(likes.shape) < 0.25)
    block = np.arange(num_items) % 2
    item_text = np.eye(2, dtype=np.float32)[block]
    user_text = np.eye(2, dtype=np.float32)[np.arange(num_users) % 2]
    as_matrix = lambda mask: sp.csr_array(mask.astype(np.float32))  # noqa: E731  # used twice, right here
    return Inputs(as_matrix(likes & ~held), as_matrix(held), user_text, item_text, {})


PERSONAL = ["text_cosine", "bm25_knn", "ials", "ease", "ease_text", "alpharec"]


@pytest.mark.parametrize("name", PERSONAL)
def test_personal_baselines_find_every_held_out_item_of_the_checkerboard(name):
    inputs = world()
    tuned = baselines.tune(name, inputs, EvaluateConfig(ials_factors=(4,), bm25_neighbours=(50,), alpharec_temperature=(0.2,)))
    # about 6 held-out items per user and 19 or fewer unseen ones in the block, all scored alike: within the top 20 without fail
    assert tuned.validation.mean()["recall@20"] == 1.0


def test_of_very_many_users_some_choose_the_setting_and_all_are_reported(monkeypatch):
    inputs, asked = world(), []
    monkeypatch.setattr(baselines, "MOST_CHOOSING", 20)
    monkeypatch.setattr(baselines, "rank", lambda *args: asked.append(found := metrics.rank(*args)) or found)
    tuned = baselines.tune("ease", inputs, EvaluateConfig(ease_l2=(1.0, 10.0)))
    assert [len(ranking.users) for ranking in asked] == [20, 20, 60]
    assert (asked[0].users == asked[1].users).all()
    assert len(tuned.validation.users) == 60


def test_popularity_ranks_every_user_by_training_counts():
    inputs = world()
    scores = baselines.popularity(inputs).score(np.array([3, 4]))
    assert (scores[0] == inputs.train.toarray().sum(axis=0)).all()
    assert (scores[0] == scores[1]).all()


def test_ease_equals_the_closed_form_in_double_precision():
    inputs = world()
    x = inputs.train.toarray().astype(np.float64)
    inverse = np.linalg.inv(x.T @ x + 5.0 * np.eye(x.shape[1]))
    expected = x @ (np.eye(x.shape[1]) - inverse / np.diag(inverse))
    # float32 with a condition number of about 1e3
    assert baselines.ease(inputs, l2=5.0).score(np.arange(60)) == pytest.approx(expected, abs=2e-4)


def test_ease_gives_no_weight_to_an_item_itself_and_text_adds_to_the_gram_matrix():
    inputs = world()
    plain, with_text = baselines.ease(inputs, l2=5.0), baselines.ease(inputs, l2=5.0, text_weight=10.0)
    assert not np.diag(plain.weights).any()
    text = inputs.item_text - inputs.item_text.mean(axis=0)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    x = inputs.train.toarray().astype(np.float64)
    inverse = np.linalg.inv(x.T @ x + 10.0 * text @ text.T + 5.0 * np.eye(x.shape[1]))
    expected = np.eye(x.shape[1]) - inverse / np.diag(inverse)
    assert with_text.weights == pytest.approx(expected, abs=2e-4)


def test_bm25_ranks_as_the_library_itself_recommends():
    from implicit.nearest_neighbours import BM25Recommender

    rng = np.random.default_rng(5)
    train = sp.csr_array((rng.random((40, 30)) < rng.random(30) * 0.6).astype(np.float32))
    ours = baselines.bm25_knn(Inputs(train, train, np.empty((40, 0)), np.empty((30, 0)), {}), neighbours=10, b=0.5)
    library = BM25Recommender(K=10, K1=1.2, B=0.5, num_threads=1)
    library.fit(sp.csr_matrix(train), show_progress=False)
    for user in range(40):
        ids, scores = library.recommend(user, sp.csr_matrix(train)[user], N=5)
        found = scores > 0
        own = metrics.masked(ours.score(np.array([user])), train, np.array([user]))[0]
        assert own[ids[found]] == pytest.approx(scores[found], rel=1e-5)
        assert np.sort(own)[::-1][: found.sum()] == pytest.approx(scores[found], rel=1e-5)


def test_ials_is_the_same_for_one_seed_whatever_the_number_of_threads(monkeypatch):
    results = []
    for threads in ("1", "1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        model = baselines.ials(world(), factors=8, alpha=5.0, regularization=1.0, iterations=5, seed=3)
        results.append(model.score(np.arange(60)))
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()
    other = baselines.ials(world(), factors=8, alpha=5.0, regularization=1.0, iterations=5, seed=4).score(np.arange(60))
    assert not (results[0] == other).all()


def test_random_scores_depend_on_the_user_and_not_on_the_block():
    ranking = baselines.RandomScores(seed=0, num_items=10)
    assert (ranking.score(np.array([1, 2, 3]))[1] == ranking.score(np.array([2]))[0]).all()
    assert not (ranking.score(np.array([1]))[0] == ranking.score(np.array([2]))[0]).all()


def test_text_cosine_centred_takes_out_what_all_texts_share():
    shared = np.array([10.0, 0.0])
    items = shared + np.array([[0.0, 1.0], [0.0, -1.0]])
    users = shared + np.array([[0.0, 1.0], [0.0, -1.0]])
    inputs = Inputs(sp.csr_array((2, 2)), sp.csr_array((2, 2)), users, items, {})
    assert baselines.text_cosine(inputs, centred=True).score(np.arange(2)) == pytest.approx(np.array([[1, -1], [-1, 1]]))


def test_users_and_items_without_text_have_no_cosine_and_leave_that_of_the_others_as_it_is():
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(count, 4)) + 2 for count in (20, 10))
    nothing = sp.csr_array((20, 10))
    expected = baselines.text_cosine(Inputs(nothing[4:, 2:], nothing[4:, 2:], users[4:], items[2:], {}), centred=True)
    users[:4], items[:2] = 0, 0
    found = baselines.text_cosine(Inputs(nothing, nothing, users, items, {}), centred=True).score(np.arange(20))
    assert not found[:4].any()
    assert not found[:, :2].any()
    assert found[4:, 2:] == pytest.approx(expected.score(np.arange(16)), abs=1e-6)


def test_the_best_setting_on_validation_is_kept_and_the_grid_recorded():
    inputs = world()
    config = EvaluateConfig(ease_l2=(1e-1, 10.0, 1e6))
    tuned = baselines.tune("ease", inputs, config)
    values = {entry["l2"]: entry["ndcg@10"] for entry in tuned.grid}
    assert list(values) == [1e-1, 10.0, 1e6]
    assert values[tuned.settings["l2"]] == max(values.values())
    for l2, value in values.items():
        ranking = metrics.rank(baselines.ease(inputs, l2).score, inputs.train, inputs.validation)
        assert ranking.mean()["ndcg@10"] == pytest.approx(value, abs=1e-6)


def test_an_optimum_at_the_edge_of_its_grid_is_told():
    tuned = baselines.Tuned(None, {"l2": 3.0, "b": 0.5}, None, [{"l2": value, "b": 0.5} for value in (1.0, 2.0, 3.0)])
    assert list(baselines.is_at_edge(tuned)) == ["l2"]


@pytest.mark.parametrize(
    ("grid", "chosen", "told"),
    [((64, 128), 128, ["factors"]), ((64, 128), 64, []), ((64,), 64, []), ((False, True), True, [])],
)
def test_of_two_numbers_the_largest_is_at_the_edge(grid: tuple[Any, ...], chosen: Any, told: list[str]) -> None:
    tuned = baselines.Tuned(None, {"factors": chosen}, None, [{"factors": value} for value in grid])
    assert list(baselines.is_at_edge(tuned)) == told


def test_baselines_that_cannot_run_say_why():
    inputs = world()
    assert (
        baselines.skip_reason("ease", inputs, EvaluateConfig(ease_max_items=49)) == "50 items are more than ease_max_items = 49"
    )
    assert baselines.skip_reason("ease", inputs, EvaluateConfig()) is None
    no_text = Inputs(inputs.train, inputs.validation, np.empty((60, 0)), np.empty((50, 0)), {})
    for name in ("text_cosine", "ease_text", "alpharec"):
        assert baselines.skip_reason(name, no_text, EvaluateConfig()) == "no item has text"


def test_the_bare_backbone_is_trained_by_the_train_stage_with_its_own_settings(monkeypatch):
    asked = {}

    def fit_base(train, validation, config, on_progress):
        asked.update(train=train, validation=validation, config=config)
        return np.ones((60, 2)), np.arange(100.0).reshape(50, 2)

    monkeypatch.setitem(sys.modules, "components.train.loop", types.SimpleNamespace(fit_base=fit_base))
    inputs = world()
    inputs = Inputs(inputs.train, inputs.validation, inputs.user_text, inputs.item_text, {"epochs": 3})
    scores = baselines.fit("lightgcn", {}, inputs, EvaluateConfig()).score(np.array([7]))
    assert asked["config"] == {"epochs": 3}
    assert asked["train"] is inputs.train
    assert asked["validation"] is inputs.validation
    assert (scores[0] == np.arange(100.0).reshape(50, 2).sum(axis=1)).all()
