"""The answers that come with the platform: they are whole, say where they are from, and are replayed without asking anybody."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from components.ids import TRAIN
from components.ingest import stage as ingest
from components.ingest.dataset import Dataset
from components.sideinfo.config import SAMPLE_ROOT
from components.sideinfo.stage import make_writer
from pipelines.config import load
from tests import REPOSITORY

MARKERS = sorted((SAMPLE_ROOT / "answers").glob("*/*.json"))


@pytest.mark.parametrize("marker", MARKERS, ids=lambda marker: marker.parent.name)
def test_a_shard_is_whole_and_says_who_was_asked_what_and_when(marker: Path) -> None:
    about = json.loads(marker.read_text(encoding="utf-8"))
    assert hashlib.sha256(marker.with_suffix(".parquet").read_bytes()).hexdigest() == about["sha256"]
    assert about["decoding"]["model"] == load("smollm2").sideinfo.model
    assert about["prompt_hash"]
    assert about["prompt_version"]
    assert about["created_at"].startswith("20")


def test_the_preset_replays_them_for_all_items_and_users_and_asks_nobody(tmp_path: Path) -> None:
    settings = load("smollm2")
    data = ingest.run(settings.ingest.model_dump(mode="json"), str(tmp_path))
    training = Dataset.load(data.path()).only(TRAIN)
    before = sorted(SAMPLE_ROOT.rglob("*"))
    writer = make_writer(settings.sideinfo, str(tmp_path))
    profiles = writer.write_items(training)
    assert MARKERS
    assert sum(profile is not None for profile in profiles) > 0.9 * training.num_items
    assert all(profile.startswith("People who ") for profile in profiles if profile)
    writer.write_users(training, profiles)
    assert writer.write_references(training)
    account = writer.account
    assert account is not None
    assert (account.asked, account.unanswered) == (0, 0)
    assert sorted(SAMPLE_ROOT.rglob("*")) == before


def test_make_run_uses_them() -> None:
    """They are of the sample alone, so `cllmr run`, which anybody's data go through, does not."""
    printed = subprocess.run(["make", "-n", "run"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "cllmr run --preset smollm2" in printed
    settings = load("smollm2").sideinfo
    assert (settings.backend, settings.own_text) == ("replay", True)
    assert load("local").sideinfo.backend == "metadata"
