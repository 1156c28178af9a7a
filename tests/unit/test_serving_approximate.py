"""Rankings that are not exact: what was measured is what happens, filters hold, the exact ranking is what remains."""

from pathlib import Path

import numpy as np
import pytest

from components.cllmr.linear.compact import CompactItems, ItemStorage
from components.cllmr.linear.scores import LinearScores, as_tensors
from components.errors import ArtifactError
from serving.approximate import MEASURED_K, ItemIndex, build_index, exact_scores, ndcg, overlap, prepare
from serving.lifecycle import Target, load
from serving.ranking import top_k
from serving.recommender import Question, Recommender
from serving.schemas import RecommendRequest
from serving.scorer import Scorer
from serving.settings import IndexKind, Scoring
from tests.bundles import write_factor_bundle, write_random_bundle

STORAGES: list[ItemStorage] = ["float32", "float16", "int8"]


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_factor_bundle(tmp_path_factory.mktemp("factors") / "bundle", 100, 6_000, 16, num_seen=10)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inner products and weights between items, another user side for the counterfactual."""
    return write_random_bundle(tmp_path_factory.mktemp("weighted") / "bundle", num_users=60, num_items=900)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("debias", [None, 0.0, 0.3, 1.0])
def test_the_ranking_is_the_brute_force_ranking_of_what_is_stored(weighted: Path, storage: ItemStorage, debias: float) -> None:
    scorer, exact = Scorer.load(weighted, storage), Scorer.load(weighted)
    rng = np.random.default_rng(0)
    for user in range(0, scorer.num_users, 7):
        scores = scorer.score_all(np.array([user]), debias)[0]
        off = np.abs(scores - exact.score_all(np.array([user]), debias)[0]).max()
        assert off <= scorer.bound(np.array([user]), debias)[0] + 1e-5
        assert (off > 1e-5) == (storage != "float32")
        deny, allow = rng.choice(scorer.num_items, 300), rng.choice(scorer.num_items, 500)
        allowed = sorted(set(allow.tolist()) - set(deny.tolist()) - set(scorer.seen(user).tolist()))
        found = scorer.recommend(user, 15, debias, scorer.seen(user), allow, deny)
        assert found.rows.tolist() == sorted(allowed, key=lambda row: (-scores[row], row))[:15]


@pytest.mark.parametrize("storage", STORAGES)
def test_equal_items_rank_by_row_however_they_are_stored(factors: Path, storage: ItemStorage, tmp_path: Path) -> None:
    scorer = Scorer.load(factors, storage)
    best = scorer.recommend(3, 1).rows[0]
    matrix = scorer.counterfactual.items, scorer.factual.items
    for items in matrix:  # a thousand items that are the best one
        array = items.stored if isinstance(items, CompactItems) else items
        array[4_000:5_000] = array[best]
        if isinstance(items, CompactItems):
            items.scale[4_000:5_000] = items.scale[best]
    again = Scorer({**_tensors(scorer)}, scorer.bundle, scorer.user_vocabulary.ids, _items(scorer))
    expected = sorted([int(best), *range(4_000, 5_000)])[:30]
    assert again.recommend(3, 30).rows.tolist() == expected
    assert (
        again.recommend(3, 30, deny=expected[:5]).rows.tolist()
        == sorted({int(best), *range(4_000, 5_000)} - {*expected[:5]})[:30]
    )


def _tensors(scorer: Scorer) -> dict[str, object]:
    none = np.zeros((scorer.num_items, scorer.factual.users.shape[1]), dtype=np.float32)
    tensors = as_tensors(LinearScores.of_factors(scorer.factual.users, none), "factual")
    return {
        **tensors,
        "factual.items": scorer.factual.items,
        "counterfactual.items": scorer.counterfactual.items,
        "item_vectors": scorer.factual.items,
        "propensity": scorer.propensity,
        "popularity": scorer.popularity,
        "seen_indptr": np.zeros(scorer.num_users + 1, dtype=np.int64),
        "seen_items": np.empty(0, dtype=np.int32),
    }


def _items(scorer: Scorer) -> list[dict[str, str]]:
    return [{"item_id": raw, "title": raw} for raw in scorer.item_vocabulary.ids]


@pytest.mark.parametrize("storage", STORAGES)
def test_golden_requests_hold_within_the_bound_and_a_wrong_one_is_refused_all_the_same(
    factors: Path, storage: ItemStorage
) -> None:
    scorer = Scorer.load(factors, storage)
    assert scorer.replay_golden() == 8
    scorer._golden[0]["scores"][0] += 3 * float(scorer.bound(np.arange(100)).max()) + 1e-3
    with pytest.raises(ArtifactError, match="scores differ at place 1"):
        scorer.replay_golden()


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("bundle", ["factors", "weighted"])
def test_what_compact_items_lose_is_measured_against_the_file(
    storage: ItemStorage, bundle: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(bundle)
    scorer, exact = Scorer.load(directory, storage), Scorer.load(directory)
    users = np.arange(10)
    np.testing.assert_allclose(exact_scores(scorer, directory, users), exact.score_all(users), atol=1e-5)
    _, measured = prepare(scorer, Scoring(item_storage=storage), directory)
    assert measured.storage_overlap is not None
    assert measured.storage_ndcg is not None
    assert measured.storage_overlap > (0.99 if storage == "float16" else 0.93)
    assert measured.storage_ndcg >= measured.storage_overlap - 0.01  # what is lost is at the end of the list
    if storage == "int8":
        assert measured.storage_overlap < 1


def test_the_measures_on_lists_one_can_follow() -> None:
    assert overlap([[1, 2], [3, 4]], [[2, 5], [3, 4]]) == 0.75
    assert ndcg([[2, 9]], [[2, 5]]) == pytest.approx(1 / (1 + 1 / np.log2(3)))
    assert ndcg([[9, 2]], [[2, 5]]) == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))
    assert overlap([[]], [[1]]) == ndcg([[]], [[1]]) == 0


def test_without_options_nothing_is_measured_and_everything_is_exact(factors: Path) -> None:
    index, measured = prepare(Scorer.load(factors), Scoring(), factors)
    assert index is None
    assert measured.model_dump() == {
        "item_storage": "float32",
        "storage_overlap": None,
        "storage_ndcg": None,
        "ann": "off",
        "ann_recall": None,
        "lists": "off",
        "lists_recall": None,
    }


# -- index ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faiss() -> None:
    pytest.importorskip("faiss", reason="the extra ann")


@pytest.mark.usefixtures("faiss")
@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["cells", "hnsw"])
@pytest.mark.parametrize(("bundle", "wanted"), [("factors", 0.8), ("weighted", 0.5)])
def test_an_index_finds_the_share_that_is_asked_for_also_on_other_users(
    storage: ItemStorage, kind: IndexKind, bundle: str, wanted: float, request: pytest.FixtureRequest
) -> None:
    scorer = Scorer.load(request.getfixturevalue(bundle), storage)
    if scorer.debiased is None:  # of two compact matrices there is no mixture to look through
        assert prepare(scorer, Scoring(item_storage=storage, ann_above=1), request.getfixturevalue(bundle))[1].ann == "refused"
        scorer.debias_strength = 1.0
        scorer.debiased = scorer.counterfactual
    index, share = build_index(scorer, Scoring(item_storage=storage, ann_above=1, ann_index=kind, ann_recall=wanted))
    assert index is not None
    assert ("HNSW" in type(index._index).__name__) == (kind == "hnsw")
    assert share >= wanted
    everything, shares = scorer.candidates(), []
    for user in range(scorer.num_users):
        found = index.ranking(user, MEASURED_K, everything)
        assert found is not None
        scores = scorer.score_all(np.array([user]))[0]
        np.testing.assert_allclose(found.scores, scores[found.rows], atol=1e-5)  # exact, of what it found
        assert found.rows.tolist() == sorted(found.rows.tolist(), key=lambda row: (-scores[row], row))
        shares.append(overlap([found.rows.tolist()], [top_k(scores, MEASURED_K, everything).rows.tolist()]))
    assert np.mean(shares) > wanted - 0.1


@pytest.mark.usefixtures("faiss")
def test_an_index_leaves_out_what_is_no_candidate_and_gives_up_where_too_little_is_left(factors: Path) -> None:
    scorer = Scorer.load(factors)
    index = ItemIndex(scorer, "float32")
    index.effort = index.num_cells  # all of them: exact
    for left_out in (0, 30, 900):
        candidates = scorer.candidates(deny=scorer.recommend(5, left_out).rows)
        found = index.ranking(5, 20, candidates)
        assert found is not None
        expected = top_k(scorer.score_all(np.array([5]))[0], 20, candidates)
        assert found.rows.tolist() == expected.rows.tolist()
    assert index.ranking(5, 20, scorer.candidates(allow=range(50))) is None
    index.effort = 1
    assert index.ranking(5, 900, scorer.candidates()) is None  # one cell has fewer


@pytest.mark.usefixtures("faiss")
def test_a_graph_that_is_looked_through_far_enough_finds_the_exact_ranking(factors: Path) -> None:
    scorer = Scorer.load(factors)
    index, everything = ItemIndex(scorer, "float32", "hnsw"), scorer.candidates()
    index.effort = scorer.num_items
    found = [index.ranking(user, MEASURED_K, everything) for user in range(20)]
    exact = [top_k(scores, MEASURED_K, everything).rows.tolist() for scores in scorer.score_all(np.arange(20))]
    assert overlap([[] if one is None else one.rows.tolist() for one in found], exact) > 0.99


@pytest.mark.usefixtures("faiss")
def test_an_index_that_finds_too_little_is_refused_and_the_answer_is_exact(factors: Path) -> None:
    scorer = Scorer.load(factors)
    index, measured = prepare(scorer, Scoring(ann_above=6_000, ann_recall=0.999999), factors)
    assert index is None
    assert measured.ann == "refused"
    assert measured.ann_recall is not None
    assert measured.ann_recall < 0.999999
    assert prepare(scorer, Scoring(ann_above=6_001), factors)[1].ann == "off"


@pytest.mark.usefixtures("faiss")
def test_requests_that_an_index_cannot_answer_are_answered_exactly(factors: Path) -> None:
    target = Target("1", "0" * 16, "", str(factors))
    quick, exact = load(target, Scoring(ann_above=1, ann_recall=0.7)).recommender, Recommender(Scorer.load(factors), "1")
    assert quick.describe(8).ann == "on"
    asked = [
        {"debias": 0.9},
        {"compare": True},
        {"allow": [f"i{row}" for row in range(0, 6_000, 9)]},
        {"recent": {"u1": ["i7"]}},
        {"deny": [f"i{row}" for row in range(5_000)]},
    ]
    requests = [RecommendRequest(users=["u1", "stranger"], k=20, **one) for one in asked]
    answers = quick.recommend_all([Question(request, [[], []]) for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        for one, other in zip(answer.results, exact.recommend(request, [[], []]).results, strict=True):
            assert [item.item_id for item in one.items] == [item.item_id for item in other.items]
            np.testing.assert_allclose(*([item.score for item in of.items] for of in (one, other)), atol=1e-5)
    plain = RecommendRequest(users=[f"u{row}" for row in range(100)], k=20)
    found, expected = (one.recommend(plain, [[]] * 100) for one in (quick, exact))
    assert found != expected  # by the index
    same = overlap(*([[item.item_id for item in one.items] for one in answer.results] for answer in (found, expected)))
    assert 0.6 < same < 1
