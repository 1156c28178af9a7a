"""What a running endpoint loses when a part of it is killed under load: few requests, each told, and not for long.

And what it loses to a request that makes the model fail: that one.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from ray import serve
from ray.exceptions import RayTaskError

from serving import APPLICATION
from serving.app import SCORER
from serving.client import Client
from serving.run import running_endpoint
from serving.schemas import RecommendRequest, RecommendResponse
from tests.bundles import write_random_bundle
from tests.load import CLIENTS, USERS, Askers

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = tmp_path_factory.mktemp("chaos")
    bundle = write_random_bundle(directory / "bundle", num_users=USERS, num_items=60)
    twice = {"num_replicas": 2, "num_cpus": 0.2}
    args = {"storage_root": str(directory), "train": "0" * 16, "model_version": "7", "bundle_dir": str(bundle)}
    application = {"import_path": "serving.app:build_app", "args": {**args, "gateway": twice, "scorer": twice}}
    (directory / "serve.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    with running_endpoint(directory / "serve.yaml", port=0) as url:
        yield url


def kill(part: str, restart: bool) -> None:
    """One of Serve's actors whose name holds this."""
    name = next(actor for actor in ray.util.list_named_actors(all_namespaces=True) if part in actor["name"])
    ray.kill(ray.get_actor(name["name"], namespace=name["namespace"]), no_restart=not restart)


@pytest.mark.parametrize(
    ("part", "allowed", "most"),
    [
        ("#Scorer#", {"503"}, 2 * CLIENTS),
        # the proxy answers for a gateway that died with a request, or asks another, which waits for the body that it had read
        ("#Gateway#", {"408", "500", "503"}, 2 * CLIENTS),
        ("SERVE_CONTROLLER_ACTOR", set(), 0),
        # the one proxy of this machine: nobody listens until it is back, and then it knows no routes for a moment
        ("SERVE_PROXY_ACTOR", {"connection lost", "404"}, None),
    ],
    ids=["scorer", "gateway", "controller", "proxy"],
)
def test_a_killed_part_costs_few_requests_and_comes_back(url: str, part: str, allowed: set[str], most: int | None) -> None:
    with Askers(url) as askers:
        before = len(askers.outcomes)
        with askers.measured(part):
            kill(part, restart=part.startswith("SERVE_"))
            askers.wait_for_calm()
            askers.wait_for_calm()  # and it stays so
    told = Counter(outcome for outcome in askers.outcomes[before:] if outcome != "200")
    assert set(told) <= allowed, told
    assert most is None or told.total() <= most, told


def test_a_client_that_tries_again_notices_nothing(url: str) -> None:
    with Client(url, timeout=60) as client:
        for number in range(40):
            if number == 10:
                kill("#Scorer#", restart=False)
            (result,) = client.recommend([f"u{number % USERS}"], 3).results
            assert len(result.items) == 3


def test_a_request_that_makes_the_model_fail_fails_alone(url: str) -> None:
    """Asked as a gateway asks: over HTTP no request is known that does. It stands for the one that nobody knows yet."""
    scorer = serve.get_deployment_handle(SCORER, APPLICATION)
    outcomes: Counter[str] = Counter()
    with Askers(url) as askers:
        before = len(askers.outcomes)
        for _ in range(10):
            # many at once, so that they are answered together: every fifth with no list for its user's history
            asked = [RecommendRequest(users=[f"u{number}"], k=5) for number in range(USERS)]
            waiting = [scorer.recommend.remote(one, [[] if number % 5 else None]) for number, one in enumerate(asked)]
            for number, waited in enumerate(waiting):
                try:
                    (result,) = RecommendResponse.model_validate_json(waited.result(timeout_s=60).answer).results
                    outcomes["answered" if result.user_id == f"u{number}" else "answer of another"] += 1
                except RayTaskError as error:
                    outcomes[type(error.cause).__name__ if number % 5 == 0 else "failed with another"] += 1
        askers.wait_for_calm()
    assert outcomes == {"answered": 10 * USERS * 4 // 5, "TypeError": 10 * USERS // 5}
    assert set(askers.outcomes[before:]) == {"200"}
