"""Bad input is one line that names what was seen and the next action; exit code 2; nothing half-written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.batch import stage as batch
from components.errors import ArtifactError, ConfigError, DataError, StorageError, UserError
from components.ingest.stage import run
from components.settings import StageConfig
from components.stages import Stage, run_stage
from tests import REPOSITORY

HEADER = "user_id,item_id,rating,timestamp\n"
ROWS = "".join(f"{user},{item},5,{100 + item}\n" for user in range(4) for item in range(5))
ITEMS = "item_id,title,genre\n" + "".join(f"{item},Film {item},Drama\n" for item in range(5))


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """Settings of good files of one's own, in the current directory."""
    monkeypatch.chdir(tmp_path)
    put("interactions.csv", HEADER + ROWS)
    put("items.csv", ITEMS)
    return {"source": "files", "interactions": "interactions.csv", "items": "items.csv", "k_core": 1}


def put(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def refused(config: dict, kind: type[UserError], message: str) -> UserError:
    """Runs ingest, which must refuse with one line and a next action, and must leave nothing behind."""
    with pytest.raises(kind, match=message) as caught:
        run(config, "store")
    assert "\n" not in str(caught.value)
    assert caught.value.hint, "no next action"
    assert [path for path in Path("store").rglob("*") if not path.is_dir()] == []
    assert list(Path("store").glob("ingest/*")) == []
    return caught.value


def test_good_files_are_accepted(own_data):
    assert run(own_data, "store").facts["interactions"] == 20


FILES = {
    "an empty file": ("", r"'bad\.csv' is empty\. Give a first line of column names"),
    "a file of column names alone": (HEADER, r"'bad\.csv' has column names but no rows"),
    "a missing column": (
        "uid,item_id\n1,2\n",
        r"'bad\.csv' has no column 'user_id'; columns seen: uid, item_id\. "
        r"Name yours: --column user_id=NAME \(or --set ingest\.columns\.user_id=NAME\)",
    ),
    "another separator": (
        "user_id;item_id\n1;2\n",
        r"no column 'user_id'; columns seen: user_id;item_id\. It seems to be separated by ';'",
    ),
    "more values than columns": ("user_id,item_id\n1,2,3\n", r"'bad\.csv' has more fields in its rows than in its first line"),
    "a row with more values than the others": ("user_id,item_id\n1,2\n1,2,3\n", r"not a table: .*line 3.* Quote values"),
    "ids that are all missing": (
        HEADER + "NaN,1,5,1\nnull,2,5,1\n,3,5,1\n0,,5,1\n",
        r"no interaction of file 'bad\.csv' is usable: 4 rows, rejected as missing_item_id 1, missing_user_id 3\. Check",
    ),
    "ratings that are no numbers": (HEADER + "1,2,good,1\n", r"1 rows, rejected as rating_not_a_number 1\. Check"),
    "dates instead of Unix time": (
        "user_id,item_id,timestamp\n1,2,2024-01-01\n",
        r"rejected as timestamp_not_a_number 1\. Give Unix time as a number, or do without: "
        r"--set ingest\.columns\.timestamp=null",
    ),
    "ratings that are all below the threshold": (
        HEADER + ROWS.replace(",5,", ",3,"),
        r"no interaction reaches ingest\.min_rating = 4: the 20 ratings seen are 3 to 3\. "
        r"Lower it: --set ingest\.min_rating=3",
    ),
    "one user": (HEADER + "0,1,5,1\n0,2,5,1\n", r"1 user\(s\) and 2 item\(s\) are left, at least 2 of each are needed"),
    "one item": (HEADER + "0,1,5,1\n1,1,5,1\n", r"2 user\(s\) and 1 item\(s\) are left, at least 2 of each are needed"),
    "text that is not UTF-8": (
        (HEADER + "0,1,5,1\nJürgen,1,5,1\n").encode("latin-1"),
        # the header has 33 bytes, the first row 8, and the letter follows a J
        r"'bad\.csv' is not UTF-8: byte 0xfc at offset 42, line 3\. "
        r"Convert it, for example: iconv -f ISO-8859-1 -t UTF-8 'bad\.csv'",
    ),
    "text in UTF-16": ((HEADER + ROWS).encode("utf-16"), r"begins with the mark of UTF-16\. .*iconv -f UTF-16"),
    "two columns of one name": (
        "user_id,item_id,item_id\n1,2,3\n",
        r"'bad\.csv' has more than one column 'item_id'\. Give each column a name of its own",
    ),
    "a NUL byte, at which pandas ends a field": (
        HEADER + ROWS.replace("1,2,", "1,2\x00a,"),
        r"'bad\.csv' has a NUL byte in line 9, which no text has\. Remove it, for example: tr -d '\\000' < 'bad\.csv'",
    ),
    "a quotation mark that is never closed": (
        'user_id,item_id\n1,"2\n1,3\n',
        r"not a table: EOF inside string .*if values are not quoted: --set ingest\.quoting=none",
    ),
    "ids of another catalogue": (
        HEADER + "1,tt01,5,1\n2,tt02,5,1\n",
        r"no item of file 'bad\.csv' \(ids 'tt01', 'tt02'\) is in file 'items\.csv' \(ids '0', '1', .*"
        r"Check ingest\.columns\.item_id",
    ),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES.keys())
def test_interactions_that_cannot_be_used_are_refused(own_data, content, message):
    refused({**own_data, "interactions": put("bad.csv", content)}, DataError, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"'bad\.csv' is empty"),
        ("item_id,name\n1,a\n", r"no column 'title'; columns seen: item_id, name\. .*--column title=NAME"),
        ("item_id,title, title\n1,a,b\n", r"'bad\.csv' has more than one column 'title'\. Give each column a name of its own"),
        ("item_id,title\n1,Amélie\n".encode("latin-1"), r"'bad\.csv' is not UTF-8: byte 0xe9 at offset 18, line 2"),
    ],
)
def test_items_that_cannot_be_used_are_refused(own_data, content, message):
    refused({**own_data, "items": put("bad.csv", content)}, DataError, message)


def test_users_of_another_system_are_refused(own_data):
    message = (
        r"no user of file 'interactions\.csv' \(ids '0', '1', '2', '3'\) is in file 'users\.csv' \(ids '0\.0', '1\.0'\)\. "
        r"Check ingest\.columns\.user_id: both files must use the same ids"
    )
    refused({**own_data, "users": put("users.csv", "user_id,age\n0.0,30\n1.0,40\n")}, DataError, message)


@pytest.mark.parametrize(("content", "message"), [(b"a\n1\x00\n", "a NUL.*line 2"), (b"a\n\xfc\n", "byte 0xfc .*line 2")])
def test_bytes_that_are_no_text_are_found_behind_a_uri_too(own_data, content, message):
    uri = Path(put("bad.csv", content)).absolute().as_uri()
    refused({**own_data, "interactions": uri}, DataError, message)


def test_a_file_that_does_not_exist_is_named(own_data):
    error = refused({**own_data, "interactions": "clicks.csv"}, DataError, r"file 'clicks\.csv' does not exist")
    assert os.getcwd() in error.message


@pytest.mark.parametrize(("name", "seen"), [("clicks.xlsx", ".xlsx"), ("clicks", "")])
def test_a_file_of_another_kind_is_named_with_the_kinds_that_are_read(own_data, name, seen):
    message = rf"'{name}' has the extension '{re.escape(seen)}'; allowed: \.csv, \.tsv, \.parquet\. Save the table as one"
    refused({**own_data, "interactions": put(name, "PK")}, DataError, message)


@pytest.mark.parametrize("content", [b"", b"PAR1 not a table PAR1", b"user_id,item_id\n1,2\n"])
def test_a_file_that_is_no_parquet_is_refused(own_data, content):
    message = r"'bad\.parquet' is not Parquet, or damaged: .* Write it again, or give the data as CSV"
    refused({**own_data, "interactions": put("bad.parquet", content)}, DataError, message)


def test_a_parquet_file_with_damaged_pages_and_a_sound_footer_is_refused(own_data):
    pd.read_csv("interactions.csv").to_parquet("sound.parquet")
    content = Path("sound.parquet").read_bytes()
    put("bad.parquet", content[:4] + b"\xff" * 150 + content[154:])
    refused({**own_data, "interactions": "bad.parquet"}, DataError, r"'bad\.parquet' is not Parquet, or damaged")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([{"a": 1}] * 5), "struct<a: int64>"),
        (pa.array([[("k", "v")]] * 5, pa.map_(pa.string(), pa.string())), "map<string, string"),
        (pa.array([b"\xff\xd8"] * 5), "binary"),
        (pa.array([[{"a": 1}]] * 5), "list<element: struct<a: int64>>"),
        (pa.array([[[("k", "v")]]] * 5, pa.list_(pa.map_(pa.string(), pa.string()))), "list<element: map<string, string"),
        (pa.array([[b"\xff\xd8"]] * 5), "list<element: binary>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_parquet_column_that_is_no_text_is_named_and_can_be_left_out(own_data, column, kind):
    items = pd.read_csv("items.csv", dtype=str)
    pq.write_table(pa.table({**{name: items[name] for name in items}, "extra": column}), "items.parquet")
    own_data["items"] = "items.parquet"
    message = rf"'items\.parquet' has a column 'extra' of type {re.escape(kind)}.*, which cannot be read as text\. Write it"
    refused(own_data, DataError, message)
    assert run({**own_data, "item_text_columns": ["genre"]}, "store").facts["interactions"] == 20


def test_an_unknown_text_column_is_answered_with_the_closest_one(own_data):
    message = (
        r"'ingest\.item_text_columns' names the column 'gnre', which file 'items\.csv' does not have\. Did you mean 'genre'\?"
    )
    refused({**own_data, "item_text_columns": ["gnre"]}, DataError, message)


def test_a_named_column_of_ratings_must_exist(own_data):
    message = r"no column 'stars'; columns seen: user_id, item_id, rating, timestamp\. Name yours: --column rating=NAME"
    refused({**own_data, "columns": {"rating": "stars"}}, DataError, message)


def test_when_the_k_core_is_empty_the_counts_of_every_step_are_told(own_data):
    message = (
        r"no interaction is left after ingest\.k_core = 6: 20 read, 0 rejected, 0 below min_rating, 0 duplicates, "
        r"20 below the k-core\. Lower ingest\.k_core or ingest\.min_rating: --set ingest\.k_core=1"
    )
    refused({**own_data, "k_core": 6}, DataError, message)


def test_a_temporal_split_without_timestamps_says_how_to_name_them_or_do_without(own_data):
    content = "user_id,item_id\n" + "".join(f"{user},{item}\n" for user in range(4) for item in range(5))
    config = {**own_data, "interactions": put("bad.csv", content), "split": {"method": "temporal"}}
    refused(config, ConfigError, r"'ingest\.split\.method' = 'temporal' needs timestamps, .*ingest\.columns\.timestamp=NAME")


def test_duplicate_items_and_users_of_one_item_are_no_errors_but_counted(own_data):
    put("interactions.csv", HEADER + ROWS + "8,0,5,1\n9,1,5,1\n")
    put("items.csv", ITEMS + "0,Again,Drama\n")
    facts = run({**own_data, "k_core": 2}, "store").facts
    assert facts["removed_by_reason"] == {"duplicate_item_id": 1, "user_below_k_core": 2}


def test_a_storage_root_that_is_a_file_is_refused(own_data):
    put("store", "not a directory")
    with pytest.raises(StorageError, match=r"'.*store.*' cannot be written: .* Check that the storage root") as caught:
        run(own_data, "store")
    assert "\n" not in str(caught.value)
    assert Path("store").read_text(encoding="utf-8") == "not a directory"


@pytest.mark.parametrize(
    ("interactions", "line"),
    [
        ("bad.csv", "has no column 'user_id'; columns seen: reader, item_id. Name yours: --column user_id=NAME"),
        ("clicks.csv", "clicks.csv' does not exist"),
    ],
)
def test_the_command_line_answers_with_one_line_and_exit_code_2(own_data, tmp_path, interactions, line):
    """The real command in a process of its own, the stage in another."""
    put("bad.csv", "reader,item_id\n1,2\n")
    command = [sys.executable, "-m", "pipelines.cli", "run", "--until", "ingest", "--storage", "store"]
    command = [*command, "--interactions", interactions, "--items", "items.csv"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "store").glob("ingest/*")) == []


def test_the_refusal_is_told_as_an_event_for_the_one_who_watches(own_data, monkeypatch):
    monkeypatch.setenv("CLLMR_EVENTS", "events.jsonl")
    refused({**own_data, "interactions": put("bad.csv", "")}, DataError, "is empty")
    events = [json.loads(line) for line in Path("events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in events] == ["stage started", "stage failed"]
    assert events[-1]["code"] == "data_error"
    assert events[-1]["hint"].startswith("Give a first line")
    Path("events.jsonl").unlink()
    refused({**own_data, "interactions": "clicks.csv"}, DataError, "does not exist")
    events = [json.loads(line) for line in Path("events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in events] == ["stage failed"]  # before it began: its files decide its name


@pytest.mark.parametrize("model", [None, "0123456789abcdef"])
def test_batch_scoring_without_a_model_is_refused_and_told_as_an_event(own_data, monkeypatch, model):
    monkeypatch.setenv("CLLMR_EVENTS", "events.jsonl")
    message = "train artifact 0123456789abcdef is not below" if model else "no model is champion below 'store'"
    with pytest.raises(ArtifactError, match=message) as caught:
        batch.run({"train": model}, "store")
    (event,) = [json.loads(line) for line in Path("events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (event["event"], event["stage"], event["code"]) == ("stage failed", "batch", "artifact_error")
    assert event["hint"] == caught.value.hint
    assert not Path("store").exists()


def test_a_file_of_users_that_is_not_there_is_told_as_an_event(own_data, monkeypatch):
    trained = run_stage(Stage("train", version=1), StageConfig(), "store", {}, lambda directory: {})
    monkeypatch.setenv("CLLMR_EVENTS", "events.jsonl")
    with pytest.raises(DataError, match=r"there is no file of users 'nobody\.csv'\. Check batch\.users"):
        batch.run({"train": trained.fingerprint, "users": "nobody.csv"}, "store")
    (event,) = [json.loads(line) for line in Path("events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (event["event"], event["stage"], event["code"]) == ("stage failed", "batch", "data_error")
