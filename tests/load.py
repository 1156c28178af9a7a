"""Clients that never pause, the models that they ask, and what an endpoint says of itself meanwhile."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import httpx
import numpy as np
import ray
import structlog
from prometheus_client.parser import text_string_to_metric_families

from components.artifacts import Manifest
from tests.bundles import stored_bundle, write_random_bundle
from tests.waiting import wait_until

CLIENTS = 4
USERS = 30
"""Whom `Askers` ask for."""
CALM = 30  # answers in a row, of all clients, after which the endpoint is taken to have recovered
RECOVERED_WITHIN = 180.0  # seconds

log = structlog.get_logger()


def train(root: str, seed: int) -> Manifest:
    """A model that `Load` can ask; the seed makes it another."""
    return stored_bundle(root, partial(write_random_bundle, seed=seed, feature_fingerprint=None), str(seed))


@dataclass
class Load:
    """Clients that ask one after another until they are told to stop, and what each was answered, in order."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    answers: list[list[tuple[int, str, str, float]]] = field(default_factory=lambda: [[] for _ in range(CLIENTS)])

    def ask(self, client: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            number = client
            while not self.stop.is_set():
                started = time.perf_counter()
                response = http.post("/v1/recommend", json={"users": [f"u{number % 50}"], "k": 5})
                seconds = time.perf_counter() - started
                version = response.json().get("model_version", "") if response.status_code == 200 else ""
                self.answers[client].append((response.status_code, response.headers["x-model-version"], version, seconds))
                number += 1

    def __enter__(self) -> "Load":
        self.threads = [threading.Thread(target=self.ask, args=(client,)) for client in range(CLIENTS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def wait_for(self, version: str, seconds: float = 180) -> None:
        """Until every client was answered by a version and by no other since."""
        wait_until(
            f"answers by version {version} alone",
            lambda: {answers[-1][1] if answers else "" for answers in self.answers},
            lambda versions: versions == {version},
            seconds,
        )


class Askers:
    """Clients that ask one after another, each request on its own connection, until they are told to stop."""

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        self.outcomes: list[str] = []
        """How requests ended, in order: their status, or the error on the way."""
        self.seconds: list[float] = []
        """What those that were answered took."""
        self._failed_at = 0.0
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                answer = httpx.post(f"{self._url}/v1/recommend", json={"users": [f"u{number % USERS}"], "k": 5}, timeout=60)
                told = str(answer.status_code)
                if answer.status_code == 503 and "retry-after" not in answer.headers:
                    told = "503 without Retry-After"
            except httpx.TimeoutException:
                told = "hung"
            except httpx.TransportError:
                told = "connection lost"
                time.sleep(0.05)
            if told == "200":
                self.seconds.append(time.monotonic() - began)
            else:
                self._failed_at = time.monotonic()
            self.outcomes.append(told)
            number += CLIENTS

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        """Tells in the log what was lost: requests and those that failed, the p99 of the rest, seconds to the last failure."""
        before, quick, began = len(self.outcomes), len(self.seconds), time.monotonic()
        yield
        told = Counter(self.outcomes[before:])
        log.info(
            "chaos",
            what=what,
            requests=told.total(),
            failed={outcome: count for outcome, count in told.items() if outcome != "200"},
            p99_ms=round(1000 * float(np.quantile(self.seconds[quick:], 0.99))),
            p99_before_ms=round(1000 * float(np.quantile(self.seconds[:quick], 0.99))),
            back_after_s=round(max(0.0, self._failed_at - began), 1),
        )

    def __enter__(self) -> "Askers":
        for thread in self._threads:
            thread.start()
        self.wait_for_calm()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_calm(self) -> None:
        """Waits for enough answers in a row from now on."""
        before = len(self.outcomes)
        wait_until(
            "calm",
            lambda: Counter(self.outcomes[before:][-CALM:]),
            lambda newest: newest == {"200": CALM},
            RECOVERED_WITHIN,
        )


def metrics() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What Ray exports of ours, by name and by the labels that are ours; summed over replicas."""
    (node,) = ray.nodes()
    text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60).text
    ours = ("model_version", "reason", "kind", "group", "method", "stage", "route")
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name.startswith("ray_cllmr_") else ():
            key = sample.name.removeprefix("ray_"), frozenset((k, v) for k, v in sample.labels.items() if k in ours)
            found[key] = found.get(key, 0.0) + sample.value
    return found


def metric(name: str, **labels: str) -> float:
    return metrics().get((name, frozenset(labels.items())), 0.0)
