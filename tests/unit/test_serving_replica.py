"""A scorer replica, without Ray: what new items cost others, texts that are damaged, and a challenger on trial."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.cllmr.linear import kernel
from components.cllmr.linear.kernel import NewItems
from components.cllmr.linear.words import ItemWords
from serving import deployments, lifecycle
from serving.deployments import Answered, ScorerReplica
from serving.feature_set import FeatureSet
from serving.lifecycle import Target, load
from serving.recommender import Recommender
from serving.schemas import (
    ExplainRequest,
    Filter,
    ItemsRequest,
    ItemsResponse,
    NewItem,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
)
from tests.bundles import write_bundle, write_item_columns, write_random_bundle, write_text
from tests.waiting import wait_until

REQUEST = ItemsRequest(items=[NewItem(item_id="new", text="A film.")], users=["bob"])
TEXT = np.array([[1, 0.1], [0, 1], [1, -0.1], [0.1, 1]], dtype=np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = write_bundle(tmp_path / "bundle")
    write_text(directory, TEXT, "MiniLM")
    return directory


def scorer_of(bundle: Path) -> ScorerReplica:
    return ScorerReplica(Target("7", "0" * 16, "/store", str(bundle)), None, 0.0)


def test_a_replica_that_follows_nothing_holds_its_copy_of_the_model(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others on its machine drop the copies that nobody holds, and texts are read when they are first asked for."""
    held: list[tuple[str, ...]] = []
    monkeypatch.setattr(lifecycle, "hold", lambda *of: held.append(of))
    monkeypatch.setattr(deployments, "HOLD_SECONDS", 0.05)
    replica = scorer_of(bundle)
    wait_until("it was held twice", lambda: held, lambda times: len(times) > 1)
    replica._follower.close()
    assert set(held) == {("/store", "train", "0" * 16, "bundle")}


def test_new_items_hold_up_nobody_else_and_are_scored_one_request_at_a_time(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, others_answered = threading.Event(), threading.Event()
    at_once: list[str] = []
    real = Recommender.new_items

    def slow(self: Recommender, *asked: object) -> ItemsResponse:
        at_once.append("begun")
        begun.set()
        assert others_answered.wait(60), "nobody was answered meanwhile"
        at_once.append("done")
        return real(self, *asked)  # type: ignore[arg-type]

    monkeypatch.setattr(Recommender, "new_items", slow)

    async def ask() -> None:
        replica = scorer_of(bundle)
        asking = [asyncio.create_task(replica.new_items(REQUEST, [[]], "MiniLM", TEXT[:1])) for _ in range(3)]
        await asyncio.to_thread(begun.wait, 60)
        assert (await replica.popular(2)).model_version == "7"
        others_answered.set()
        for told in asking:
            answer = (await told).answer
            assert answer is not None
            assert [result.item_id for result in answer.results] == ["new"]

    asyncio.run(ask())
    assert at_once == ["begun", "done"] * 3


@pytest.fixture
def asides(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every question that a recommender is asked, whether it was in another thread than the event loop's."""
    found: list[bool] = []

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def ask(self: Recommender, *asked: Any) -> Any:
            found.append(threading.current_thread() is not threading.main_thread())
            return real(self, *asked)

        return ask

    for name in ("recommend_all", "score", "explain"):
        monkeypatch.setattr(Recommender, name, noted(getattr(Recommender, name)))
    return found


def test_a_comparison_counts_for_more_of_what_is_done_where_requests_come_in(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, asides: list[bool]
) -> None:
    replica = scorer_of(bundle)
    users = ["ann", "bob", "cat"]
    limit = len(users) * replica._follower.live.recommender.scorer.products_per_user
    monkeypatch.setattr(deployments, "PRODUCTS_AT_ONCE", limit)
    for compare in (False, True):
        asyncio.run(replica.recommend_here(RecommendRequest(users=users, k=2, compare=compare), [[]] * len(users)))
    assert asides == [False, True]


def test_long_histories_are_worked_on_in_a_thread(tmp_path: Path, asides: list[bool]) -> None:
    replica = scorer_of(write_random_bundle(tmp_path / "bundle"))
    strangers, items = [f"x{row}" for row in range(100)], [f"i{row}" for row in range(200)]
    for recent in ({}, dict.fromkeys(strangers, items)):
        asyncio.run(replica.recommend_here(RecommendRequest(users=strangers, recent=recent), [[]] * 100))
    assert asides == [False, True]


def test_scores_and_explanations_with_what_was_done_since_are_worked_on_in_a_thread(tmp_path: Path, asides: list[bool]) -> None:
    replica = scorer_of(write_random_bundle(tmp_path / "bundle"))
    for recent in ([], ["i1", "i2"]):
        asyncio.run(replica.score(ScoreRequest(user_id="u1", item_ids=["i3"], recent=recent)))
        asyncio.run(replica.explain(ExplainRequest(user_id="u1", item_id="i3", recent=recent), []))
    assert asides == [False, False, True, True]


def test_texts_that_are_damaged_are_told_as_texts_that_are_not_there(bundle: Path) -> None:
    replica = scorer_of(bundle)
    assert asyncio.run(replica.text_encoder()).answer == "MiniLM"
    (bundle / "text.safetensors").write_bytes(b"\x00" * 20)
    assert asyncio.run(scorer_of(bundle).text_encoder()).answer is None


def test_similarities_are_held_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(0)
    words = ItemWords.of([f"Acme bolt {row % 9} mm" for row in range(50)], 0.4)
    texts, history = NewItems.of(drawn.normal(size=(50, 8)), 3.0, words), drawn.choice(50, 7, replace=False)
    rows = texts.rows(drawn.normal(size=(5, 8)), ["Acme bolt"] * 5)
    whole = (texts.of_history(history), texts.placed(rows, history))
    monkeypatch.setattr(kernel, "BLOCK_CELLS", 20)
    np.testing.assert_allclose(texts.of_history(history), whole[0], rtol=1e-6)
    blocks = texts.placed(rows, history)
    assert blocks is not None
    assert whole[1] is not None
    np.testing.assert_allclose(blocks.scores, whole[1].scores, rtol=1e-5)


# -- a challenger on trial ------------------------------------------------------------------------------------------------


def tried(tmp_path: Path, **trial: Any) -> ScorerReplica:
    """A replica whose champion is "7", with a challenger "8" that was trained on other features and debiases more."""
    champion = write_bundle(tmp_path / "champion", header={"feature_fingerprint": "of 7"})
    write_item_columns(champion, genres=["Horror", "Comedy", "Romance", "Romance"])  # the challenger has none
    replica = scorer_of(champion)
    bundle = write_bundle(tmp_path / "challenger", header={"feature_fingerprint": "of 8", "debias_strength": 0.9})
    replica.reconfigure(trial)
    replica._follower.challenger = load(Target("8", "8" * 16, "/store", str(bundle)))
    return replica


def test_what_a_challenger_scores_and_explains_leaves_the_champions_features_for_all(tmp_path: Path) -> None:
    replica = tried(tmp_path, mode="canary", share=1.0)
    asked: list[Coroutine[Any, Any, Answered[Any]]] = [
        replica.score(ScoreRequest(user_id="ann", item_ids=["i0"])),
        replica.explain(ExplainRequest(user_id="ann", item_id="i1"), []),
    ]
    for told in map(asyncio.run, asked):
        assert (told.model_version, told.live_version, told.feature_set) == ("8", "7", FeatureSet("/store", "of 7"))


def test_what_a_challenger_cannot_filter_by_is_answered_by_the_champion_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = tried(tmp_path, mode="canary", share=0.5)
    left_out: list[str] = []
    monkeypatch.setattr(replica._metrics, "left_out", left_out.append)
    users = [f"u{number}" for number in range(20)]

    async def ask(filters: dict[str, Filter]) -> list[RecommendResponse]:
        asked = [RecommendRequest(users=users, k=2, filters=filters), RecommendRequest(users=users, k=2)]
        together = await asyncio.gather(*(replica.recommend_here(request, [[]] * len(users)) for request in asked))
        return [told.answer for told in together]

    filtered, plain = asyncio.run(ask({"genres": ["Romance"]}))
    assert {result.model_version for result in filtered.results} == {"7"}
    assert [item.item_id for item in filtered.results[0].items] == ["i2", "i3"]
    assert {result.model_version for result in plain.results} == {"7", "8"}  # another request of the same batch
    assert left_out == ["8"]


def test_every_user_is_told_the_strength_of_his_own_model(tmp_path: Path) -> None:
    replica = tried(tmp_path, mode="canary", share=0.5)
    users = [f"u{number}" for number in range(20)]
    for asked, expected in ((None, {("7", 0.5), ("8", 0.9)}), (0.3, {("7", 0.3), ("8", 0.3)})):
        request = RecommendRequest(users=users, k=2, debias=asked)
        told = asyncio.run(replica.recommend_here(request, [[]] * len(users))).answer
        assert {(result.model_version, result.debias) for result in told.results} == expected
        assert (told.model_version, told.debias) == ("7", asked or 0.5)
