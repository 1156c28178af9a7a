"""Rankings that batch scoring wrote answer requests: the same ones as the exact ranking, where they hold what is asked for."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.artifacts import MANIFEST, Manifest
from components.batch import stage
from components.batch.config import BatchConfig
from components.ids import UNKNOWN
from components.stages import Stage, run_stage
from serving import lifecycle, lists
from serving.approximate import Exactness
from serving.bundle import find_trained
from serving.lifecycle import Follower, Target, load
from serving.lists import BATCH, BATCH_VERSION, RankedLists
from serving.recommender import Recommender
from serving.schemas import RecommendRequest
from serving.scorer import Scorer
from serving.settings import Scoring
from tests.bundles import stored_bundle, write_random_bundle

pytestmark = pytest.mark.ray

NUM_USERS, NUM_ITEMS, LENGTH = 80, 150, 30
LISTS = Scoring(lists=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("store"))


def trained(root: str) -> Target:
    made = stored_bundle(root, partial(write_random_bundle, num_users=NUM_USERS, num_items=NUM_ITEMS))
    return Target("1", made.fingerprint, root)


@pytest.fixture(scope="module")
def target(root: str) -> Target:
    return trained(root)


@pytest.fixture(scope="module")
def scorer(target: Target, root: str) -> Scorer:
    return Scorer.load(Path(root) / "train" / target.fingerprint / "bundle")


def batch(target: Target, **settings: Any) -> Manifest:
    return stage.run({"train": target.fingerprint, "users_per_part": 30, "k": LENGTH, **settings}, target.storage_root)


def no_memory(*_: object) -> RankedLists:
    raise MemoryError


def marked(found: RankedLists) -> RankedLists:
    """The same lists with scores that tell an answer of theirs from a computed one."""
    return RankedLists(found._rows, found._scores + 1000)


class Told:
    """Remembers what was measured."""

    def __init__(self) -> None:
        self.seen: list[Exactness] = []

    def measured(self, target: Target, exactness: Exactness) -> None:
        self.seen.append(exactness)

    def swapped(self, before: Target | None, now: Target) -> None: ...

    def settled(self, on_champion: bool) -> None: ...

    def refused(self, target: Target) -> None:
        pytest.fail("the bundle is whole")

    def tried(self, before: Target | None, now: Target | None) -> None: ...


def follower_of(target: Target, told: Told) -> Follower:
    return Follower([target], lambda: target, told, interval=1, scoring=LISTS)


def test_no_table_then_one_that_a_running_replica_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "LISTS_SECONDS", 0.0)
    target, told = trained(str(tmp_path)), Told()
    follower = follower_of(target, told)
    assert follower.live.recommender.exactness.lists == "missing"
    batch(target, exclude_seen=False)
    batch(target, debias=0.9)
    follower.look()  # neither answers what is asked when nothing else is
    assert [one.lists for one in told.seen] == ["missing"]
    batch(target)
    follower.look()
    follower.look()
    assert [(one.lists, one.lists_recall) for one in told.seen] == [("missing", None), ("on", 1.0)]
    assert follower.live.recommender.describe(0).lists_recall == 1.0
    monkeypatch.setattr(lists, "read", lambda *_: pytest.fail("read again"))
    follower.look()


def test_a_table_of_some_users_makes_way_for_one_of_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "LISTS_SECONDS", 0.0)
    target, users = trained(str(tmp_path / "store")), tmp_path / "users.csv"
    users.write_text("user_id\nu7\n")
    batch(target, users=str(users))
    follower = follower_of(target, Told())
    assert np.flatnonzero(follower.live.recommender._lists.lengths).tolist() == [7]  # type: ignore[union-attr]
    batch(target)
    with monkeypatch.context() as patched:
        patched.setattr(lists, "read", no_memory)
        follower.look()
    assert follower.live.recommender.exactness.lists == "on"  # those of before are as good as they were
    monkeypatch.setattr(lifecycle, "RETRY_SECONDS", (0.0,))
    follower._look_for_lists_at = 0.0
    follower.look()
    assert np.count_nonzero(follower.live.recommender._lists.lengths) == NUM_USERS  # type: ignore[union-attr]


def test_of_tables_of_the_current_version_the_one_with_most_rows_is_taken_and_of_several_the_newest(
    tmp_path: Path, scorer: Scorer
) -> None:
    target = trained(str(tmp_path))
    made_by = {"train": find_trained(target.storage_root, target.fingerprint)}

    def table(version: int, num_rows: int, created_at: str) -> str:
        settings = BatchConfig(users_per_part=int(created_at))  # makes it another one
        made = run_stage(Stage(BATCH, version), settings, str(tmp_path), made_by, lambda directory: {"num_rows": num_rows})
        made.model_copy(update={"created_at": created_at}).write(tmp_path / BATCH / made.fingerprint / MANIFEST)
        return made.fingerprint

    def found() -> str | None:
        best = lists.find(target.storage_root, target.fingerprint, scorer)
        return best and best.fingerprint

    table(BATCH_VERSION - 1, 30, "2001")
    assert found() is None
    of_year = {year: table(BATCH_VERSION, 20, year) for year in ("2004", "2005", "2003")}
    table(BATCH_VERSION, 10, "2006")
    assert found() == of_year["2005"]


def test_lists_that_storage_did_not_give_are_asked_for_again_and_poor_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "LISTS_SECONDS", 0.0)
    monkeypatch.setattr(lifecycle, "RETRY_SECONDS", (0.0, 0.0, 1000.0))
    target, told = trained(str(tmp_path)), Told()
    batch(target)
    reads = 0

    def away(*_: object) -> RankedLists:
        nonlocal reads
        reads += 1
        raise OSError("storage is away")

    with monkeypatch.context() as patched:
        patched.setattr(lists, "read", away)
        follower = follower_of(target, told)
        for _ in range(5):
            follower.look()
    assert reads == 4  # at the start, and three times with growing pauses
    assert [one.lists for one in told.seen] == ["refused"]
    with monkeypatch.context() as patched:
        patched.setattr(lists, "measured", lambda *_: 0.5)
        follower._look_for_lists_at = 0.0
        follower.look()
        monkeypatch.setattr(lists, "read", lambda *_: pytest.fail("a table that was measured is read again"))
        follower.look()
    assert [(one.lists, one.lists_recall) for one in told.seen] == [("refused", None), ("refused", 0.5)]
    monkeypatch.undo()
    monkeypatch.setattr(lifecycle, "LISTS_SECONDS", 0.0)
    batch(target, k=LENGTH + 20)  # another table, with more in it
    follower._look_for_lists_at = 0.0
    follower.look()
    assert told.seen[-1].lists == "on"


def test_answers_are_the_exact_ones_and_come_from_the_lists_where_these_hold_them(target: Target, scorer: Scorer) -> None:
    table = lists.find(target.storage_root, target.fingerprint, scorer) or batch(target)
    ready = marked(lists.read(table, scorer))
    exact, quick = Recommender(scorer, "1"), Recommender(scorer, "1", lists=ready)
    rng, items = np.random.default_rng(0), scorer.item_vocabulary.ids
    best = [items[row] for row in scorer.recommend(3, 25, exclude=scorer.seen(3)).rows]
    computed: list[dict[str, Any]] = [
        {"k": LENGTH + 1},
        {"k": 10, "exclude_seen": False},
        {"k": 10, "compare": True},
        {"k": 10, "debias": 0.0},
        {"k": 10, "allow": items[:100]},
        {"k": 10, "deny": best},
        {"k": 10, "recent": {"u3": [items[0]]}},
        {"k": 10, "users": ["nobody"]},
    ]
    ready_made: list[tuple[dict[str, Any], list[str]]] = [
        ({"k": 1}, []),
        ({"k": LENGTH}, []),
        ({"k": 10, "debias": scorer.debias_strength}, []),
        ({"k": 10, "deny": best[:12]}, []),
        ({"k": 10}, rng.choice(items, 20).tolist()),  # what the user did since is left out
    ]
    for asked, history, is_ready in [(one, [], False) for one in computed] + [(*one, True) for one in ready_made]:
        request = RecommendRequest.model_validate({"users": ["u3"], **asked})
        found, wanted = (one.recommend(request, [history]).results[0] for one in (quick, exact))
        assert [item.item_id for item in found.items] == [item.item_id for item in wanted.items], asked
        offset = 1000 if is_ready else 0
        scores = [[item.score for item in one.items] for one in (found, wanted)]
        np.testing.assert_allclose(scores[0], np.add(scores[1], offset), atol=1e-3)


def test_a_user_without_a_list_is_answered_exactly(target: Target, scorer: Scorer, tmp_path: Path) -> None:
    users = tmp_path / "users.csv"
    users.write_text("user_id\nu7\nstranger\n")
    some = lists.read(batch(target, users=str(users)), scorer)
    assert np.flatnonzero(some.lengths).tolist() == [7]
    quick, request = Recommender(scorer, "1", lists=marked(some)), RecommendRequest(users=["u7", "u8"], k=5)
    of_list, of_scorer = quick.recommend(request, [[], []]).results
    assert min(item.score for item in of_list.items) > 900 > max(item.score for item in of_scorer.items)
    assert len(of_scorer.items) == 5


def test_lists_that_are_not_good_enough_and_damaged_ones_are_refused_and_the_model_is_served(
    target: Target, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = lists.find(target.storage_root, target.fingerprint, scorer) or batch(target)
    good = lists.read(table, scorer)
    assert lists.measured(good, scorer) == 1
    shifted = np.where(good._rows == UNKNOWN, UNKNOWN, np.roll(good._rows, 1, axis=0))  # everybody has his neighbour's
    with monkeypatch.context() as patched:
        patched.setattr(lists, "read", lambda *_: RankedLists(shifted, good._scores))
        poor = load(target, LISTS).recommender
    assert poor.exactness.lists == "refused"
    assert poor.exactness.lists_recall is not None
    assert poor.exactness.lists_recall < 0.95
    request = RecommendRequest(users=["u3"], k=5)
    expected = Recommender(scorer, "1").recommend(request, [[]])
    assert poor.recommend(request, [[]]) == expected

    file = sorted((table.path() / stage.TABLE_DIRECTORY).glob("part-*.parquet"))[0]
    whole = file.read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), b"", None):  # None: whole, and memory is short
        file.write_bytes(whole if damage is None else damage)
        if damage is None:
            monkeypatch.setattr(lists, "read", no_memory)
        recommender = load(target, LISTS).recommender
        assert recommender.exactness.lists == "refused"
        assert recommender.recommend(request, [[]]) == expected
    monkeypatch.undo()
    assert load(target, LISTS).recommender.exactness.lists == "on"
