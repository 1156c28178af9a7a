"""An endpoint whose disk is full: everything that it and Ray write to, and every ranking is answered."""

import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from components.features import stage as features_stage
from components.serve.config import ServeConfig
from components.serve.stage import serve_document
from serving.run import running_endpoint
from tests.bundles import stored_bundle, write_random_bundle
from tests.features_parents import Small
from tests.load import USERS, Askers
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("mount") is None, reason="mount is not installed (Debian: apt-get install mount)"),
]

NUM_ITEMS = 60
NEWCOMER = "newcomer"
"""Has seen nothing but what is told."""


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A small one, with nothing else on it."""
    directory = Path(tempfile.mkdtemp(prefix="disk"))  # a short name: Ray's sockets lie below it
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192m", "tmpfs", directory], capture_output=True, text=True)
    if mounted.returncode:
        directory.rmdir()
        pytest.skip(f"a disk cannot be mounted here, which takes root: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
        directory.rmdir()


@pytest.fixture(scope="module")
def url(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The storage root with the online store, and the logs and sessions of Ray, on that disk."""
    root = str(disk / "store")
    users, items = [f"u{row}" for row in range(USERS)], [f"i{row}" for row in range(NUM_ITEMS)]
    seen = [(user, user, 1_000_000_000 + user, "train") for user in range(USERS)]
    features = features_stage.run({}, root, **Small(root, users=users, items=items, events=seen).write().as_arguments())
    write = partial(write_random_bundle, num_users=USERS, num_items=NUM_ITEMS, feature_fingerprint=features.fingerprint)
    trained = stored_bundle(root, write, parents={"features": features})
    champion = {"version": "1", "fingerprint": trained.fingerprint, "storage_root": root, "bundle": ""}
    settings = ServeConfig(feature_deadline_ms=10_000, poll_interval_s=0)  # a generous deadline: the machine may be busy
    config = tmp_path_factory.mktemp("serve") / "serve.yaml"
    config.write_text(yaml.safe_dump(serve_document(settings, champion, features.fingerprint, "sqlite:///nowhere.db", "cllmr")))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", str(disk))
        with running_endpoint(config, port=0) as url:
            yield url


def fill(disk: Path) -> Path:
    """To the last byte."""
    file = disk / "filler"
    with open(file, "wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    stream.write(bytes(size))
    return file


def tell(url: str, item_id: str) -> httpx.Response:
    event = {"user_id": NEWCOMER, "item_id": item_id, "timestamp": int(time.time())}
    return httpx.post(f"{url}/v1/events", json={"events": [event]}, timeout=60)


def ranked_to(url: str, user_id: str) -> tuple[str | None, set[str]]:
    answer = httpx.post(f"{url}/v1/recommend", json={"users": [user_id], "k": NUM_ITEMS}, timeout=60)
    assert answer.status_code == 200
    return answer.headers.get("x-degraded"), {item["item_id"] for item in answer.json()["results"][0]["items"]}


def test_a_full_disk_costs_no_answer_and_events_are_refused_until_there_is_room(url: str, disk: Path) -> None:
    assert (disk / "ray").is_dir(), "Ray does not write here"
    assert tell(url, "i30").json()["statuses"] == ["stored"]
    with Askers(url) as askers:
        before = len(askers.outcomes)
        with askers.measured("disk full"):
            filler = fill(disk)
            with pytest.raises(OSError, match="No space left"):
                (disk / "more").write_bytes(bytes(1 << 16))
            refused = tell(url, "i31")
            assert (refused.status_code, refused.json()["code"]) == (503, "features_unavailable")
            assert refused.headers["retry-after"] == "1"
            for _ in range(2):
                askers.wait_for_calm()
            degraded, items = ranked_to(url, NEWCOMER)
            assert degraded is None, "what is in the store is still read"
            assert "i30" not in items
            assert "i31" in items
            assert shutil.disk_usage(disk).free == 0
            filler.unlink()
            wait_until("room", lambda: tell(url, "i31"), lambda response: response.status_code == 200)
            askers.wait_for_calm()
    assert set(askers.outcomes[before:]) == {"200"}, Counter(askers.outcomes[before:])
    assert "i31" not in ranked_to(url, NEWCOMER)[1]
