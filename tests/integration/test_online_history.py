"""Events of users through the endpoint into a real Redis, and back in their next answers; and a Redis that is stopped.

One endpoint as it is deployed, with the feature set in Redis, asked over HTTP.
"""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from components.cllmr.linear.newcomers import Fits
from components.errors import ServingError
from components.features import stage as features_stage
from components.registry import Registry, default_tracking_uri
from components.serve.config import ServeConfig
from components.serve.stage import serve_document
from components.train.bundle import write_newcomers
from pipelines.cli import app
from serving.client import Client
from serving.ranking import top_k
from serving.run import running_endpoint
from serving.schemas import Event, NewItem
from serving.scorer import Scorer
from tests.bundles import stored_bundle, write_random_bundle
from tests.features_parents import Small, embeddings
from tests.load import metric
from tests.stores import RedisServer
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
    ),
]

NUM_USERS, NUM_ITEMS = 20, 60
NEWCOMER = "registered"
"""Has a text, and has done nothing."""


@dataclass(frozen=True)
class World:
    root: str
    redis: RedisServer
    scorer: Scorer
    client: Client
    url: str

    def tell(self, *events: tuple[str, str, int]) -> Any:
        """Events of (user, item, seconds ago)."""
        now = int(time.time())
        return self.client.tell([Event(user_id=user, item_id=item, timestamp=now - ago) for user, item, ago in events])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = str(tmp_path_factory.mktemp("store"))
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    redis.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CLLMR_ONLINE_STORE", redis.address)
        users, items = [f"u{row}" for row in range(NUM_USERS)], [f"i{row}" for row in range(NUM_ITEMS)]
        seen = [(user, user, 1_000_000_000 + user, "train") for user in range(NUM_USERS)]
        parents = Small(root, users=users, items=items, events=seen, newcomers=[NEWCOMER]).write()
        features = features_stage.run({"online_store": "redis"}, root, **parents.as_arguments())

        def write(bundle: Path) -> None:
            write_random_bundle(bundle, NUM_USERS, NUM_ITEMS, feature_fingerprint=features.fingerprint)
            scorer = Scorer.load(bundle)
            models = {"factual": scorer.factual, "counterfactual": scorer.counterfactual}
            write_newcomers(bundle, Fits(embeddings(NUM_USERS), np.arange(NUM_USERS), models).fit(1.0, 0.0))

        trained = stored_bundle(root, write, parents={"features": features})
        models = Registry(default_tracking_uri(root), "cllmr")
        models.register(trained.fingerprint, root, f"train/{trained.fingerprint}/bundle", {})
        models.promote(trained.fingerprint)
        champion = {"version": "1", "fingerprint": trained.fingerprint, "storage_root": root, "bundle": ""}
        # a generous deadline: the machine may be busy
        settings = ServeConfig(feature_deadline_ms=10_000, poll_interval_s=0)
        document = serve_document(settings, champion, features.fingerprint, "sqlite:///nowhere.db", "cllmr")
        config = tmp_path_factory.mktemp("serve") / "serve.yaml"
        config.write_text(yaml.safe_dump(document))
        try:
            with running_endpoint(config, port=0) as url, Client(url, timeout=60) as client:
                yield World(root, redis, Scorer.load(trained.path() / "bundle"), client, url)
        finally:
            redis.stop()


def test_events_shape_the_next_answer_of_a_known_user(world: World) -> None:
    scorer, new = world.scorer, [40, 41]
    (before,) = world.client.recommend(["u3"], 10, debias=0.3).results
    told = world.tell(*(("u3", f"i{row}", 60) for row in new))
    assert (told.model_version, told.stored, told.statuses, told.unknown_items) == ("1", 2, ["stored", "stored"], [])
    (after,) = world.client.recommend(["u3"], 10, debias=0.3).results
    assert (after.method, after.reason) == ("personalised", None)
    seen = [*scorer.seen(3), 3, *new]
    expected = top_k(scorer.score_user(3, 0.3, new), 10, scorer.candidates(exclude=seen))
    assert [item.item_id for item in after.items] == [f"i{row}" for row in expected.rows]
    np.testing.assert_allclose([item.score for item in after.items], expected.scores, atol=1e-5)
    assert [item.score for item in before.items] != [item.score for item in after.items]


def test_a_new_user_becomes_known_through_events(world: World) -> None:
    (before,) = world.client.recommend(["newcomer"], 10).results
    assert (before.method, before.reason) == ("popularity", "unknown_user")
    world.tell(("newcomer", "i7", 30), ("newcomer", "i9", 20))
    (after,) = world.client.recommend(["newcomer"], 10, debias=0.5).results
    assert (after.cold, after.method, after.reason) == (True, "fold_in", "unknown_user")
    expected = top_k(world.scorer.fold_in([7, 9], 0.5), 10, world.scorer.candidates(exclude=[7, 9]))
    assert [item.item_id for item in after.items] == [f"i{row}" for row in expected.rows]
    nearest = world.client.explain("newcomer", "i1").nearest_liked_items
    assert {neighbour.item_id for neighbour in nearest} == {"i7", "i9"}


def test_the_commands_know_what_users_did_as_the_endpoint_does(world: World, tmp_path: Path) -> None:
    world.tell(("asked for", "i7", 30), ("asked for", "i9", 20))
    (answer,) = world.client.recommend(["asked for"], 10).results
    explained = world.client.explain("asked for", "i1")

    def told(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--storage", world.root, "--json", str(tmp_path / "answer.json")])
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "answer.json").read_text())

    (result,) = told("recommend", "asked for")["results"]
    assert (result["method"], [item["item_id"] for item in result["items"]]) == (
        "fold_in",
        [item.item_id for item in answer.items],
    )
    nearest = told("explain", "asked for", "i1")["nearest_liked_items"]
    assert [item["item_id"] for item in nearest] == [item.item_id for item in explained.nearest_liked_items] != []


def test_a_user_who_has_done_nothing_is_answered_by_his_text_until_he_does(world: World) -> None:
    (before,) = world.client.recommend([NEWCOMER], 10).results
    assert (before.cold, before.method, before.reason, before.history) == (True, "side_information", "unknown_user", None)
    rung = {"model_version": "1", "method": "side_information", "reason": "unknown_user"}
    wait_until("a counted answer", lambda: metric("cllmr_answers_total", **rung), lambda count: count == 1)
    world.tell((NEWCOMER, "i7", 30))
    (after,) = world.client.recommend([NEWCOMER], 10).results
    assert (after.method, after.history) == ("fold_in", "fresh")


def test_the_same_events_again_change_nothing_and_what_is_wrong_with_one_does_not_hold_up_others(world: World) -> None:
    now = int(time.time())
    events = [
        Event(user_id="u5", item_id="i50", timestamp=now),
        Event(user_id="u6", item_id="of tomorrow's catalogue", timestamp=now),
        Event(user_id="u6", item_id="i51", timestamp=1),
        Event(user_id="u6", item_id="i52", timestamp=now + 86_400),
    ]
    first, again = world.client.tell(events), world.client.tell(events)
    assert first.statuses == ["stored", "stored", "too_old", "in_the_future"]
    assert again.statuses == ["duplicate", "duplicate", "too_old", "in_the_future"]
    assert (first.stored, again.stored, again.unknown_items) == (2, 0, ["of tomorrow's catalogue"])
    five, six = world.client.recommend(["u5", "u6"], NUM_ITEMS).results
    assert "i50" not in {item.item_id for item in five.items}
    assert {"i51", "i52"} <= {item.item_id for item in six.items} | {f"i{row}" for row in world.scorer.seen(6)}


def test_a_model_without_texts_says_that_it_cannot_score_new_items(world: World) -> None:
    with pytest.raises(ServingError, match=r"trained without texts.*cllmr run --from train"):
        world.client.new_items([NewItem(item_id="new", text="A film.")], ["u1"])


def test_of_events_that_many_send_at_once_none_is_lost(world: World) -> None:
    def send(number: int) -> int:
        with Client(world.url, timeout=60) as client:
            now = int(time.time())
            return client.tell([Event(user_id="busy", item_id=f"i{number}", timestamp=now - number)]).stored

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(send, range(48))) == 48
    (result,) = world.client.recommend(["busy"], NUM_ITEMS).results
    assert {item.item_id for item in result.items} == {f"i{row}" for row in range(48, NUM_ITEMS)}


def test_redis_stopped_under_load_costs_freshness_and_no_answer(world: World) -> None:
    """What was last known is used, events are refused and told so, the store is left alone, and used again when it is back."""
    world.tell(("u8", "i30", 10))
    stop, answers = threading.Event(), [[] for _ in range(3)]

    def ask(mine: list[tuple[int, str | None, bool, float]]) -> None:
        with httpx.Client(base_url=world.url, timeout=60) as http:
            while not stop.is_set():
                started = time.perf_counter()
                response = http.post("/v1/recommend", json={"users": ["u8"], "k": NUM_ITEMS})
                knows = '"i30"' not in response.text
                mine.append((response.status_code, response.headers.get("x-degraded"), knows, time.perf_counter() - started))

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in answers]
    for thread in threads:
        thread.start()

    def latest() -> set[str | None]:
        return {mine[-1][1] if mine else "" for mine in answers}

    try:
        wait_until("answers by fresh events", latest, lambda degraded: degraded == {None})
        world.redis.stop()
        wait_until("an open circuit", latest, lambda degraded: degraded == {"features_circuit_open"})
        event = {"user_id": "u8", "item_id": "i31", "timestamp": int(time.time())}
        refused = httpx.post(f"{world.url}/v1/events", json={"events": [event]}, timeout=60)
        assert (refused.status_code, refused.json()["code"]) == (503, "features_unavailable")
        assert refused.headers["retry-after"] == "1"
        wait_until("an open circuit, counted", lambda: metric("cllmr_features_circuit_open"), lambda value: value == 1)
        assert all(mine[-1][2] for mine in answers)  # the last known events are still left out
        world.redis.start()
        wait_until("answers by fresh events again", latest, lambda degraded: degraded == {None})
        wait_until("a stored event", lambda: world.tell(("u8", "i31", 0)).stored, lambda count: count == 1)
        wait_until("a closed circuit", lambda: metric("cllmr_features_circuit_open"), lambda value: value == 0)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    given = [answer for mine in answers for answer in mine]
    assert {status for status, *_ in given} == {200}
    assert {reason for _, reason, *_ in given} <= {None, "features_unavailable", "features_timeout", "features_circuit_open"}
    assert metric("cllmr_last_good_histories_total") > 0
    assert metric("cllmr_degraded_answers_total", reason="features_circuit_open") > 0
