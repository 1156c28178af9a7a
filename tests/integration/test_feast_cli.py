"""The Feast command line on the repository and on a feature set that the stage wrote."""

from contextlib import chdir
from pathlib import Path

from click.testing import CliRunner
from feast.cli.cli import cli

from components.features.stage import run
from feature_repo.store import sqlite_path
from tests.features_parents import Small

REPOSITORY = Path(__file__).parents[2] / "feature_repo"


def feast(directory: Path, online_store: Path, *command: str) -> str:
    environment = {
        "CLLMR_FEATURE_PROJECT": "trial",
        "CLLMR_FEATURE_REGISTRY": str(online_store.with_suffix(".registry")),
        "CLLMR_ONLINE_STORE": str(online_store),
    }
    with chdir(directory):  # it goes there and does not come back
        done = CliRunner().invoke(cli, ["-c", str(directory), *command], env=environment)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_feast_plan_finds_every_definition_of_the_repository_once(tmp_path: Path) -> None:
    planned = feast(REPOSITORY, tmp_path / "online.db", "plan")
    created = sorted(line.removeprefix("Created ") for line in planned.splitlines() if line.startswith("Created feature"))
    assert created == [
        "feature service serving",
        "feature service training",
        "feature view item_counts",
        "feature view item_side_information",
        "feature view item_spectrum",
        "feature view user_counts",
        "feature view user_events",
        "feature view user_history",
        "feature view user_recommendations",
        "feature view user_side_information",
        "feature view user_spectrum",
    ]
    assert planned.count("Created entity") == 2


def test_feast_reads_a_written_feature_set_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    manifest = run({}, str(tmp_path), **Small(str(tmp_path)).write().as_arguments())
    online_store = sqlite_path(str(tmp_path), manifest.facts["project"])
    answer = feast(
        manifest.path(), online_store, "get-online-features", "-f", "user_counts:train_interactions", "-e", "user_id=7"
    )
    assert '"train_interactions": [\n        2\n    ]' in answer
    manifest.path()  # raises if a byte changed
