"""Answers of the recommender and of the degrade ladder, on the tiny bundle whose numbers are known (see test_scorer)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from structlog.testing import capture_logs

from components.cllmr.linear.kernel import NewItems
from serving.degrade import Ladder, Query
from serving.ranking import top_k
from serving.recommender import Question, Recommender
from serving.schemas import ExplainRequest, ItemsRequest, NewItem, RankedItem, RecommendRequest, ScoreRequest
from serving.scorer import WEIGHT_PRODUCTS, Scorer
from serving.texts import Texts
from tests.bundles import write_bundle, write_random_bundle, write_text


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    return Recommender(Scorer.load(write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")), model_version="7")


@pytest.fixture(scope="module")
def folding(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """A model that can answer a history."""
    return Recommender(Scorer.load(write_random_bundle(tmp_path_factory.mktemp("random") / "bundle")), model_version="8")


def ids(items: list[RankedItem] | None) -> list[str]:
    return [item.item_id for item in items or []]


def test_a_known_user_gets_the_debiased_ranking_without_what_was_seen_in_training(recommender: Recommender) -> None:
    answer = recommender.recommend(RecommendRequest(users=["bob"], k=4), [[]])
    assert (answer.model_version, answer.debias) == ("7", 0.5)
    (result,) = answer.results
    assert (result.cold, result.method, result.reason, result.factual) == (False, "personalised", None, None)
    assert ids(result.items) == ["i0", "i3"]  # bob saw i1 and i2
    assert [item.rank for item in result.items] == [1, 2]
    assert [item.score for item in result.items] == [0.375, -0.25]
    assert result.items[0].title == "Alien (1979)"


def test_a_model_that_folds_nobody_in_answers_a_history_from_texts_alone(tmp_path: Path) -> None:
    """Items 0 and 2 are alike, and so are 1 and 3."""
    directory = write_bundle(tmp_path / "bundle")
    embeddings = np.array([[1, 0.1], [0, 1], [1, -0.1], [0.1, 1]], dtype=np.float32)
    write_text(directory, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), "MiniLM")
    scorer = Scorer.load(directory)
    recommender = Recommender(scorer, "7", Texts(directory, scorer))
    request = RecommendRequest(users=["new"], k=4, compare=True)
    (result,) = recommender.recommend(request, [["i0"]]).results
    assert (result.method, result.reason, ids(result.items)[0]) == ("side_information", "unknown_user", "i2")
    assert result.items == result.factual
    (nobody,) = Recommender(scorer, "7", unread := Texts(directory, scorer)).recommend(request, [[]]).results
    assert "_new_items" not in vars(unread)  # who has no history is not answered by texts, so that they take no memory
    assert (nobody.method, nobody.reason) == ("popularity", "unknown_user")
    (directory / "text.safetensors").write_bytes(b"\x00" * 20)
    damaged = Recommender(scorer, "7", Texts(directory, scorer))
    with capture_logs() as logs:
        assert [damaged.recommend(request, [["i0"]]).results[0].method for _ in range(2)] == ["popularity"] * 2
    assert ["text.safetensors cannot be read" in entry["reason"] for entry in logs] == [True]


def test_without_any_model_what_was_popular_is_told_without_what_is_seen_or_denied(recommender: Recommender) -> None:
    static = recommender.popular(3)
    assert [item.item_id for item in static.debiased.items] == ["i0", "i2", "i1"]
    request = RecommendRequest(users=["ann", "new"], k=2, deny=["i2"], recent={"new": ["i0"]}, compare=True)
    answer = static.recommend(request, [["nope"], []], "scorer_unavailable")
    assert answer.model_version == "7"
    ann, new = answer.results
    assert (ann.method, ann.reason, ids(ann.items), [item.rank for item in ann.items]) == (
        "static",
        "scorer_unavailable",
        ["i0", "i1"],
        [1, 2],
    )
    assert ids(new.items) == ids(new.factual) == ["i1"]
    also_seen = request.model_copy(update={"exclude_seen": False, "deny": []})
    ann, new = static.recommend(also_seen, [["i0"], []], "scorer_unavailable").results
    assert ids(ann.items) == ids(new.items) == ["i0", "i2"]


def test_the_online_history_counts_as_seen_too(recommender: Recommender) -> None:
    (result,) = recommender.recommend(RecommendRequest(users=["bob"], k=4), [["i3", "never heard of"]]).results
    assert ids(result.items) == ["i0"]


def test_seen_items_stay_in_when_asked_for(recommender: Recommender) -> None:
    (result,) = recommender.recommend(RecommendRequest(users=["bob"], k=4, exclude_seen=False), [["i3"]]).results
    assert ids(result.items) == ["i2", "i1", "i0", "i3"]


def test_compare_shows_both_rankings_and_the_places_won_and_lost(recommender: Recommender) -> None:
    request = RecommendRequest(users=["bob"], k=4, debias=1.0, compare=True, exclude_seen=False)
    (result,) = recommender.recommend(request, [[]]).results
    # TNIE of bob: -0.25, 0.125, 1.125, -1.5; TE of bob: 1, 0.75, 3, 1
    assert (ids(result.items), ids(result.factual)) == (["i2", "i1", "i0", "i3"], ["i2", "i0", "i3", "i1"])
    request = RecommendRequest(users=["ann"], k=2, debias=0.5, compare=True)
    (result,) = recommender.recommend(request, [[]]).results
    # ann saw i0; debiased 0.21875, 0.28125, -0.125 and factual 0.375, 0.75, 0.5 for i1, i2, i3
    assert [(i.item_id, i.debiased_rank, i.factual_rank, i.rank_change) for i in result.items] == [
        ("i2", 1, 1, 0),
        ("i1", 2, 3, 1),
    ]
    assert [(i.item_id, i.debiased_rank, i.factual_rank, i.rank_change) for i in result.factual or []] == [
        ("i2", 1, 1, 0),
        ("i3", 3, 2, -1),
    ]


def test_an_unknown_user_gets_the_popular_items_and_the_reason(recommender: Recommender) -> None:
    (result,) = recommender.recommend(RecommendRequest(users=["zoe"], k=3), [[]]).results
    assert (result.cold, result.method, result.reason) == (True, "popularity", "unknown_user")
    assert ids(result.items) == ["i0", "i2", "i1"]
    counts = np.log1p([3, 1, 3, 0])
    expected = (counts - counts.mean()) / counts.std()
    np.testing.assert_allclose([item.score for item in result.items], expected[[0, 2, 1]], rtol=1e-6)


def test_who_is_unknown_gets_what_is_popular_as_strongly_debiased_as_the_answer_says(folding: Recommender) -> None:
    """Also by the stored list, at the model's own strength or none; with none, all clicks count as they were made."""
    scorer = folding.scorer
    popular = scorer.popularity_scores
    by_strength = {λ: (1 - λ) * popular["factual"] + λ * popular["counterfactual"] for λ in (0.0, 0.3, 0.5, 1.0)}
    expected = {λ: [f"i{row}" for row in np.argsort(-scores, kind="stable")[:5]] for λ, scores in by_strength.items()}
    assert expected[0.0] == [f"i{row}" for row in np.argsort(-scorer.popularity, kind="stable")[:5]] != expected[1.0]
    for asked in (None, 0.0, 0.3, 1.0):
        request = RecommendRequest(users=["zoe"], k=5, debias=asked, compare=True)
        (result,) = folding.recommend(request, [[]]).results
        used = 0.5 if asked is None else asked
        assert (result.method, result.debias, ids(result.items)) == ("popularity", used, expected[used])
        assert ids(result.factual) == expected[0.0]
        np.testing.assert_allclose([item.score for item in result.items], np.sort(by_strength[used])[::-1][:5], rtol=1e-5)
        (static,) = folding.popular(5).recommend(request, [[]], "scorer_unavailable").results
        told = 0.0 if asked == 0 else 0.5
        assert (static.debias, ids(static.items), ids(static.factual)) == (told, expected[told], expected[0.0])


def test_an_unknown_user_with_a_history_is_not_shown_it_again(recommender: Recommender) -> None:
    (result,) = recommender.recommend(RecommendRequest(users=["zoe"], k=3), [["i0"]]).results
    assert ids(result.items) == ["i2", "i1", "i3"]


def test_a_user_without_training_interactions_is_answered_as_a_new_one(recommender: Recommender, tmp_path: Path) -> None:
    (result,) = recommender.recommend(RecommendRequest(users=["cat"], k=4), [[]]).results
    assert (result.cold, result.method, result.reason) == (True, "popularity", "unknown_user")
    scored = recommender.score(ScoreRequest(user_id="cat", item_ids=["i0"]))
    assert (scored.cold, scored.reason, scored.scores[0].score) == (True, "unknown_user", None)
    explained = recommender.explain(ExplainRequest(user_id="cat", item_id="i0"), [])
    assert (explained.cold, explained.reason, explained.explanation) == (True, "unknown_user", None)
    new, rows = (
        ItemsRequest(items=[NewItem(item_id="new", text="A film.")], users=["bob", "cat"]),
        np.eye(4, 3, dtype=np.float32),
    )
    (item,) = recommender.new_items(new, [[], []], "MiniLM", NewItems.of(rows, power=2.0), rows[:1]).results
    assert [score.cold for score in item.scores] == [False, True]

    directory = write_random_bundle(tmp_path / "bundle")
    tensors = load_file(directory / "model.safetensors")
    tensors["seen_indptr"][-1] = tensors["seen_indptr"][-2]
    tensors["seen_items"] = tensors["seen_items"][: tensors["seen_indptr"][-1]]
    save_file(tensors, directory / "model.safetensors")
    asked = RecommendRequest(users=["u49", "new"], k=200, recent={"u49": ["i7"], "new": ["i7"]})
    without, stranger = Recommender(Scorer.load(directory), "7").recommend(asked, [["i3"], ["i3"]]).results
    assert (without.cold, without.method, without.items) == (True, "fold_in", stranger.items)


def test_allow_and_deny_lists_narrow_the_candidates_and_ignore_unknown_items(recommender: Recommender) -> None:
    request = RecommendRequest(users=["ann", "zoe"], k=4, allow=["i1", "i3", "nope"], deny=["i3", "nope"])
    known, unknown = recommender.recommend(request, [[], []]).results
    assert ids(known.items) == ids(unknown.items) == ["i1"]


def test_scores_name_unknown_items_and_leave_them_empty(recommender: Recommender) -> None:
    answer = recommender.score(ScoreRequest(user_id="ann", item_ids=["i3", "nope", "i0"]))
    assert (answer.cold, answer.reason, answer.unknown_items) == (False, None, ["nope"])
    assert [(s.item_id, s.score, s.factual, s.direct, s.popularity) for s in answer.scores] == [
        ("i3", -0.125, 0.5, 1.25, 0),
        ("nope", None, None, None, None),
        ("i0", 0.6875, 1.0, 0.625, 3),
    ]


def test_an_unknown_user_has_no_scores_and_the_answer_says_why(recommender: Recommender) -> None:
    answer = recommender.score(ScoreRequest(user_id="zoe", item_ids=["i0", "nope"]))
    assert (answer.cold, answer.reason, answer.unknown_items) == (True, "unknown_user", ["nope"])
    assert [(s.score, s.title, s.popularity) for s in answer.scores] == [(None, "Alien (1979)", 3), (None, None, None)]


def test_an_explanation_adds_up_to_the_score(recommender: Recommender) -> None:
    answer = recommender.explain(ExplainRequest(user_id="bob", item_id="i0", debias=0.4, num_neighbours=1), ["i3"])
    parts = answer.explanation
    assert parts is not None
    assert (parts.total_effect, parts.natural_direct_effect, parts.total_natural_indirect_effect) == (1.0, 1.25, -0.25)
    assert parts.removed == pytest.approx(0.5)
    assert parts.debiased_score == pytest.approx(0.5)
    assert parts.propensity == 0.5
    # factual 1, 0.75, 3, 1 (i0 before i3 by row); debiased at 0.4: 0.5, 0.5, 2.25, 0
    assert (parts.factual_rank, parts.debiased_rank) == (2, 2)
    assert answer.profile == "A horror film in space."
    assert not answer.already_seen
    assert [(n.item_id, round(n.similarity, 4)) for n in answer.nearest_liked_items] == [("i1", 0.7071)]  # of i1, i2, i3


def test_an_explanation_of_something_unknown_says_what_is_unknown(recommender: Recommender) -> None:
    item = recommender.explain(ExplainRequest(user_id="bob", item_id="nope"), [])
    assert (item.reason, item.explanation, item.title, item.profile, item.nearest_liked_items) == (
        "unknown_item",
        None,
        None,
        None,
        [],
    )
    user = recommender.explain(ExplainRequest(user_id="zoe", item_id="i0"), ["i1"])
    assert (user.reason, user.cold, user.explanation, user.title) == ("unknown_user", True, None, "Alien (1979)")
    assert [n.item_id for n in user.nearest_liked_items] == ["i1"]


def test_a_new_user_with_a_history_gets_a_ranking_of_his_own(folding: Recommender) -> None:
    scorer = folding.scorer
    asked = RecommendRequest(users=["new", "newer"], k=5, recent={"newer": ["i7", "nope"]}, debias=0.3, compare=True)
    new, newer = folding.recommend(asked, [["i3"], ["i3"]]).results
    for result, rows in ((new, [3]), (newer, [3, 7])):
        assert (result.cold, result.method, result.reason) == (True, "fold_in", "unknown_user")
        for items, debias in ((result.items, 0.3), (result.factual, 0.0)):
            expected = top_k(scorer.fold_in(rows, debias), 5, scorer.candidates(exclude=rows))
            assert ids(items) == [f"i{row}" for row in expected.rows]


def test_a_new_user_without_a_known_item_gets_the_popular_ones(folding: Recommender) -> None:
    (result,) = folding.recommend(RecommendRequest(users=["new"], k=3, recent={"new": ["nope"]}), [[]]).results
    assert (result.cold, result.method, result.reason) == (True, "popularity", "unknown_user")


@pytest.mark.parametrize("at_once", [1, 3 * 200, 1 << 22])
def test_requests_that_are_answered_together_are_answered_as_alone(
    folding: Recommender, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        Question(RecommendRequest(users=["u1", "u2"], k=5), [["i3"], []]),
        Question(RecommendRequest(users=["u3"], k=200, debias=0.0, allow=["i1", "i2", "i3", "nothing"]), [[]]),
        Question(
            RecommendRequest(users=["u1", "new", "newer"], k=7, compare=True, recent={"u1": ["i9"], "new": ["i4"]}),
            [[], [], []],
        ),
        Question(RecommendRequest(users=["u4"], k=3, debias=0.3, exclude_seen=False, deny=["i7"]), [["i8"]]),
        Question(RecommendRequest(users=[f"u{row}" for row in range(20)], k=2), [[]] * 20),
    ]
    alone = [folding.recommend(*one) for one in asked]
    monkeypatch.setattr("serving.recommender.SCORES_AT_ONCE", at_once)
    together = folding.recommend_all(asked)
    for found, expected in zip(together, alone, strict=True):
        assert found.debias == expected.debias
        for one, other in zip(found.results, expected.results, strict=True):
            assert (one.user_id, one.cold, one.method, one.reason) == (other.user_id, other.cold, other.method, other.reason)
            for ours, theirs in ((one.items, other.items), (one.factual or [], other.factual or [])):
                assert [(i.item_id, i.rank, i.rank_change) for i in ours] == [
                    (i.item_id, i.rank, i.rank_change) for i in theirs
                ]
                np.testing.assert_allclose([i.score for i in ours], [i.score for i in theirs], atol=1e-5)
    assert [result.method for result in together[2].results] == ["personalised", "fold_in", "popularity"]
    assert folding.recommend_all([]) == []


def test_what_a_known_user_did_just_now_moves_the_ranking_and_the_stored_history_does_not(folding: Recommender) -> None:
    scorer = folding.scorer
    before, stored, now = (
        folding.recommend(RecommendRequest(users=["u1"], k=200, exclude_seen=False, recent=recent), [history]).results[0]
        for recent, history in (({}, []), ({}, ["i9"]), ({"u1": ["i9"]}, []))
    )
    assert ids(before.items) == ids(stored.items)
    assert [item.score for item in now.items] != [item.score for item in before.items]
    row = scorer.user_vocabulary.row("u1")
    assert ids(now.items) == [f"i{row}" for row in top_k(scorer.score_user(row, None, [9]), 200, scorer.candidates()).rows]
    left_out = folding.recommend(RecommendRequest(users=["u1"], k=200, recent={"u1": ["i9"]}), [[]]).results[0]
    assert "i9" not in ids(left_out.items)


@pytest.mark.parametrize("debias", [0.0, 0.3, 1.0])
def test_a_score_and_its_explanation_are_those_of_the_ranking_also_after_events(folding: Recommender, debias: float) -> None:
    recent = ["i9", "i30", "nope"]
    asked = RecommendRequest(users=["u1"], k=200, debias=debias, compare=True, exclude_seen=False, recent={"u1": recent})
    (ranked,) = folding.recommend(asked, [[]]).results
    scored = folding.score(ScoreRequest(user_id="u1", item_ids=ids(ranked.items), debias=debias, recent=recent)).scores
    np.testing.assert_allclose([one.score or 0.0 for one in scored], [item.score for item in ranked.items], atol=1e-5)
    factual = {item.item_id: item.score for item in ranked.factual or []}
    np.testing.assert_allclose([one.factual or 0.0 for one in scored], [factual[one.item_id] for one in scored], atol=1e-5)
    for item in ranked.items[::40]:
        answer = folding.explain(ExplainRequest(user_id="u1", item_id=item.item_id, debias=debias, recent=recent), [])
        assert answer.explanation is not None
        assert answer.explanation.debiased_score == pytest.approx(item.score, abs=1e-5)
        assert answer.explanation.total_effect == pytest.approx(factual[item.item_id], abs=1e-5)
        assert (answer.explanation.factual_rank, answer.explanation.debiased_rank) == (item.factual_rank, item.debiased_rank)
    liked = folding.explain(ExplainRequest(user_id="u1", item_id="i9", recent=recent, num_neighbours=20), ["i50"])
    assert liked.already_seen
    assert {"i30", "i50"} <= {neighbour.item_id for neighbour in liked.nearest_liked_items}


def test_what_histories_cost_counts_among_the_products_of_an_answer(folding: Recommender) -> None:
    def products(user: str, recent: int = 0, history: int = 0, **asked: Any) -> int:
        request = RecommendRequest(users=[user], recent={user: [f"i{row}" for row in range(recent)]}, **asked)
        return folding.products(Question(request, [["i1"] * history]))

    scorer = folding.scorer
    weights = WEIGHT_PRODUCTS * scorer.factual.weights.nnz // scorer.num_items  # of an item, in one of the two models
    assert products("new") == scorer.products_per_user
    assert products("u1", history=100) == products("u1") > products("new")
    assert products("u1", debias=0.0) == pytest.approx(products("new") + weights * len(scorer.seen(1)), rel=0.01)
    assert products("new", recent=60, history=40) == products("new", recent=100) > products("new", recent=1)
    one, two = (products("new", recent=100, debias=debias) - products("new") for debias in (0.0, 0.3))
    assert one > 100 * weights
    assert two == pytest.approx(2 * one, rel=0.01)
    asked: dict[str, Any] = {"debias": 0.3, "compare": True}
    assert products("new", recent=100, **asked) - products("new", **asked) == one + two


def test_the_ladder_keeps_the_first_reason_on_its_way_down() -> None:
    class Says:
        method = "personalised"

        def __init__(self, against: str | None) -> None:
            self.against = against

        def reason_against(self, query: Query) -> str | None:
            return self.against

    last = Says(None)
    ladder = Ladder([Says("first"), Says("second"), last])  # type: ignore[list-item]  # it only has to be chosen
    nothing = np.empty(0, dtype=np.int64)
    assert ladder.rung(Query(0, nothing, nothing)) == (last, "first")
