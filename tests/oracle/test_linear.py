"""EASE against a regression solved column by column, and what its additions do."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp

from components.cllmr.linear import ease
from components.cllmr.linear.ease import Ease, EaseSettings, centred_unit_rows
from components.cllmr.linear.ensemble import LEAST, MIN_GAIN, SAMPLES, Candidates, Ensemble, _ascent, choose_weights
from components.cllmr.linear.factors import aligned_item_factors, side_map
from components.cllmr.linear.kernel import KernelScores, NewItems, TextRows
from components.cllmr.linear.words import FIRST_WORDS, ItemWords
from components.evaluate.metrics import rank

NUM_USERS, NUM_ITEMS = 30, 12


def interactions(seed: int = 0) -> sp.csr_array:
    dense = (np.random.default_rng(seed).random((NUM_USERS, NUM_ITEMS)) < 0.3).astype(np.float32)
    dense[:, 11] = 0.0  # nobody has chosen the last item
    return sp.csr_array(dense)


def side(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM_ITEMS, 5)).astype(np.float32)


def ridge_without_self(rows: np.ndarray, l2: float) -> np.ndarray:
    """Every column regressed on all the others: the definition of EASE, without its closed form."""
    weights = np.zeros((rows.shape[1], rows.shape[1]))
    for item in range(rows.shape[1]):
        others = np.delete(np.arange(rows.shape[1]), item)
        inputs = rows[:, others]
        weights[others, item] = np.linalg.solve(inputs.T @ inputs + l2 * np.eye(len(others)), inputs.T @ rows[:, item])
    return weights


def test_plain_ease_is_the_ridge_regression_of_every_item_on_the_others() -> None:
    train = interactions()
    found = Ease(train).fit(EaseSettings(l2=3.0)).weights
    np.testing.assert_allclose(found, ridge_without_self(train.toarray().astype(np.float64), 3.0), atol=1e-5)


def test_the_regression_takes_the_memory_of_its_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    grams: list[np.ndarray] = []
    invert = ease._regression_weights
    monkeypatch.setattr(ease, "_regression_weights", lambda gram: grams.append(gram) or invert(gram))
    found = Ease(interactions(), side()).fit(EaseSettings(l2=3.0, side_weight=2.0)).regression
    assert np.shares_memory(found, grams[0])


def test_side_information_enters_as_further_rows_of_the_regression() -> None:
    train, z = interactions(), side()
    found = Ease(train, z).fit(EaseSettings(l2=3.0, side_weight=2.0)).weights
    rows = np.concatenate([train.toarray(), np.sqrt(2.0) * centred_unit_rows(z).T]).astype(np.float64)
    np.testing.assert_allclose(found, ridge_without_self(rows, 3.0), atol=1e-5)


def test_normalisation_is_the_regression_on_the_normalised_matrix() -> None:
    train, settings = interactions(), EaseSettings(2.0, user_power=0.5, item_power=0.25, popularity_power=0.1)
    dense = train.toarray().astype(np.float64)
    items = np.maximum(dense.sum(axis=0), 1)
    normalised = dense / np.maximum(dense.sum(axis=1), 1)[:, None] ** 0.5 / items**0.25
    unit = (normalised**2).sum() / dense.sum()
    expected = items[:, None] ** -0.25 * ridge_without_self(normalised, 2.0 * unit) * items**0.1
    np.testing.assert_allclose(Ease(train).fit(settings).weights, expected, atol=1e-5)


def test_an_item_without_interactions_has_neighbours_through_its_side_information_only() -> None:
    train = interactions()
    assert not Ease(train).fit(EaseSettings(1.0)).weights[:, 11].any()
    z = side()
    z[11] = z[3] + 0.01
    found = Ease(train, z).fit(EaseSettings(1.0, side_weight=5.0)).weights
    assert found[:, 11].argmax() == 3


def test_fits_do_not_depend_on_which_were_made_before() -> None:
    fits, z = EaseSettings(1.0, 2.0, 0.5, 0.2, 0.2), side()
    used = Ease(interactions(), z)
    for power in (0.0, 0.3):
        used.fit(EaseSettings(5.0, user_power=power))
    np.testing.assert_array_equal(used.fit(fits).weights, Ease(interactions(), z).fit(fits).weights)


def test_centring_leaves_rows_without_side_information_at_zero() -> None:
    z = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    found = centred_unit_rows(z)
    assert not found[1].any()
    assert np.linalg.norm(found[[0, 2]], axis=1) == pytest.approx([1.0, 1.0])
    np.testing.assert_allclose(found[0], -found[2], atol=1e-6)


class Table:
    """A member whose scores are given."""

    def __init__(self, scores: np.ndarray) -> None:
        self._scores = scores.astype(np.float32)

    def score(self, users: np.ndarray) -> np.ndarray:
        return self._scores[users]


def halves_of_the_truth(seed: int = 0) -> tuple[sp.csr_array, sp.csr_array, list[Table]]:
    """Two members that each see one half of what decides, and one of pure noise."""
    rng = np.random.default_rng(seed)
    first, second, noise = rng.normal(size=(3, 200, 60))
    order = np.argsort(-(first + second), axis=1)
    held_out = np.zeros((200, 60), dtype=np.float32)
    np.put_along_axis(held_out, order[:, :5], 1.0, axis=1)
    empty = sp.csr_array((200, 60), dtype=np.float32)
    return empty, sp.csr_array(held_out), [Table(100 * first), Table(second + 7), Table(noise)]


def test_weights_find_the_members_that_decide_and_leave_noise_out() -> None:
    seen, held_out, members = halves_of_the_truth()
    candidates = Candidates.collect(members, seen, held_out)
    weights, reached = choose_weights(candidates)
    assert weights[2] == pytest.approx(0.0, abs=0.06)
    assert weights[1] / weights[0] == pytest.approx(1.0, abs=0.25)
    assert reached > 0.97
    assert reached > 1.5 * max(candidates.ndcg(row).mean() for row in np.eye(3))


def test_members_that_know_the_same_share_the_weight_and_the_choice_is_always_the_same() -> None:
    """One ascent would keep the member it began with: no mixture of the two gains much."""
    seen, held_out, (first, second, noise) = halves_of_the_truth()
    both = first.score(np.arange(200)) / 100 + second.score(np.arange(200))
    rng = np.random.default_rng(1)
    twins = [Table(both + 0.02 * rng.normal(size=both.shape)) for _ in range(2)]
    weights, reached = choose_weights(Candidates.collect([*twins, noise], seen, held_out))
    assert min(weights[:2]) > 0.1
    assert abs(weights[2]) < 0.06
    assert choose_weights(Candidates.collect([*twins, noise], seen, held_out)) == (weights, reached)


def test_a_weight_too_small_to_matter_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, held_out, members = halves_of_the_truth()
    found = iter(
        [[0.5, 0.5 - SAMPLES * LEAST / 2, SAMPLES * LEAST / 2], *[[0.5, 0.5, 0.0]] * (SAMPLES - 1)]
    )  # one sample alone wants it
    monkeypatch.setattr("components.cllmr.linear.ensemble._ascent", lambda *asked: np.array(next(found)))
    weights, _ = choose_weights(Candidates.collect(members, seen, held_out))
    assert weights[2] == 0
    assert sum(weights) == pytest.approx(1, abs=1e-5)


def test_no_weight_moves_for_a_gain_that_noise_has_nor_below_zero_where_it_may_not() -> None:
    start, gain = [1.0, 0.0], MIN_GAIN / 2
    for value in (lambda weights: 1.0 + gain * (weights[1] > 0), lambda weights: 1.0 - weights[1]):
        np.testing.assert_array_equal(_ascent(value, [True, False], 3, start), start)
    assert _ascent(lambda weights: 1.0 + 3 * gain * (weights[1] > 0), [True, False], 3, start)[1] > 0
    assert _ascent(lambda weights: 1.0 - weights[1], [True, True], 3, start)[1] < 0


def test_of_very_many_users_some_choose_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, held_out, members = halves_of_the_truth()
    of_all, _ = choose_weights(Candidates.collect(members, seen, held_out))
    monkeypatch.setattr("components.cllmr.linear.ensemble.MOST_USERS", 120)
    candidates = Candidates.collect(members, seen, held_out)
    assert candidates.scores.shape[1] == len(candidates.ideal) == len(candidates.relevant) == 120
    np.testing.assert_allclose(choose_weights(candidates)[0], of_all, atol=0.15)


def test_the_metric_over_candidates_is_the_one_over_all_items() -> None:
    seen, held_out, members = halves_of_the_truth()
    weights = [1.0, 0.6, -0.1]
    found = Candidates.collect(members, seen, held_out, per_member=40).ndcg(np.array(weights)).mean()
    assert found == pytest.approx(rank(Ensemble(members, weights).score, seen, held_out).mean()["ndcg@10"], abs=1e-6)


def test_where_there_are_fewer_items_than_places_none_is_found_twice() -> None:
    rng = np.random.default_rng(0)
    order = rng.permuted(np.tile(np.arange(NUM_ITEMS), (NUM_USERS, 1)), axis=1)
    seen, held_out = np.zeros((2, NUM_USERS, NUM_ITEMS), dtype=np.float32)
    np.put_along_axis(seen, order[:, :8], 1.0, axis=1)
    np.put_along_axis(held_out, order[:, 8:10], 1.0, axis=1)  # among four that are left
    members = [Table(rng.normal(size=seen.shape)) for _ in range(2)]
    matrices, weights = (sp.csr_array(seen), sp.csr_array(held_out)), [0.6, 0.4]
    found = Candidates.collect(members, *matrices).ndcg(np.array(weights))
    of_all = rank(Ensemble(members, weights).score, *matrices).per_user["ndcg@10"]
    np.testing.assert_allclose(found, of_all, atol=1e-6)


def test_an_ensemble_of_inner_products_is_an_inner_product() -> None:
    rng = np.random.default_rng(0)
    factors = [(rng.normal(size=(9, d)), rng.normal(size=(20, d))) for d in (3, 5)]
    weights, users = (1.0, 0.4), np.arange(9)
    rows = []
    for weight, (a, b) in zip(weights, factors, strict=True):
        deviation = np.sqrt(np.einsum("ud,de,ue->u", a, np.cov(b.T, bias=True), a))
        rows.append(weight * a / deviation[:, None])
    product = np.concatenate(rows, axis=1) @ np.concatenate([b for _, b in factors], axis=1).T
    found = Ensemble([Table(a @ b.T) for a, b in factors], weights).score(users)
    np.testing.assert_allclose(found, product - product.mean(axis=1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("dim", [4, 24])  # fewer than an item has users, and more
@pytest.mark.parametrize("weighted", [False, True])
def test_item_factors_with_a_prior_minimise_their_objective(weighted: bool, dim: int) -> None:
    rng = np.random.default_rng(0)
    train, users, prior = interactions(), rng.normal(size=(NUM_USERS, dim)), rng.normal(size=(NUM_ITEMS, dim))
    if weighted:
        train.data = rng.uniform(0.1, 1.0, len(train.data)).astype(np.float32)
    found = aligned_item_factors(train, users, prior, alpha=5.0, regularization=2.0)
    dense = train.toarray()
    for item in range(NUM_ITEMS):
        chosen = dense[:, item] > 0
        confidence = np.where(chosen, 5.0 * dense[:, item], 1.0)
        residual = chosen - users @ found[item]
        gradient = -users.T @ (confidence * residual) + 2.0 * (found[item] - prior[item])
        np.testing.assert_allclose(gradient, 0.0, atol=1e-3)  # float32 factors


def test_without_interactions_an_item_is_near_its_prior_and_the_map_recovers_a_linear_truth() -> None:
    rng = np.random.default_rng(0)
    z, truth = rng.normal(size=(NUM_ITEMS, 3)), rng.normal(size=(3, 4))
    degree = np.arange(NUM_ITEMS)
    np.testing.assert_allclose(side_map(z @ truth, z, degree, l2=1e-9), truth, atol=1e-4)
    users = rng.normal(size=(NUM_USERS, 4))
    found = aligned_item_factors(interactions(), users, z @ truth, alpha=5.0, regularization=1e6)
    np.testing.assert_allclose(found, z @ truth, atol=1e-2)


def test_the_prior_with_nothing_to_say_is_the_librarys_half_sweep() -> None:
    implicit = pytest.importorskip("implicit.cpu.als")
    train = interactions()
    model = implicit.AlternatingLeastSquares(
        factors=4, alpha=5.0, regularization=2.0, iterations=3, use_cg=False, use_native=False, num_threads=1, random_state=0
    )
    model.fit(sp.csr_matrix(train), show_progress=False)
    found = aligned_item_factors(train, model.user_factors, np.zeros((NUM_ITEMS, 4)), 5.0, 2.0)
    np.testing.assert_allclose(found, model.item_factors, atol=1e-3)


def test_scores_are_the_users_items_times_the_weights() -> None:
    fitted = Ease(interactions(), side()).fit(EaseSettings(1.0, 2.0, popularity_power=0.3))
    np.testing.assert_allclose(fitted.score(np.arange(5)), interactions()[:5] @ fitted.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_the_kernel_sums_powers_of_the_cosines_to_the_users_items(power: float) -> None:
    told = side()
    told[3] = 0.0  # of this item nothing is known
    train, z = interactions(), centred_unit_rows(told)
    users = np.array([4, 0, 29])
    found = KernelScores(train, z, power).score(users)
    dense = train.toarray()
    for row, user in enumerate(users):
        for item in range(NUM_ITEMS):
            cosines = np.maximum(z[dense[user] > 0] @ z[item], 0)
            assert found[row, item] == pytest.approx((cosines**power).sum(), abs=1e-5)


def test_the_kernel_scores_of_some_items_are_theirs_and_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    z = centred_unit_rows(rng.normal(size=(3_000, 4)))
    z[5] = 0.0
    train = sp.csr_array(rng.random((20, 3_000)) < 0.05, dtype=np.float32)
    users, items = np.arange(20), np.array([2_999, 5, 700])
    monkeypatch.setattr("components.cllmr.linear.kernel.BLOCK_CELLS", 10_000_000)
    whole = KernelScores(train, z, 3.0).score(users)
    monkeypatch.setattr("components.cllmr.linear.kernel.BLOCK_CELLS", 50_000)
    tracemalloc.start()
    found = KernelScores(train, z, 3.0).score(users)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4e6  # the kernel of all of their items has 20 MB
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    np.testing.assert_allclose(KernelScores(train, z, 3.0).score(users, items), whole[:, items], rtol=1e-5)


def test_a_large_power_prefers_one_near_item_to_many_half_similar_ones() -> None:
    angle = np.pi / 3
    z = np.array([[1.0, 0.0], *[[np.cos(angle), np.sin(angle)]] * 4, [1.0, 0.0], [0.0, 0.0]])
    z[6] = [np.cos(1.6 * angle), np.sin(1.6 * angle)]  # at 36 degrees of the four, far from the first
    train = sp.csr_array(np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]], dtype=np.float32))
    for power, better in ((1.0, 6), (12.0, 5)):
        scores = KernelScores(train, z.astype(np.float32), power).score(np.array([0]))[0]
        assert scores[[5, 6]].argmax() + 5 == better


def test_a_user_without_items_has_no_text_scores() -> None:
    train = sp.csr_array((2, NUM_ITEMS), dtype=np.float32)
    assert not KernelScores(train, centred_unit_rows(side()), 3.0).score(np.array([0, 1])).any()


def test_a_weight_below_the_rounding_of_large_counts_is_no_obstacle() -> None:
    train = sp.csr_array(np.ones((20_000, 3), dtype=np.float32))  # singular, and float32 knows 20,000 to two thousandths
    found = Ease(train).fit(EaseSettings(l2=1e-4)).weights
    # each column is the mean of the two others, but for the weight of the ridge
    np.testing.assert_allclose(found, 0.5 * (1 - np.eye(3)), atol=1e-4)


# -- new items ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_an_item_that_is_new_stands_where_it_would_have_stood_had_it_been_there(share: float) -> None:
    """The same text as an item that is there: its row, its score among the others and its rank are that item's."""
    rng = np.random.default_rng(3)
    embeddings = rng.normal(size=(30, 6)).astype(np.float32) + 0.5
    embeddings[7] = 0.0  # no text
    embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
    texts = [None if row == 7 else f"Film {row % 4} of {row % 3}" for row in range(30)]
    words = ItemWords.of(texts, share) if share else None
    known = NewItems.of(embeddings, power=3.0, words=words)
    told = np.setdiff1d(np.arange(30), [7])
    rows = known.rows(embeddings[told], [texts[row] for row in told])
    np.testing.assert_allclose(rows.side, known.side[told], atol=1e-6)
    history = np.array([2, 11, 29])
    train = sp.csr_array((np.ones(3, np.float32), history, [0, 3]), shape=(1, 30))
    expected = KernelScores(train, known.side, 3.0, words and words.rows, share).score(np.array([0]))[0]
    placed = known.placed(rows, history)
    assert placed is not None
    np.testing.assert_allclose(known.of_history(history), expected, atol=1e-5)
    np.testing.assert_allclose(placed.scores, ((expected - expected.mean()) / expected.std())[told], atol=1e-4)
    best = told[np.argmin(placed.ranks)]
    assert (placed.ranks.min(), best) == (1, int(np.argmax(expected)))
    assert known.cosines(rows)[0].argmax() == told[0]


def test_where_training_kept_leading_components_a_new_text_is_cut_to_them() -> None:
    whole = np.random.default_rng(4).normal(size=(9, 8)).astype(np.float32)
    kept = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    known = NewItems.of(kept, power=2.0)
    np.testing.assert_allclose(known.rows(whole, [""] * 9).side, known.side, atol=1e-6)


def test_texts_that_say_nothing_about_any_item_place_none() -> None:
    known = NewItems.of(np.eye(4, dtype=np.float32), power=2.0)
    assert known.placed(known.rows(np.ones((1, 4)), [None]), np.array([], dtype=np.int64)) is None


def test_words_of_titles_tell_items_apart_that_embeddings_do_not() -> None:
    texts = [f"{brand} {kind} of steel, 10 mm" for brand in ("Acme", "Zeta", "Orion", "Vega") for kind in ("bolt", "nut")]
    words = ItemWords.of([*texts, None], 0.3)
    rows = words.rows.toarray()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [*[1.0] * len(texts), 0.0], atol=1e-6)
    alike = rows @ rows.T
    # the weights of eight texts: ln 9/9 + 1 of a word of all, ln 9/3 + 1 of a brand, ln 9/5 + 1 of a kind
    common, brand, kind = 4 * 1.0, (np.log(3) + 1) ** 2, (np.log(9 / 5) + 1) ** 2
    np.testing.assert_allclose(
        alike[0, [1, 2, 3]], [common + brand, common + kind, common] / (common + brand + kind), atol=1e-6
    )
    side = np.eye(2, dtype=np.float32)[[0, 1] * 4 + [0]]  # what an item is, and not whose
    both = TextRows(side, words.rows, words.share)
    np.testing.assert_allclose(both.kernel(both, 2.0), (0.7 * side @ side.T + 0.3 * alike) ** 2, atol=1e-6)
    np.testing.assert_allclose(words.of_new(["ACME\tbolt of steel: 10 mm"]).toarray()[0], rows[0], atol=1e-6)
    again = ItemWords.of([f"{text.split()[0]} {text}" for text in texts], 0.3)  # a word twice in a title is still in one text
    np.testing.assert_array_equal(again.rarity, words.rarity)
    beyond = words.of_new([" ".join(["word"] * FIRST_WORDS + [last]) for last in ("one", "two")]).toarray()
    np.testing.assert_array_equal(beyond[0], beyond[1])


def test_words_are_written_in_half_precision_and_what_does_not_fit_is_refused() -> None:
    words = ItemWords.of(["Acme bolt", None, "Zeta nut"], 0.3)
    tensors = words.tensors()
    again = ItemWords.of_tensors(tensors, 3, 0.3)
    np.testing.assert_allclose(again.rows.toarray(), words.rows.toarray(), atol=1e-3)
    np.testing.assert_array_equal(again.rarity, words.rarity)
    broken = (
        {"words.rarity": tensors["words.rarity"][:9]},
        {"words.indptr": tensors["words.indptr"][:-1]},
        {"words.indices": tensors["words.indices"][:-1]},
        {"words.data": np.full_like(tensors["words.data"], np.nan)},
    )
    for change in broken:
        with pytest.raises(ValueError, match=r"words|index|indices"):
            ItemWords.of_tensors({**tensors, **change}, 3, 0.3)
