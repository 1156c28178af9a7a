"""The parts of the counterfactual against hand-computed numbers and definitions written out."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from components.cllmr.effects.base import Effect, EffectFactors, Evidence, Factors, centred, contrast
from components.cllmr.effects.click_propensity import (
    SHARPNESS,
    estimate,
    excess,
    match_percentiles,
    monotone,
    shared_covariance,
)
from components.cllmr.effects.click_share import click_share
from components.cllmr.effects.exposure import TEMPERATURE, exposure
from components.cllmr.effects.lift import identified_lift, popularity_lift
from components.cllmr.effects.reference_texts import (
    reference_texts,
    refitted,
    share_written_anyway,
    without_carried,
    without_references,
    written_anyway,
)
from components.cllmr.effects.subspace import generic_directions, project_out
from components.cllmr.linear.scores import LinearScores, standardised
from components.errors import DataError


def factors(seed: int, users: int = 6, items: int = 5, dim: int = 3) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(rng.normal(size=(users, dim)).astype(np.float32), rng.normal(size=(items, dim)).astype(np.float32))


def test_debiasing_a_pair_equals_the_hand_computation() -> None:
    one = EffectFactors(*(np.array([row], dtype=np.float32) for row in ([1, 2], [3, 4], [5], [2])))
    found = one.effects(np.array([0]), np.array([0]), strength=0.25)
    assert [float(value[0]) for value in found] == [11.0, 10.0, 1.0, 8.5]  # TE 3 + 8, NDE 5 * 2
    served = one.debiased(0.25)
    np.testing.assert_array_equal(served.users, [[1, 2, 5]])
    np.testing.assert_array_equal(served.items, [[3, 4, -0.5]])


def test_factors_that_do_not_fit_together_are_refused() -> None:
    a, b = factors(0)
    with pytest.raises(ValueError, match=r"\(6, 3\)"):
        EffectFactors(a, b, a[:, :2], b)
    with pytest.raises(ValueError, match="rows"):
        EffectFactors(a, b, a[:4], b)


def test_a_contrast_at_strength_one_is_the_counterfactual_model() -> None:
    factual, other = factors(0), factors(1, dim=4)
    served = contrast(factual, other).debiased(1.0)
    np.testing.assert_allclose(served.users @ served.items.T, other.users @ other.items.T, atol=1e-5)


@pytest.mark.parametrize(
    ("y", "expected"),
    [([1, 2, 3], [1, 2, 3]), ([3, 2, 1], [2, 2, 2]), ([1, 4, 2, 6], [1, 3, 3, 6]), ([5, 1, 0, 2], [2, 2, 2, 2])],
)
def test_monotone_regression_equals_the_hand_computation(y: list[float], expected: list[float]) -> None:
    x = np.arange(len(y), dtype=float)
    np.testing.assert_allclose(monotone(x, np.array(y, dtype=float)), expected)
    backwards = monotone(x[::-1].copy(), np.array(y[::-1], dtype=float))
    np.testing.assert_allclose(backwards, expected[::-1])


def test_symmetric_variation_is_no_excess_and_a_longer_upper_tail_is() -> None:
    index = np.arange(101, dtype=float)
    np.testing.assert_allclose(excess(index, 0.1 * index), 0.0, atol=1e-9)
    raised = 0.1 * index + np.where(index > 90, 7.0, 0.0)
    np.testing.assert_allclose(excess(index, raised), np.where(index > 90, 7.0, 0.0), atol=1e-9)


def test_a_click_matches_by_the_other_items_of_the_history() -> None:
    text = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    #            user 0: items 0, 1; user 1: item 2 alone; user 2: items 0, 2
    log = sp.csr_array(np.array([[1.0, 1, 0], [0, 0, 1], [1, 0, 1]]))
    users, items = (axis.astype(np.int64) for axis in sp.coo_array(log).coords)
    found = match_percentiles(log, users, items, np.ones(5), text, np.arange(3))
    by_click = dict(zip(zip(users.tolist(), items.tolist(), strict=True), found.tolist(), strict=True))
    # profiles of the crowd: (1.8, .6)/1.897, (0, 1), (1, 1)/1.414, each without the item
    assert by_click[0, 0] == pytest.approx(2 / 3)  # .8 by item 1; the crowd has .8, 0, 0
    assert by_click[2, 0] == pytest.approx(0)  # 0 by item 2
    assert by_click[0, 1] == pytest.approx(1 / 3)  # .8 by item 0; the crowd has .8, .6, .990
    assert np.isnan(by_click[1, 2])  # nothing else is known of user 1
    assert by_click[2, 2] == pytest.approx(0)  # 0 by item 0; the crowd has .316 and 0, and not user 1
    text[1] = 0.0  # an item without text matches nobody, and is no part of a history
    found = match_percentiles(log, users, items, np.ones(5), text, np.arange(3))
    by_click = dict(zip(zip(users.tolist(), items.tolist(), strict=True), found.tolist(), strict=True))
    assert np.isnan([by_click[0, 1], by_click[0, 0]]).all()
    assert by_click[2, 0] == pytest.approx(0)


def test_who_clicked_at_random_matches_like_the_crowd_however_popular_the_item_is() -> None:
    rng = np.random.default_rng(0)
    text = rng.normal(size=(120, 16)) + 0.5
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    chance = np.where(np.arange(120) < 20, 0.5, 0.1)  # twenty items are chosen by every second user
    log = sp.csr_array((rng.random((400, 120)) < chance).astype(float))
    users, items = (axis.astype(np.int64) for axis in sp.coo_array(log).coords)
    found = 2 * match_percentiles(log, users, items, np.ones(len(users)), text, np.arange(400)) - 1
    for of_popular in (True, False):
        clicks = found[(items < 20) == of_popular]
        assert abs(clicks.mean()) < 0.03  # of the whole crowd's histories with the item in them: -.27


def test_a_text_direction_is_shared_if_users_click_it_again() -> None:
    rng = np.random.default_rng(0)
    text = rng.choice([-1.0, 1.0], size=(40, 2))
    taste = rng.choice([-1.0, 1.0], size=200)  # users want a sign of the first column and ignore the second
    log = sp.csr_array(((taste[:, None] == text[None, :, 0]) & (rng.random((200, 40)) < 0.4)).astype(float))
    shared = shared_covariance(log, centred(text))
    assert shared[0, 0] > 30  # of 40 items, each of variance 1
    assert shared[1, 1] < 3


def test_shared_directions_are_found_without_the_profiles_of_all_users(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    text = centred(rng.normal(size=(50, 32)))
    log = sp.csr_array((np.ones(20_000), rng.integers(50, size=20_000), np.arange(0, 20_001, 2)), shape=(10_000, 50))
    tracemalloc.start()
    found = shared_covariance(log, text)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000 * 32 * 8 + log.data.nbytes * 10
    monkeypatch.setattr("components.cllmr.effects.click_propensity.BLOCK_SIZE", 10_000)
    np.testing.assert_allclose(shared_covariance(log, text), found, rtol=1e-9, atol=1e-12)


def test_projected_texts_have_no_part_in_the_directions_and_keep_their_length() -> None:
    rng = np.random.default_rng(0)
    text = rng.normal(size=(9, 6)) + 2.0
    text[3] = 0.0
    directions = rng.normal(size=(6, 2))
    found = project_out(text, directions)
    np.testing.assert_allclose(found @ directions, 0, atol=1e-6)
    lengths = np.ones(9)
    lengths[3] = 0
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), lengths, atol=1e-6)
    generic = generic_directions(text)
    np.testing.assert_allclose(generic.T @ generic, np.eye(2), atol=1e-9)
    np.testing.assert_allclose(project_out(text, generic) @ text.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(project_out(text, np.zeros((6, 1))) @ text[0], unit(text) @ text[0], rtol=1e-5)


def unit(text: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(text, axis=1, keepdims=True)
    return text / np.where(lengths > 0, lengths, 1)


def lured_log(seed: int, lured: float) -> tuple[sp.csr_array, np.ndarray, np.ndarray, np.ndarray]:
    """200 users and 200 items of 5 topics; every tenth item praises itself and lures a share of everybody."""
    rng = np.random.default_rng(seed)
    topic_of_user, topic_of_item = rng.integers(5, size=200), rng.integers(5, size=200)
    praised = np.arange(200) % 10 == 0
    taste = (topic_of_user[:, None] == topic_of_item[None, :]) & (rng.random((200, 200)) < 0.25)
    bait = praised[None, :] & (rng.random((200, 200)) < lured) & ~taste
    topics, praise = unit(rng.normal(size=(5, 24))), unit(rng.normal(size=(1, 24)))
    text = unit(topics[topic_of_item] + 0.1 * rng.normal(size=(200, 24)) + praised[:, None] * praise)
    return sp.csr_array((taste | bait).astype(np.float32)), text.astype(np.float32), praised, taste


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lured_clicks_are_found_and_counted(seed: int) -> None:
    log, text, praised, taste = lured_log(seed, lured=0.1)
    found = estimate(log, text)
    bait = log.toarray().astype(bool) & ~taste
    assert found.lured.sum() == pytest.approx(bait.sum(), rel=0.15)
    assert found.share[praised].min() > 0.3
    assert found.share[~praised].mean() < 0.02
    weights = found.taste.toarray()
    assert weights[taste].mean() > 0.95
    assert weights[bait].mean() < 0.25  # measured 0.14, 0.12, 0.10


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_items_without_text_tell_nothing_and_hide_nothing(seed: int) -> None:
    """Counted as the worst match, their clicks hid the taste in all the others: nothing was found, or half of it."""
    log, text, praised, taste = lured_log(seed, lured=0.1)
    untold = ~praised & (np.random.default_rng(seed).random(200) < 0.3)
    text[untold] = 0.0
    found = estimate(log, text)
    bait = log.toarray().astype(bool) & ~taste
    assert found.lured.sum() == pytest.approx(bait.sum(), rel=0.15)  # measured 1.06, 1.02, 1.11 of them
    assert found.share[praised].min() > 0.3
    assert found.share[untold].mean() < 0.02
    weights = found.taste.toarray()
    assert weights[taste].mean() > 0.95
    assert weights[bait].mean() < 0.25  # measured 0.15, 0.13, 0.11


def test_the_likely_clicks_of_taste_are_those_above_one_half_and_leave_the_posterior_as_it_is() -> None:
    log, text, _, _ = lured_log(0, lured=0.1)
    found = estimate(log, text)
    posterior = found.taste.toarray()
    kept = found.likely_taste()
    assert 0 < kept.nnz < found.taste.nnz
    np.testing.assert_array_equal(kept.toarray(), (posterior >= 0.5).astype(np.float32))
    np.testing.assert_array_equal(found.taste.toarray(), posterior)


def test_the_taste_log_has_as_many_clicks_of_an_item_as_are_expected_and_more_of_them_where_they_are_likelier() -> None:
    log, text, praised, taste = lured_log(0, lured=0.1)
    found = estimate(log, text)
    posterior, weights = found.taste.toarray(), found.taste_log().toarray()
    np.testing.assert_allclose(weights.sum(axis=0), posterior.sum(axis=0), rtol=1e-5)
    assert weights.min() >= 0
    assert weights.max() <= 1
    for item in np.flatnonzero(praised)[:5]:
        clicked = posterior[:, item] > 0
        free = clicked & (weights[:, item] < 1)
        ratio = weights[free, item] / posterior[free, item] ** SHARPNESS
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
        assert (ratio.mean() * posterior[clicked & ~free, item] ** SHARPNESS >= 1 - 1e-5).all()
    bait = log.toarray().astype(bool) & ~taste & praised
    assert weights[bait].sum() < 0.97 * posterior[bait].sum()  # measured 0.93, 0.91, 0.92 on seeds 0 to 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_text_that_lures_nobody_is_left_alone(seed: int) -> None:
    log, text, _, _ = lured_log(seed, lured=0.0)
    found = estimate(log, text)
    assert found.taste.sum() > 0.99 * log.sum()


def test_where_histories_say_nothing_no_propensity_is_found() -> None:
    rng = np.random.default_rng(0)
    log = sp.csr_array((rng.random((80, 60)) < 0.1).astype(np.float32))
    found = estimate(log, unit(rng.normal(size=(60, 12))).astype(np.float32))
    assert found.share.max() == 0 or found.taste.sum() > 0.9 * log.sum()
    nothing = estimate(log, np.zeros((60, 12), dtype=np.float32))  # no texts at all
    assert (nothing.taste.data == 1).all()
    assert not nothing.direction.any()


def sparse_log(seed: int, taste: float) -> tuple[sp.csr_array, np.ndarray, np.ndarray]:
    """1,000 users with one or two clicks each, by chance but for every tenth item, which praises itself and is clicked three
    times as often; and users click items of their own topic `taste` + 1 times as often."""
    rng = np.random.default_rng(seed)
    topic_of_user, topic_of_item = rng.integers(5, size=1000), rng.integers(5, size=100)
    praised = np.arange(100) % 10 == 0
    rate = 0.01 * (1 + taste * (topic_of_user[:, None] == topic_of_item[None, :]) + 2 * praised)
    log = sp.csr_array((rng.random((1000, 100)) < rate).astype(np.float32))
    topics, praise = unit(rng.normal(size=(5, 24))), unit(rng.normal(size=(1, 24)))
    text = unit(topics[topic_of_item] + 0.1 * rng.normal(size=(100, 24)) + praised[:, None] * praise)
    return log, text.astype(np.float32), praised


def test_taste_must_stand_out_from_chance_before_a_click_is_called_lured() -> None:
    """Without taste the mean of 2p - 1 is noise, above zero for some of these seeds (2 and 4, by up to one standard error):
    where that was enough, up to a fifth of the clicks of all items passed for lured."""
    for seed in range(8):
        log, text, _ = sparse_log(seed, taste=0)
        found = estimate(log, text)
        assert not found.share.any(), f"seed {seed}"
        assert (found.taste.data == 1).all(), f"seed {seed}"
        assert not found.direction.any(), f"seed {seed}"


def test_taste_that_stands_out_a_little_is_enough_to_find_lured_clicks() -> None:
    """Eight standard errors: a bar of ten would find nothing."""
    log, text, praised = sparse_log(0, taste=3)
    found = estimate(log, text)
    assert found.share[praised].mean() > 0.1  # measured 0.16
    assert found.share[~praised].mean() < 0.1  # 0.06


def test_the_share_takes_its_share_of_every_score() -> None:
    log, text, _, _ = lured_log(0, lured=0.1)
    factual = factors(0, users=200, items=200)
    evidence = Evidence(factual, log, text, lambda log, text: factual)
    served = click_share(evidence).debiased(1.0)
    kept = 1 - estimate(log, text).share
    expected = (factual.users @ factual.items.T) * kept[None, :]
    np.testing.assert_allclose(served.users @ served.items.T, expected, atol=1e-5)


def test_popularity_lift_is_in_units_of_score_per_log_click() -> None:
    """A model that scores every item by its log clicks: the direct effect is then the predicted log clicks themselves."""
    log, text, _, _ = lured_log(0, lured=0.1)
    log_clicks = np.log1p(log.sum(axis=0))
    factual = Factors(np.full((200, 1), 2.0, dtype=np.float32), log_clicks.astype(np.float32)[:, None])
    found = popularity_lift(Evidence(factual, log, text, lambda log, text: factual))
    np.testing.assert_allclose(found.direct_users, 2.0, rtol=1e-5)
    explained = np.corrcoef(found.direct_items[:, 0], log_clicks)[0, 1]
    assert explained > 0.5


def test_an_identified_lift_is_the_score_of_the_log_clicks_that_the_text_lured() -> None:
    log, text, praised, _ = lured_log(0, lured=0.1)
    clicks = log.sum(axis=0)
    factual = Factors(np.full((200, 1), 2.0, dtype=np.float32), np.log1p(clicks).astype(np.float32)[:, None])
    found = identified_lift(Evidence(factual, log, text, lambda log, text: factual))
    left = np.log1p(clicks * (1 - estimate(log, text).share))
    served = found.debiased(1.0)
    np.testing.assert_allclose(served.users @ served.items.T, np.tile(2.0 * left, (200, 1)), atol=1e-4)
    assert found.direct_items[praised].min() > 0


def test_of_the_exposure_among_what_users_have_not_clicked_a_luring_text_keeps_the_share_that_is_of_taste() -> None:
    log, text, praised, _ = lured_log(0, lured=0.1)
    a, b = factors(3, users=200, items=200)
    liked = Factors(np.hstack([a, log.toarray()]), np.hstack([b, 9 * np.eye(200, dtype=np.float32)]))  # most what they clicked
    found = exposure(Evidence(liked, log, text, lambda log, text: liked))
    spread = (liked.users @ liked.items.T).std(axis=1, keepdims=True)

    def exposed(strength: float) -> np.ndarray:
        served = found.debiased(strength)
        weights = np.where(log.toarray() > 0, 0, np.exp(served.users @ served.items.T / spread / TEMPERATURE))
        return (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)

    share = estimate(log, text).share
    assert share[praised].min() > 0.3
    np.testing.assert_allclose(exposed(1.0)[praised], (exposed(0.0) * (1 - share))[praised], rtol=0.01)


def test_a_user_who_has_clicked_everything_leaves_the_exposure_to_the_others() -> None:
    log, text, _, _ = lured_log(0, lured=0.1)
    all_clicked = log.tolil()
    all_clicked[0] = 1
    factual = factors(0, users=200, items=200)
    found = exposure(Evidence(factual, sp.csr_array(all_clicked, dtype=np.float32), text, lambda log, text: factual))
    assert np.isfinite(found.direct_items).all()
    assert found.direct_items.any()


TEXTS = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
REFERENCES = np.array([[2.0, 0.0], [0.0, 0.5], [0.0, 0.0], [1.0, 1.0]])


def test_what_is_written_anyway_is_the_part_along_each_texts_own_reference() -> None:
    np.testing.assert_allclose(written_anyway(TEXTS, REFERENCES), [[3, 0], [0, 2], [0, 0], [0, 0]])
    np.testing.assert_allclose(share_written_anyway(TEXTS, REFERENCES), [9 / 25, 1, 0, 0], rtol=1e-6)
    # of the first the rest; of the second, which is its reference, nothing; the third has none; the fourth is no text
    np.testing.assert_allclose(without_references(TEXTS, REFERENCES), [[0, 1], [0, 0], [1, 0], [0, 0]])


def test_references_are_centred_on_the_texts_and_not_on_themselves() -> None:
    np.testing.assert_allclose(centred(REFERENCES, around=TEXTS), [[2 / 3, -2], [-4 / 3, -1.5], [0, 0], [-1 / 3, -1]])
    np.testing.assert_array_equal(centred(REFERENCES, around=0 * TEXTS), REFERENCES)


def test_an_item_whose_text_is_written_anyway_loses_the_score_of_its_text_and_no_other_does() -> None:
    log, text, _, _ = lured_log(0, lured=0.1)
    factual = factors(0, users=200, items=200)
    told = centred(text)
    references = np.where(np.arange(200)[:, None] < 10, told, 0).astype(np.float32)  # all of their text
    seen: list[np.ndarray] = []

    def refit(log: sp.csr_array, text: np.ndarray) -> Factors:
        seen.append(text)
        return factual

    evidence = Evidence(factual, log, text, refit, references)
    direct = reference_texts(evidence).direct_items
    assert np.abs(direct[:10]).max(axis=1).min() > 0
    np.testing.assert_array_equal(direct[10:], 0)
    refitted(evidence)
    np.testing.assert_allclose(seen[0][:10], 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(seen[0][10:], axis=1), 1, atol=1e-5)


def test_of_a_model_with_weights_between_items_the_same_score_goes_also_for_who_is_folded_in() -> None:
    log, text, _, _ = lured_log(0, lured=0.1)
    rng = np.random.default_rng(5)
    a, b = (rng.normal(size=(200, 3)).astype(np.float32) for _ in range(2))
    weights = np.where(rng.random((200, 200)) < 0.2, rng.normal(size=(200, 200)), 0).astype(np.float32)
    told = centred(text)
    written = told[:2][np.arange(200) % 2] * (np.arange(200)[:, None] < 120)  # two classes, and items that have none
    history = sp.csr_array(log * np.float32(0.5))
    model = LinearScores(a, b, history, sp.csr_array(weights))
    factual = Factors(np.hstack([a, history.toarray()]), np.hstack([b, weights.T]))
    expected = reference_texts(Evidence(factual, log, told.astype(np.float32), lambda log, text: factual, written)).debiased(
        1.0
    )
    found = without_carried(model, told, written)
    everyone = np.arange(200)
    assert found.users.shape[1] == 3 + 2, "as many dimensions more as there are references"
    assert found.weights is model.weights
    np.testing.assert_allclose(found.score(everyone), expected.users @ expected.items.T, atol=2e-4)
    new = np.setdiff1d(np.arange(10), history[[7]].indices)
    longer = history.tolil()
    longer[7, new] = 0.5
    more = without_carried(replace(model, history=sp.csr_array(longer)), told, written)
    np.testing.assert_allclose(
        found.score(everyone[7:8])[0] + found.added(7, new, history[[7]].indices), more.score(everyone[7:8])[0], atol=2e-4
    )
    items = history[[7]].indices
    nobody = without_carried(replace(model, users=0 * a), told, written)
    np.testing.assert_allclose(found.folded([1.0], items), standardised(nobody.score(everyone[7:8]))[0], atol=2e-4)


def test_what_an_item_adds_to_all_others_alike_is_carried_by_no_text() -> None:
    """Texts are scaled to unit length after they are centred, so that their sum is not zero."""
    log, text, _, _ = lured_log(0, lured=0.1)
    rng = np.random.default_rng(6)
    told = centred(text)
    told = unit(told[rng.random(200) < 0.9])
    log = log[:, : len(told)]
    weights = rng.normal(size=(len(told), len(told))).astype(np.float32)
    model = LinearScores.of_weights(log, sp.csr_array(weights))
    alike = LinearScores.of_weights(log, sp.csr_array(weights + 5 * rng.random((len(told), 1), dtype=np.float32)))
    references = told[:1] + 0.3 * told
    everyone = np.arange(200)
    before, after = (without_carried(one, told, references).score(everyone) for one in (model, alike))
    np.testing.assert_allclose((after - before).std(axis=1), 0, atol=1e-3)


@pytest.mark.parametrize("formulation", [reference_texts, refitted])
def test_without_reference_texts_there_is_nothing_to_take_out(formulation: Effect) -> None:
    log, text, _, _ = lured_log(0, lured=0.1)
    factual = factors(0, users=200, items=200)
    with pytest.raises(DataError, match=r"there are no reference texts.*\. Use another formulation"):
        formulation(Evidence(factual, log, text, lambda log, text: factual))
