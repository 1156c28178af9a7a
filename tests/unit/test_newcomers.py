"""Users of whom a text alone is known: the map from texts to the user's side of a model, and when it is used."""

import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
from safetensors.numpy import save_file
from structlog.testing import capture_logs

from components.cllmr.linear.newcomers import CrossFits, Fits, Newcomers
from components.cllmr.linear.scores import LinearScores, by_popularity, standardised
from components.train.bundle import write_newcomers
from components.train.newcomers import FEWEST_USERS, fit_newcomers
from serving.bundle import NEWCOMERS_FILE
from serving.features import Profiles
from serving.recommender import Question, Recommender
from serving.schemas import RecommendRequest
from serving.scorer import Scorer
from serving.texts import read_newcomers
from tests.bundles import write_random_bundle

NUM_USERS, NUM_ITEMS, DIM = 120, 30, 4
RNG = np.random.default_rng(0)


def texts() -> npt.NDArray[np.float32]:
    """Of two kinds of users, in turn, and a little of each one's own."""
    kinds = np.eye(2, DIM, dtype=np.float32)[np.arange(NUM_USERS) % 2]
    return kinds + 0.05 * np.random.default_rng(1).standard_normal((NUM_USERS, DIM)).astype(np.float32)


def model(seed: int = 0) -> LinearScores:
    """An inner product and weights between items, both at random."""
    rng = np.random.default_rng(seed)
    users, items = (rng.standard_normal((count, 3)).astype(np.float32) for count in (NUM_USERS, NUM_ITEMS))
    sparse = (sp.random_array((rows, NUM_ITEMS), density=0.3, rng=rng) for rows in (NUM_USERS, NUM_ITEMS))
    history, weights = (sp.csr_array(one, dtype=np.float32) for one in sparse)
    return LinearScores(users, items, history, weights)


def test_the_regression_of_the_users_side_is_the_regression_of_all_scores() -> None:
    given, fitted, l2 = texts(), model(), 0.7
    known = np.arange(100)
    newcomers = Fits(given, known, {"factual": fitted}).fit(l2, 0.0)
    scores, centred = fitted.score(known), given[known] - given[known].mean(axis=0)
    by_hand = np.linalg.solve(centred.T @ centred + l2 * np.eye(DIM), centred.T @ (scores - scores.mean(axis=0)))
    new = given[100:]
    expected = scores.mean(axis=0) + (new - given[known].mean(axis=0)) @ by_hand
    popularity = by_popularity(np.arange(NUM_ITEMS))
    found = newcomers.score(new, "factual", fitted, popularity)
    np.testing.assert_allclose(found, standardised(expected), atol=1e-4)
    joined = Fits(given, known, {"factual": fitted}).fit(l2, 2.0).score(new, "factual", fitted, popularity)
    np.testing.assert_allclose(joined, found + 2 * popularity, atol=1e-4)


def test_the_texts_of_many_users_are_fitted_in_little_more_memory_than_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    given = rng.standard_normal((20_000, 64)).astype(np.float32)
    many = LinearScores.of_factors(rng.standard_normal((20_000, 2)), rng.standard_normal((5, 2)))
    tracemalloc.start()
    found = CrossFits(given, 0, many).fit(by_popularity(np.arange(5)), 0.1, 0.0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3.5 * given.nbytes
    monkeypatch.setattr("components.cllmr.linear.newcomers.BLOCK_SIZE", 100_000)
    whole = CrossFits(given, 0, many).fit(by_popularity(np.arange(5)), 0.1, 0.0)
    np.testing.assert_allclose(found.score(np.arange(50)), whole.score(np.arange(50)), atol=1e-5)


def test_what_is_written_is_read_again_and_what_both_models_share_is_written_once() -> None:
    factual = model()
    other, same = model(1), LinearScores(factual.users, -factual.items, factual.history, factual.weights)
    for counterfactual, parts in ((other, 2), (same, 1)):
        models = {"factual": factual, "counterfactual": counterfactual}
        newcomers = Fits(texts(), np.arange(NUM_USERS), models).fit(1.0, 0.5)
        tensors = newcomers.tensors()
        assert len(tensors) == 2 + 2 * parts
        again = Newcomers.of_tensors(tensors, models)
        for name, one in models.items():
            np.testing.assert_array_equal(
                *(of.score(texts()[:3], name, one, by_popularity(np.arange(NUM_ITEMS))) for of in (newcomers, again))
            )
        with pytest.raises(ValueError, match=r"factual.users has shape \(5, 2\).* expected \(5, 3\)"):
            Newcomers.of_tensors({**tensors, "factual.users": tensors["factual.users"][:, :2]}, models)


def test_a_user_as_if_he_were_new_is_answered_by_a_map_that_has_not_seen_him() -> None:
    given, fitted, popularity = texts(), model(), by_popularity(np.arange(NUM_ITEMS))
    given[7] = 0
    crossed = CrossFits(given, 0, fitted).fit(popularity, 0.1, 0.0)
    before = crossed.score(np.arange(NUM_USERS))
    np.testing.assert_array_equal(before[7], popularity)
    fitted.users[11] += 100.0
    after = CrossFits(given, 0, fitted).fit(popularity, 0.1, 0.0).score(np.arange(NUM_USERS))
    np.testing.assert_array_equal(before[11], after[11])
    assert (before != after).any()


def clicks(by_kind: bool, seed: int) -> sp.csr_array:
    """Six of the items of one's kind, or of all items, for each user."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(NUM_USERS):
        liked = np.arange(user % 2, NUM_ITEMS, 2) if by_kind else np.arange(NUM_ITEMS)
        rows.append(np.isin(np.arange(NUM_ITEMS), rng.choice(liked, 6, replace=False)))
    return sp.csr_array(np.array(rows), dtype=np.float32)


def fit(
    by_kind: bool, given: npt.NDArray[np.float32], choosing: int = NUM_USERS, seed: int = 0
) -> tuple[Newcomers | None, dict[str, object]]:
    """On clicks of all users, of which the first `choosing` have some for validation."""
    train = clicks(by_kind, 2 * seed)
    validation = clicks(by_kind, 2 * seed + 1).multiply(np.arange(NUM_USERS)[:, None] < choosing)
    validation = sp.csr_array(validation - validation.multiply(train), dtype=np.float32)
    validation.eliminate_zeros()
    fitted = LinearScores.of_weights(train, sp.csr_array((train.T @ train).astype(np.float32)))
    return fit_newcomers(given, train, validation, {"factual": fitted, "counterfactual": fitted}, seed=0)


def test_a_map_is_used_where_texts_tell_what_users_like_and_nowhere_else() -> None:
    newcomers, found = fit(by_kind=True, given=texts())
    assert newcomers is not None
    assert found["used"]
    assert found["side_information"] > found["popularity"] + 0.1
    newcomers, found = fit(by_kind=False, given=texts())
    assert (newcomers, found["used"]) == (None, False)


@pytest.mark.parametrize("told", [0, FEWEST_USERS - 1])
def test_few_texts_say_nothing(told: int) -> None:
    few = np.where(np.arange(NUM_USERS)[:, None] < told, texts(), np.float32(0))
    assert fit(by_kind=True, given=few) == (None, {"users": told, "used": False})
    assert fit(by_kind=True, given=np.empty((NUM_USERS, 0), np.float32)) == (None, {"users": 0, "used": False})


def test_the_best_of_many_settings_must_be_better_than_the_best_of_many_by_chance() -> None:
    """On these clicks, of which texts say nothing, the best of all maps is two standard errors above popularity."""
    newcomers, found = fit(by_kind=False, given=texts(), seed=58)
    assert found["side_information"] > found["popularity"]
    assert (newcomers, found["used"]) == (None, False)


def test_who_has_a_text_teaches_also_without_a_part_in_the_choice() -> None:
    newcomers, _ = fit(by_kind=True, given=texts(), choosing=FEWEST_USERS)
    assert newcomers is not None
    np.testing.assert_allclose(newcomers.mean, texts().mean(axis=0), atol=1e-6)


def test_few_users_who_can_choose_choose_nothing() -> None:
    """One alone has no spread, and any gain of his would do."""
    for choosing in (1, FEWEST_USERS - 1):
        assert fit(by_kind=True, given=texts(), choosing=choosing) == (None, {"users": NUM_USERS, "used": False})
    assert fit(by_kind=True, given=texts(), choosing=FEWEST_USERS)[1]["used"]


def test_a_newcomer_is_answered_by_his_text_debiased_and_by_popularity_where_that_is_of_another_feature_set(
    tmp_path: Path,
) -> None:
    directory = write_random_bundle(tmp_path / "bundle", feature_fingerprint="this one")
    scorer = Scorer.load(directory)
    given = np.random.default_rng(2).standard_normal((scorer.num_users, DIM)).astype(np.float32)
    models = {"factual": scorer.factual, "counterfactual": scorer.counterfactual}
    write_newcomers(directory, Fits(given, np.arange(scorer.num_users), models).fit(1.0, 0.5))
    newcomers = read_newcomers(directory, scorer)
    assert newcomers is not None
    recommender = Recommender(scorer, "1", newcomers=newcomers)
    text = np.ones(DIM, np.float32)
    request = RecommendRequest(users=["new", "nobody", "u1", "busy"], k=5, compare=True, debias=0.4)
    mine = Profiles("this one", {"new": text, "u1": text, "busy": text})
    new, nobody, known, busy = recommender.recommend(request, [[], [], [], ["i3"]], mine).results
    assert (new.cold, new.method, new.reason) == (True, "side_information", "unknown_user")
    assert (nobody.method, known.method, busy.method) == ("popularity", "personalised", "fold_in")
    popular = {"factual": by_popularity(scorer.popularity), "counterfactual": scorer.popularity_scores["counterfactual"]}
    factual, counterfactual = (newcomers.score(text[None], name, one, popular[name])[0] for name, one in models.items())
    assert np.abs(popular["factual"] - popular["counterfactual"]).max() > 0.1, "its text was not asked what popularity adds"
    assert new.factual is not None
    for items, expected in ((new.items, 0.6 * factual + 0.4 * counterfactual), (new.factual, factual)):
        assert [item.item_id for item in items] == [f"i{row}" for row in np.argsort(-expected, kind="stable")[:5]]
        np.testing.assert_allclose([item.score for item in items], np.sort(expected)[::-1][:5], rtol=1e-5)
    other = Profiles("another", mine.embeddings)
    assert recommender.recommend(request, [[], [], [], ["i3"]], other).results[0].method == "popularity"
    assert [recommender.refused(Question(request, [[]] * 4, profiles)) for profiles in (None, mine, other)] == [0, 0, 3]


def test_a_damaged_map_is_told_and_newcomers_get_what_is_popular(tmp_path: Path) -> None:
    scorer = Scorer.load(directory := write_random_bundle(tmp_path / "bundle"))
    assert read_newcomers(directory, scorer) is None
    save_file({"mean": np.zeros(3, np.float32)}, directory / NEWCOMERS_FILE)
    with capture_logs() as logs:
        assert read_newcomers(directory, scorer) is None
    assert "newcomers.safetensors cannot be read: popularity_weight is missing" in logs[0]["reason"]
    save_file({"mean": np.zeros(3, np.float32), "popularity_weight": np.zeros(0, np.float32)}, directory / NEWCOMERS_FILE)
    with capture_logs() as logs:
        assert read_newcomers(directory, scorer) is None
    assert "popularity_weight has shape (0,)" in logs[0]["reason"]
