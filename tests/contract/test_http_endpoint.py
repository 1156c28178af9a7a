"""The endpoint as it is deployed: Ray Serve on loopback, asked over HTTP."""

import json
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.cllmr.linear.kernel import NewItems
from components.errors import ArtifactError, ConfigError, ServingError
from components.sideinfo.config import DEFAULT_ENCODER
from components.sideinfo.encoder import encode, load
from serving import run
from serving.client import Client
from serving.ranking import top_k
from serving.run import free_port, parse_app_args, read_app_args, running_endpoint, wait_until_ready
from serving.schemas import Event, NewItem
from serving.scorer import Scorer
from tests.bundles import write_item_columns, write_random_bundle, write_text
from tests.waiting import wait_until

pytestmark = pytest.mark.ray


def write_config(directory: Path, bundle: Path, **args: Any) -> Path:
    values = {"storage_root": str(directory), "train": "0" * 16, "model_version": "7", "bundle_dir": str(bundle), **args}
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"import_path": "serving.app:build_app", "args": values}]}))
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_random_bundle(tmp_path_factory.mktemp("random") / "bundle", num_users=30, num_items=120)
    return write_item_columns(directory, tag=["odd" if row % 2 else "even" for row in range(120)])


@pytest.fixture(scope="module")
def encoder() -> Any:
    """What the texts of training were read by."""
    return load(DEFAULT_ENCODER)


@pytest.fixture(scope="module")
def texts(bundle: Path, encoder: Any) -> NewItems:
    """Of the bundle's items."""
    things = ("sharks", "love", "war", "a bank robbery", "the moon", "cooking", "a haunted house", "tennis", "spies", "a train")
    places = ("Paris", "the desert", "a small town", "the sea", "Tokyo", "a prison", "the jungle", "winter", "school", "Mars")
    told = [f"A film about {thing} in {place}." for place in (*places, "a bar", "a castle") for thing in things]
    return write_text(bundle, encode(encoder, told, 32, lambda done: None), DEFAULT_ENCODER, told=told, share=0.4)


@pytest.fixture(scope="module")
def scorer(bundle: Path) -> Scorer:
    return Scorer.load(bundle)


@pytest.fixture(scope="module")
def url(bundle: Path, texts: NewItems, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("serve")
    config = write_config(directory, bundle, scorer={"max_ongoing_requests": 2, "max_queued_requests": 4})
    with running_endpoint(config, port=0) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("debias", [None, 0.0, 0.25, 1.0])
def test_offline_scores_equal_http_scores(client: Client, scorer: Scorer, debias: float | None) -> None:
    users = np.arange(scorer.num_users)
    offline = scorer.score_all(users, debias)
    for user in users[::7].tolist():
        answer = client.score(f"u{user}", scorer.item_vocabulary.ids, debias=debias)
        np.testing.assert_allclose([item.score for item in answer.scores], offline[user], atol=1e-5)
    ranked = client.recommend([f"u{user}" for user in users], 15, debias=debias)
    for user, result in enumerate(ranked.results):
        expected = scorer.recommend(user, 15, debias, exclude=scorer.seen(user))
        assert [item.item_id for item in result.items] == [f"i{row}" for row in expected.rows]
        np.testing.assert_allclose([item.score for item in result.items], expected.scores, atol=1e-5)


def test_what_a_user_did_just_now_counts_for_ranking_score_and_explanation(client: Client, scorer: Scorer) -> None:
    recent = [f"i{row}" for row in np.setdiff1d(np.arange(6), scorer.seen(1))[:2]]
    (result,) = client.recommend(["u1"], 1, recent={"u1": recent}).results
    (best,) = result.items
    (scored,) = client.score("u1", [best.item_id], recent=recent).scores
    explained = client.explain("u1", best.item_id, recent=recent).explanation
    assert explained is not None
    assert scored.score == pytest.approx(best.score, abs=1e-5)
    assert explained.debiased_score == pytest.approx(best.score, abs=1e-5)
    told, untold = (client.score("u1", scorer.item_vocabulary.ids, recent=items).scores for items in (recent, []))
    assert [item.score for item in told] != [item.score for item in untold]


def test_unknown_users_and_items_are_answered(client: Client, scorer: Scorer) -> None:
    (result,) = client.recommend(["who"], 5).results
    assert (result.cold, result.method, result.reason) == (True, "popularity", "unknown_user")
    assert [item.item_id for item in result.items] == [f"i{row}" for row in np.argsort(-scorer.popular(), kind="stable")[:5]]
    assert client.score("u1", ["what", "i1"]).unknown_items == ["what"]
    (result,) = client.recommend(["who"], 5, recent={"who": ["i3", "i4"]}, debias=1.0).results
    assert (result.cold, result.method) == (True, "fold_in")
    expected = top_k(scorer.fold_in([3, 4], 1.0), 5, scorer.candidates(exclude=[3, 4]))
    assert [item.item_id for item in result.items] == [f"i{row}" for row in expected.rows]
    assert client.explain("who", "what").reason == "unknown_user"
    assert client.explain("u1", "what").reason == "unknown_item"


def test_items_are_filtered_by_what_the_bundle_says_of_them(client: Client, scorer: Scorer) -> None:
    (result,) = client.recommend(["u3"], 15, filters={"tag": ["odd"]}).results
    odd = [f"i{row}" for row in scorer.recommend(3, 120, exclude=scorer.seen(3)).rows if row % 2]
    assert [item.item_id for item in result.items] == odd[:15]
    with pytest.raises(ServingError, match=r"no item has 'tag' = 'old'\. Did you mean 'odd'"):
        client.recommend(["u3"], filters={"tag": ["old"]})
    assert client.model().model.filters["tag"].values == ["even", "odd"]


def test_a_new_item_is_scored_from_its_text_as_if_it_had_been_there(
    client: Client, scorer: Scorer, texts: NewItems, encoder: Any
) -> None:
    """Its neighbours, its score and its rank are those that the same text has among the items that were there."""
    new = [
        NewItem(item_id="copy", text="A film about war in Tokyo."),
        NewItem(item_id="other", text="A film about knights in a castle."),
    ]

    def refusal() -> str | None:
        """What is said until the encoder is there, which is started and loaded by the first who asks."""
        try:
            client.new_items(new[:1])
        except ServingError as error:
            return str(error)
        return None

    def is_there(told: str | None) -> bool:
        assert told is None or re.search("encoder did not answer|does not answer in time", told), told
        return told is None

    wait_until("the encoder", refusal, is_there)
    answer = client.new_items(new, ["u3", "who", "else"], recent={"who": ["i7", "nope"]}, num_neighbours=3)
    assert (answer.model_version, answer.encoder) == ("7", DEFAULT_ENCODER)
    written = [item.text for item in new]
    rows = texts.rows(encode(encoder, written, 32, lambda done: None), written)
    for number, result in enumerate(answer.results):
        three, who, other = result.scores
        for scored, history in ((three, scorer.seen(3)), (who, np.array([7]))):
            expected = texts.placed(rows, history)
            assert expected is not None
            assert scored.score == pytest.approx(expected.scores[number], abs=0.02)  # the bundle's texts have half precision
            assert scored.rank is not None
            assert abs(scored.rank - expected.ranks[number]) <= 1
        assert (three.cold, who.cold) == (False, True)
        assert (other.score, other.rank, other.reason) == (None, None, "no_history")
        nearest = np.argsort(-texts.cosines(rows)[number], kind="stable")[:3]
        assert [one.item_id for one in result.nearest_items] == [f"i{row}" for row in nearest]
    assert answer.results[0].nearest_items[0].item_id == "i42"
    assert answer.results[0].nearest_items[0].similarity == pytest.approx(1.0, abs=1e-3)


def test_an_endpoint_without_a_feature_store_says_that_it_keeps_no_events(client: Client) -> None:
    with pytest.raises(
        ServingError, match=r"no feature store, so it keeps no events\. Send them with the question, as 'recent'"
    ):
        client.tell([Event(user_id="u1", item_id="i1", timestamp=1)])


def test_answers_carry_one_request_id_and_the_model_version(url: str) -> None:
    response = httpx.post(f"{url}/v1/recommend", json={"users": ["u1"]}, headers={"X-Request-Id": "order-66"}, timeout=60)
    assert response.headers.get_list("x-request-id") == ["order-66"]
    assert response.headers["x-model-version"] == "7"
    error = httpx.post(f"{url}/v1/recommend", json={}, timeout=60)
    assert error.headers.get_list("x-request-id") == [error.json()["request_id"]]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"X-Request-Id", b"\xff")],
        [(b"X-Request-Id", b"<script>")],
        [(b"X-Request-Id", b"one"), (b"X-Request-Id", b"two")],
        [(b"X-Session-Id", b"\xff")],
        [(b"X-Request-Timeout-Seconds", b"0.000001")],
    ],
)
def test_headers_that_ray_serve_reads_end_in_no_error_of_its_own(url: str, headers: list[tuple[bytes, bytes]]) -> None:
    error = httpx.post(f"{url}/v1/recommend", json={}, headers=headers, timeout=60)
    assert (error.status_code, error.json()["code"]) == (422, "invalid_request")
    assert error.headers.get_list("x-request-id") == [error.json()["request_id"]]


def test_the_endpoint_is_healthy_ready_and_documented(url: str, client: Client) -> None:
    assert httpx.get(f"{url}/healthz", timeout=60).json()["status"] == "ok"
    assert httpx.get(f"{url}/readyz", timeout=60).json()["status"] == "ok"
    assert "/v1/explain" in httpx.get(f"{url}/openapi.json", timeout=60).json()["paths"]
    assert httpx.get(f"{url}/docs", timeout=60).status_code == 200
    model = client.model()
    assert (model.model_version, model.model.golden_requests, model.features.state) == ("7", 8, "not_configured")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 422),
        (b"[" * 100_000, 400),
        (b'{"users": ["a"], "debias": NaN}', 422),
        (b'{"users": ["a"], "colour": "red"}', 422),
        (json.dumps({"users": ["a"] * 101}).encode(), 422),
        (json.dumps({"users": ["a"], "deny": ["i"] * 10_001}).encode(), 422),
        (b" " * 5_000_000, 413),
    ],
    ids=["half", "deep", "nan", "unknown field", "too many users", "too long list", "huge"],
)
def test_a_malformed_request_is_refused_with_help(url: str, content: bytes, status: int) -> None:
    response = httpx.post(f"{url}/v1/recommend", content=content, headers={"Content-Type": "application/json"}, timeout=120)
    assert response.status_code == status
    assert set(response.json()) == {"code", "message", "hint", "request_id"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/recommend", "/v1/score", "/v1/explain", "/v1/events"]),
    body=st.binary(max_size=60)
    | st.dictionaries(
        st.sampled_from(["users", "user_id", "item_ids", "item_id", "k", "debias"]),
        st.none() | st.integers() | st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=3),
    ).map(lambda value: json.dumps(value).encode()),
)
def test_whatever_is_sent_there_is_never_a_server_error(url: str, path: str, body: bytes) -> None:
    response = httpx.post(f"{url}{path}", content=body, headers={"Content-Type": "application/json"}, timeout=120)
    assert response.status_code < 500, (body, response.text)


def test_more_requests_than_the_queue_holds_are_refused_at_once_and_told_when_to_come_back(url: str) -> None:
    body = {"users": [f"u{row}" for row in range(30)] * 3, "k": 100, "compare": True}
    statuses: Counter[int] = Counter()
    refusals: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(timeout=120) as http:
            for _ in range(4):
                response = http.post(f"{url}/v1/recommend", json=body)
                statuses[response.status_code] += 1
                if response.status_code != 200:
                    refusals.append(response)

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503}, statuses  # 2 at work and 4 waiting: 24 at a time are too many
    assert all(response.headers["retry-after"] == "1" for response in refusals)
    assert {response.json()["code"] for response in refusals} == {"overloaded"}


def test_a_port_that_is_taken_is_named_before_anything_starts(bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use\. .*port {port}.*--port {port + 1}"
        with (
            pytest.raises(ServingError, match=told),
            running_endpoint(write_config(tmp_path, bundle), port=port),
        ):
            pytest.fail("it must not start")


def test_a_second_endpoint_in_one_process_is_refused_and_the_first_goes_on(url: str, bundle: Path, tmp_path: Path) -> None:
    port = int(url.rpartition(":")[2])
    for asked, told in (
        (port, f"already runs the endpoint at 127.0.0.1:{port}"),
        (free_port("127.0.0.1", 0), "already has an"),
    ):
        with (
            pytest.raises(ServingError, match=told),
            running_endpoint(write_config(tmp_path, bundle), port=asked),
        ):
            pytest.fail("it must not start")
    assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200


def test_a_free_port_is_none_that_an_outgoing_connection_or_another_server_may_have_meanwhile() -> None:
    given = [free_port("127.0.0.1", 0) for _ in range(200)]
    assert len(set(given)) == 200, "each once, though nobody listens yet"
    assert all(20_000 <= port < 30_000 for port in given), "not of those that the kernel gives to connections"


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_port("127.0.0.1", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(run, "_PORTS", iter([taken.getsockname()[1], free]))
        assert free_port("127.0.0.1", 0) == free


def test_an_address_that_is_not_of_this_machine_is_refused() -> None:
    with pytest.raises(ServingError, match=r"cannot listen on 203\.0\.113\.7:0"):
        free_port("203.0.113.7", 0)


def test_a_damaged_bundle_is_refused_before_anything_starts(bundle: Path, tmp_path: Path) -> None:
    copy = write_random_bundle(tmp_path / "bundle")
    (copy / "golden.json").write_bytes((bundle / "golden.json").read_bytes())  # of another model
    with (
        pytest.raises(ArtifactError, match="golden request 0"),
        running_endpoint(write_config(tmp_path, copy), port=0),
    ):
        pytest.fail("it must not start")


def test_a_configuration_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    missing = r"serving configuration '.*missing.yaml' cannot be read: No such file or directory\. .*cllmr run --from serve"
    with pytest.raises(ArtifactError, match=missing):
        read_app_args(tmp_path / "missing.yaml")
    (tmp_path / "serve.yaml").write_text("applications: []")
    with pytest.raises(ArtifactError, match="is no serving configuration of this platform: IndexError"):
        read_app_args(tmp_path / "serve.yaml")


def test_an_unknown_argument_is_refused_with_the_nearest_one(bundle: Path, tmp_path: Path) -> None:
    args = read_app_args(write_config(tmp_path, bundle, feature_deadline=5))
    with pytest.raises(ConfigError, match=r"unknown setting 'args.feature_deadline'.*Did you mean 'feature_deadline_ms'"):
        parse_app_args(args)


def test_an_endpoint_that_never_gets_ready_is_given_up() -> None:
    port = free_port("127.0.0.1", 0)
    with pytest.raises(ServingError, match=rf"http://127\.0\.0\.1:{port} is not ready after 0.3 s \(ConnectError\)"):
        wait_until_ready(f"http://127.0.0.1:{port}", seconds=0.3)


@pytest.mark.parametrize(
    ("start", "seconds", "told"),
    [
        ("time.sleep(3600)", 2, "the endpoint has not started after 2 s: Recommender is UPDATING."),
        ("raise ValueError('no room')", 180, "the endpoint cannot start: ValueError: no room"),
    ],
    ids=["hang", "fail"],
)
def test_replicas_that_hang_or_fail_as_they_start_are_given_up_and_named(
    bundle: Path, tmp_path: Path, start: str, seconds: int, told: str
) -> None:
    code = f"""
import time, psutil, serving.app, serving.run
from ray import serve
from components.errors import ServingError

@serve.deployment(graceful_shutdown_timeout_s=1)
class Recommender:
    def __init__(self): {start}

serving.app.application = lambda args, trial: Recommender.bind()
serving.run.DEPLOYED_SECONDS = {seconds}
try:
    with serving.run.running_endpoint({str(write_config(tmp_path, bundle))!r}, port=0):
        raise AssertionError("it has started")
except ServingError as error:
    print(error.message, error.hint)
assert not psutil.wait_procs(psutil.Process().children(recursive=True), timeout=120)[1]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(told), done.stdout


def test_no_process_and_no_file_is_left_after_the_endpoint_has_stopped(bundle: Path, tmp_path: Path) -> None:
    """In a process of its own: its standard output must hold nothing but what it prints, and no child may outlive the block."""
    code = (
        "import sys, time, httpx, psutil, socket\n"
        "from serving.run import prepare_endpoint, running_endpoint\n"
        "port = prepare_endpoint(port=0).result()\n"
        f"with running_endpoint({str(write_config(tmp_path, bundle))!r}, port=port) as url:\n"
        "    assert httpx.post(url + '/v1/recommend', json={'users': ['u1']}, timeout=60).status_code == 200\n"
        "    started = psutil.Process().children(recursive=True)\n"
        "    assert len(started) >= 4\n"
        "gone, alive = psutil.wait_procs(started, timeout=120)\n"
        "assert not alive, alive\n"
        "with socket.socket() as probe:\n"
        "    assert probe.connect_ex(('127.0.0.1', int(url.rpartition(':')[2]))) != 0\n"
        "print('stopped')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
