"""The offline tables, settings and checks of the features stage that need no Feast."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.errors import ArtifactError, ConfigError, StorageError
from components.features import online, repository, tables
from components.features.config import FeaturesConfig
from components.features.reader import in_vocabulary_order
from components.features.repository import check_view, evenly_spaced
from components.features.stage import run
from components.features.tables import Inputs, Window, build_tables, load_inputs, window_of
from components.sideinfo.reader import written_profiles
from feature_repo.store import UNTIMED, FeatureStoreError, redis_connection, sqlite_path
from tests.features_parents import EVENTS, ITEMS, Event, Small, embeddings


def inputs(tmp_path: Path, events: list[Event] = EVENTS, name: str = "small") -> Inputs:
    parents = Small(str(tmp_path), name=name, events=events).write()
    return load_inputs(parents.ingest.path(), parents.sideinfo.path(), parents.spectrum.path())


def test_a_history_holds_every_split_in_order_of_time_with_the_most_recent_last(tmp_path: Path) -> None:
    history = build_tables(inputs(tmp_path), history_length=10)["user_history"].to_pylist()
    assert [row["user_id"] for row in history] == ["7", "9", "10"]
    # user 9's two items have one time: the lower item row comes first
    assert [row["item_ids"] for row in history] == [["2", "5", "31"], ["2", "30"], ["5", "31"]]
    assert history[0]["timestamps"] == [1_000_000_100, 1_000_000_200, 1_000_000_300]
    assert [row["event_timestamp"].timestamp() for row in history] == [1_000_000_300, 1_000_000_400, 1_000_000_900]


def test_a_history_keeps_only_its_latest_items(tmp_path: Path) -> None:
    history = build_tables(inputs(tmp_path), history_length=2)["user_history"].to_pylist()
    assert [row["item_ids"] for row in history] == [["5", "31"], ["2", "30"], ["5", "31"]]


def test_a_history_does_not_depend_on_the_order_of_the_interactions(tmp_path: Path) -> None:
    one = build_tables(inputs(tmp_path), 2)["user_history"]
    other = build_tables(inputs(tmp_path, events=EVENTS[::-1], name="reversed"), 2)["user_history"]
    assert one.equals(other)


def test_a_user_without_interactions_has_an_empty_history_dated_at_the_start_of_the_window(tmp_path: Path) -> None:
    history = build_tables(inputs(tmp_path, events=[event for event in EVENTS if event[0] != 1]), 10)[
        "user_history"
    ].to_pylist()
    assert history[1]["item_ids"] == []
    assert history[1]["event_timestamp"].timestamp() == 1_000_000_100


def test_counts_are_of_training_interactions_only(tmp_path: Path) -> None:
    tables = build_tables(inputs(tmp_path), 10)
    assert tables["item_counts"]["train_interactions"].to_pylist() == [1, 1, 1, 1]
    assert tables["item_counts"]["last_train_timestamp"].to_pylist() == [
        1_000_000_100,
        1_000_000_500,
        1_000_000_400,
        1_000_000_300,
    ]
    assert tables["user_counts"]["train_interactions"].to_pylist() == [2, 1, 1]
    assert tables["user_counts"]["last_train_timestamp"].to_pylist() == [1_000_000_300, 1_000_000_400, 1_000_000_500]


def test_training_views_are_dated_at_the_last_training_interaction(tmp_path: Path) -> None:
    tables = build_tables(inputs(tmp_path), 10)
    for view, table in tables.items():
        if view != "user_history":
            assert {time.timestamp() for time in table["event_timestamp"].to_pylist()} == {1_000_000_500}, view


def test_users_who_have_done_nothing_are_in_the_side_information_and_nowhere_else(tmp_path: Path) -> None:
    parents = Small(str(tmp_path), newcomers=["new", "newer"]).write()
    tables = build_tables(load_inputs(parents.ingest.path(), parents.sideinfo.path(), parents.spectrum.path()), 10)
    assert {view: table["user_id"].to_pylist() for view, table in tables.items() if view.startswith("user_")} == {
        "user_side_information": ["7", "9", "10", "new", "newer"],
        **{view: ["7", "9", "10"] for view in ("user_spectrum", "user_counts", "user_history")},
    }
    found = tables["user_side_information"]
    own = embeddings(5)[::-1].copy()
    own[2] = 0
    np.testing.assert_array_equal(np.array(found["introduction"].to_pylist(), np.float32), own)
    np.testing.assert_array_equal(np.array(found["embedding"].to_pylist(), np.float32), [*embeddings(3), *own[3:]])
    assert found["profile"].to_pylist()[2:] == ["profile of user 10", "introduction of new", "introduction of newer"]
    none = build_tables(inputs(tmp_path / "without"), 10)["user_side_information"]
    assert none["introduction"].to_pylist() == [[], [], []]


def test_the_text_of_a_row_is_what_was_embedded_its_own_and_the_profile(tmp_path: Path) -> None:
    parents = Small(str(tmp_path)).write()
    ingest, sideinfo, spectrum = (parent.path() for parent in parents.as_arguments().values())
    written = {"profile": [None, "For fans.", "For all.", None], "own_text": ["Alien.", "Brazil.", None, None]}
    pq.write_table(pa.table({"item_id": ITEMS, **written}), sideinfo / "items.parquet")
    found = build_tables(load_inputs(ingest, sideinfo, spectrum), 10)["item_side_information"]["profile"].to_pylist()
    assert found == ["Alien.", "Brazil. For fans.", "For all.", None]
    assert written_profiles(sideinfo, "item") == ["", "For fans.", "For all.", ""]


def test_embeddings_of_more_numbers_than_one_arrow_list_can_hold_are_written_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_tables(inputs(tmp_path), 10)
    dim = len(whole["item_side_information"]["embedding"][0])
    monkeypatch.setattr(tables, "_MAX_OFFSET", 2 * dim + 1)
    blocks = build_tables(inputs(tmp_path), 10)
    found = blocks["item_side_information"]["embedding"]
    assert [len(block) for block in found.chunks] == [2, 2]
    assert all(blocks[view].equals(table) for view, table in whole.items())
    pq.write_table(blocks["item_side_information"], tmp_path / "items.parquet")
    assert pq.read_table(tmp_path / "items.parquet").equals(whole["item_side_information"])


def test_histories_of_more_text_than_one_arrow_array_can_hold_are_written_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = inputs(tmp_path)
    whole = tables.user_history(data, 10)
    for most, sizes in ((1, [1, 1, 1]), (6, [1, 2]), (7, [2, 1]), (10, [3])):  # the users' ids have 4, 3 and 3 bytes
        monkeypatch.setattr(tables, "_MAX_OFFSET", most)
        blocks = tables.user_history(data, 10)
        assert [[len(block) for block in blocks[name].chunks] for name in ("item_ids", "timestamps")] == [sizes, sizes]
        assert blocks.equals(whole)
    pq.write_table(blocks, tmp_path / "history.parquet")
    assert pq.read_table(tmp_path / "history.parquet").equals(whole)


def test_introductions_of_more_text_than_one_arrow_array_can_hold_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = Small(str(tmp_path), newcomers=["new", "silent", "newer"]).write()
    long = pa.py_buffer(np.zeros(2**30, np.uint8))  # never looked at, so it takes no memory
    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2**30], np.int32)), long)
    blocks = [text, text, text, pa.array(["of new"]), text, pa.array(["of newer"])]
    texts = pa.table({"user_id": ["7", "9", "10", "new", "silent", "newer"], "profile": pa.chunked_array(blocks)})
    known = embeddings(6)
    known[4] = 0
    monkeypatch.setattr(pq, "read_table", lambda path, columns=None: texts)
    found = tables._introductions(parents.sideinfo.path(), {"introductions": known}, num_users=3)
    assert (found.newcomers.ids, found.newcomers.texts) == (["new", "newer"], ["of new", "of newer"])
    np.testing.assert_array_equal(found.newcomers.embeddings, known[[3, 5]])
    np.testing.assert_array_equal(found.users, known[:3])


def test_a_view_of_more_numbers_than_one_arrow_list_can_hold_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows = repository.SAMPLED_ROWS + 3
    sampled = evenly_spaced(num_rows, repository.SAMPLED_ROWS)
    sizes = [0 if row in sampled else 2**30 for row in range(num_rows)]  # of nulls, which take no memory
    lists = pa.chunked_array([pa.ListArray.from_arrays(pa.array([0, size], pa.int32()), pa.nulls(size)) for size in sizes])
    view = pa.table({"item_id": [str(row) for row in range(num_rows)], "embedding": lists})
    monkeypatch.setattr(repository, "_rows_found", lambda store, feature, key, ids: len(ids))
    store: Any = SimpleNamespace(
        get_online_features=lambda features, entity_rows: SimpleNamespace(
            to_dict=lambda: {"embedding": [[]] * len(entity_rows)}
        )
    )
    check_view(store, "items", view)


def test_held_out_interactions_change_the_histories_and_no_training_view(tmp_path: Path) -> None:
    changed = [
        (user, item, time, split) if split == "train" else (user, 2, time + 77, split) for user, item, time, split in EVENTS
    ]
    before, after = build_tables(inputs(tmp_path), 10), build_tables(inputs(tmp_path, changed, "changed"), 10)
    assert [view for view in before if not before[view].equals(after[view])] == ["user_history"]


def test_data_without_times_get_a_fixed_event_time(tmp_path: Path) -> None:
    untimed = [(user, item, 0, split) for user, item, _, split in EVENTS]
    tables = build_tables(inputs(tmp_path, untimed, "untimed"), 10)
    assert all({time.timestamp() for time in table["event_timestamp"].to_pylist()} == {UNTIMED} for table in tables.values())
    assert tables["user_history"]["item_ids"].to_pylist() == [["2", "5", "31"], ["2", "30"], ["5", "31"]]


def test_the_window_reaches_from_the_first_to_the_last_known_time() -> None:
    window = window_of(np.array([0, 30, 10, 20]))
    assert window == Window(10, 30)
    assert window.facts() == {"start": "1970-01-01T00:00:10+00:00", "end": "1970-01-01T00:00:30+00:00"}
    assert window_of(np.zeros(3, np.int64)) == Window(UNTIMED, UNTIMED)


def test_side_information_of_other_users_is_refused(tmp_path: Path) -> None:
    parents = Small(str(tmp_path), sideinfo_users=["7", "10", "9"]).write()
    with pytest.raises(
        ArtifactError, match=r"sideinfo's users.parquet lists 3 users that are not ingest's 3 in vocabulary order"
    ):
        load_inputs(parents.ingest.path(), parents.sideinfo.path(), parents.spectrum.path())


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    parents = Small(str(tmp_path), items=["2", "5", "30", "30"]).write()
    with pytest.raises(ArtifactError, match=r"items.parquet has 4 rows but 3 different ids"):
        load_inputs(parents.ingest.path(), parents.sideinfo.path(), parents.spectrum.path())


def test_a_parent_with_too_few_rows_or_nan_is_refused(tmp_path: Path) -> None:
    class Broken(Small):
        def _spectrum(self, directory: Path) -> dict[str, int]:
            from safetensors.numpy import save_file

            users = np.full((3 if self.name == "nan" else 2, 2), np.nan if self.name == "nan" else 0, np.float32)
            save_file({"users": users, "items": np.zeros((4, 2), np.float32)}, directory / "spectrum.safetensors")
            return {}

    for name, message in (
        ("short", "spectrum has 2 rows of spectrum for 3 users"),
        ("nan", "spectrum's spectrum of users contain NaN"),
    ):
        parents = Broken(str(tmp_path), name=name).write()
        with pytest.raises(ArtifactError, match=message):
            load_inputs(parents.ingest.path(), parents.sideinfo.path(), parents.spectrum.path())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"online_store": "dynamo"}, r"'features.online_store' = 'dynamo': Input should be 'sqlite' or 'redis'"),
        ({"history_length": 0}, r"'features.history_length' = 0: .* greater than or equal to 1"),
        ({"history": 5}, r"unknown setting 'features.history'. Did you mean 'history_length'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeaturesConfig.parse(setting, "features")


def test_sqlite_on_a_remote_storage_root_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    parents = Small(str(tmp_path)).write()
    with pytest.raises(
        ConfigError, match=r"'sqlite' needs a storage root on this machine, and 's3://bucket/x' is remote.*online_store=redis"
    ):
        run({}, "s3://bucket/x", **parents.as_arguments())
    assert sqlite_path("file:///data/my%20runs", "p") == Path("/data/my runs/online_store/p.db")


def test_an_unwritable_online_store_is_named_with_the_place_to_look(tmp_path: Path) -> None:
    parents = Small(str(tmp_path)).write()
    database = tmp_path / "online_store"
    database.mkdir()
    (database / "cllmr_x.db").mkdir()
    with pytest.raises(
        StorageError, match=r"online store 'sqlite' cannot be used: unable to open database file.*online_store is writable"
    ):
        online.check_reachable("sqlite", str(tmp_path), "cllmr_x")
    assert parents.ingest.path().is_dir()


@pytest.mark.parametrize("address", ["", "localhost", "redis://user:hunter2@localhost:6379", "localhost:6379 password=hunter2"])
def test_a_missing_or_malformed_redis_address_is_refused_without_repeating_it(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("CLLMR_ONLINE_STORE", address)
    with pytest.raises(FeatureStoreError, match=r"CLLMR_ONLINE_STORE is not .*CLLMR_ONLINE_STORE=localhost:6379") as refused:
        redis_connection()
    assert "hunter2" not in str(refused.value)


def test_a_redis_address_gets_time_limits_and_no_retries_unless_it_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLMR_ONLINE_STORE", "db.local:6380,db=2,socket_timeout=0.2,password=a=b")
    assert redis_connection() == "db.local:6380,db=2,socket_timeout=0.2,password=a=b,socket_connect_timeout=5,retry=null"
    options = online.redis_client().connection_pool.connection_kwargs
    wanted = {"host": "db.local", "port": 6380, "db": 2, "socket_timeout": 0.2, "password": "a=b", "socket_connect_timeout": 5}
    assert {name: options[name] for name in wanted} == wanted


def test_features_come_back_in_vocabulary_order_whatever_feast_returns() -> None:
    retrieved = pd.DataFrame({"f": [3.0, 1.0, 2.0]}, index=["10", "7", "9"])
    assert in_vocabulary_order(retrieved, ["7", "9", "10"], "users")["f"].tolist() == [1.0, 2.0, 3.0]


def test_entities_without_features_are_named() -> None:
    retrieved = pd.DataFrame({"f": [3.0, None]}, index=["10", "7"])
    with pytest.raises(ArtifactError, match=r"Feast returned 2 rows for 3 users; 2 lack features: '7', '9'"):
        in_vocabulary_order(retrieved, ["7", "9", "10"], "users")
    doubled = pd.DataFrame({"f": [1.0, 2.0, 3.0]}, index=["7", "7", "9"])
    with pytest.raises(ArtifactError, match=r"Feast returned 3 rows for 2 users; 0 lack features\."):
        in_vocabulary_order(doubled, ["7", "9"], "users")


def test_samples_are_spread_from_the_first_row_to_the_last() -> None:
    assert evenly_spaced(11, 3) == [0, 5, 10]
    assert evenly_spaced(2, 20) == [0, 1]
    assert evenly_spaced(1, 20) == [0]


def test_importing_the_stage_and_the_repository_loads_no_heavy_library() -> None:
    script = (
        "import sys, components.features.stage, components.features.config, feature_repo.store\n"
        "print([name for name in ('feast', 'dask', 'torch', 'redis') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_feast_is_imported_without_torch_and_without_type_checks_and_leaves_both_as_they_were() -> None:
    script = (
        "import sys, typeguard; before = typeguard.typechecked\n"
        "from feature_repo.feast_import import import_feast; import_feast()\n"
        "assert 'torch' not in sys.modules and typeguard.typechecked is before\n"
        "from feast import Entity; assert 'TypeCheckMemo' not in Entity.__init__.__code__.co_names\n"
        "import torch; assert torch.ones(1).item() == 1"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
