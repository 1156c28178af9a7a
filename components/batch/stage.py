"""The batch stage: rankings for many users, by what answers requests, as a Parquet table.

Ray Data gives parts of the users to processes that hold the bundle; each part becomes one file, which is there as a whole or
not at all. A run that died goes on with the parts that are missing.
"""

import secrets
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from components.artifacts import Manifest, Store, read_json
from components.batch.config import BatchConfig
from components.batch.online import open_online, write_online
from components.errors import ArtifactError, DataError
from components.ids import USER_ID
from components.ingest.config import Quoting
from components.ingest.readers import column_names, read_chunks
from components.local_ray import ray_session
from components.progress import emit, progress
from components.registry import Registry, default_tracking_uri
from components.stages import Stage, failure_told, fingerprint, run_stage
from serving.lists import BATCH, BATCH_VERSION, TABLE_DIRECTORY

STAGE = Stage(BATCH, version=BATCH_VERSION)
_COPIES = 8  # at once: of an object store most of the time is waiting

SCHEMA = pa.schema(
    [
        (USER_ID, pa.string()),
        ("rank", pa.int32()),
        ("item_id", pa.string()),
        ("score", pa.float32()),
        ("method", pa.string()),
    ]
)
_USERS_AT_ONCE = 100  # of one request


def run(config: dict[str, Any], storage_root: str) -> Manifest:
    """Writes the ranking of every user, one row per place.

    The artifact is ``recommendations/part-*.parquet`` (`SCHEMA`, by user in the order asked for, then rank). Facts of the
    manifest: ``model_version``, ``num_users``, ``num_rows``, ``num_cold`` (users without training data), ``k``. With
    `to_feast` the online store has them too, see `components.batch.online`.

    Raises:
        ConfigError: an unknown or wrong setting, or an online store that cannot be used from here.
        ArtifactError: there is no champion, or the bundle is missing or damaged, or has no feature set for `to_feast`.
        DataError: the file of users cannot be read, or names none.
        StorageError: the online store cannot be written.
    """
    settings = BatchConfig.parse(config, STAGE.name)
    with failure_told(STAGE):  # before hours of scoring
        trained, model_version = _bundle_of(settings, storage_root)
        online = open_online(trained) if settings.to_feast else None
        name = fingerprint(STAGE, settings.identity(), {"train": trained.fingerprint})

    def build(directory: Path) -> dict[str, Any]:
        user_ids, size = read_users(settings, trained), settings.users_per_part
        parts = {part_name(start): user_ids[start : start + size] for start in range(0, len(user_ids), size)}
        shelf, table = _shelf(storage_root, name), directory / TABLE_DIRECTORY
        shelf.create_dir("/", recursive=True)
        score_parts(parts, settings, trained, model_version, storage_root, name)
        _fetch(list(parts), shelf, table)
        return {"model_version": model_version, "k": settings.k, **_facts(table)}

    ranked = run_stage(STAGE, settings, storage_root, {"train": trained}, build)
    with failure_told(STAGE):
        Store(storage_root).remove_work(STAGE.name, name)  # only now: until the output is committed, the parts are all there is
    if online is not None:
        with failure_told(STAGE):
            write_online(online, ranked.path() / TABLE_DIRECTORY, ranked.facts["num_users"], model_version)
    return ranked


def _bundle_of(settings: BatchConfig, storage_root: str) -> tuple[Manifest, str]:
    """The train artifact that scores, and what its model is called."""
    from serving.bundle import find_trained

    root, wanted, version = storage_root, settings.train, settings.train
    if wanted is None:
        champion = Registry(default_tracking_uri(storage_root, settings.tracking_uri), settings.model_name).champion()
        if champion is None:
            raise ArtifactError(
                f"no model is champion below '{storage_root}'.", "Make one: cllmr run; or name one: batch.train"
            )
        root, wanted, version = champion.storage_root, champion.fingerprint, champion.version
    return find_trained(root, wanted), str(version)


def _shelf(storage_root: str, name: str) -> pafs.FileSystem:
    """Where finished parts wait for the others: in the store, so that every worker writes there."""
    filesystem, path = Store(storage_root).work(STAGE.name, name)
    return pafs.SubTreeFileSystem(path, filesystem)


def _fetch(parts: list[str], shelf: pafs.FileSystem, table: Path) -> None:
    """Copies these parts, and nothing that lies beside them: a killed run leaves half of one."""
    table.mkdir()

    def copy(part: str) -> None:
        pafs.copy_files(part, str(table / part), source_filesystem=shelf, destination_filesystem=pafs.LocalFileSystem())

    with ThreadPoolExecutor(_COPIES) as pool:
        list(pool.map(copy, parts))  # raises what one of them does


def part_name(start: int) -> str:
    """Of the file whose first user is number `start`; names sort as users do."""
    return f"part-{start:012d}.parquet"


def read_users(settings: BatchConfig, trained: Manifest) -> list[str]:
    """Users to score, each once, in the order of the file or of the bundle.

    A file is read as ingest reads its own: an id that it knows must be the same here.
    """
    from components.ingest.tables import usable_ids
    from serving.bundle import BUNDLE_DIRECTORY, USERS_FILE

    if settings.users is None:
        known: list[str] = read_json(trained.path(BUNDLE_DIRECTORY) / BUNDLE_DIRECTORY / USERS_FILE)
        return known
    quoting = _quoting_of(trained)
    if USER_ID not in (names := column_names(settings.users, quoting)):
        raise DataError(
            f"file '{settings.users}' has no column '{USER_ID}'; columns seen: {', '.join(names)}.",
            f"Name the column of ids '{USER_ID}'.",
        )
    user_ids: dict[str, None] = {}
    reasons: Counter[str] = Counter()
    for chunk in read_chunks(settings.users, {USER_ID: USER_ID}, quoting=quoting):
        good, bad = usable_ids(chunk, USER_ID)
        user_ids |= dict.fromkeys(good)
        reasons.update(bad)
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    if not user_ids:
        raise DataError(
            f"no user of file '{settings.users}' is usable: {reasons.total()} rows, rejected as {told}.",
            f"Give users their ids in the column '{USER_ID}'.",
        )
    if reasons:
        message = f"{reasons.total()} rows of file '{settings.users}' name no user, and are left out: {told}"
        emit("warning", stage=STAGE.name, message=message)
    return list(user_ids)


def _quoting_of(trained: Manifest) -> Quoting:
    """How the files were read that the bundle's users come from; as usual where that is not known any more."""
    name = trained.parents.get("ingest")
    ingest = Store(trained.storage_root).find("ingest", name) if name else None
    return cast(Quoting, "minimal" if ingest is None else ingest.config.get("quoting", "minimal"))


def score_parts(
    parts: dict[str, list[str]], settings: BatchConfig, trained: Manifest, model_version: str, storage_root: str, name: str
) -> None:
    """Scores the parts that are not there yet, over Ray Data."""
    shelf = _shelf(storage_root, name)
    there = {info.base_name for info in shelf.get_file_info(pafs.FileSelector("/"))}
    missing = [{"name": part, "users": users} for part, users in parts.items() if part not in there]
    with progress(STAGE.name, sum(map(len, parts.values())), "users") as bar:
        bar.advance(sum(len(users) for part, users in parts.items() if part in there))
        if not missing:
            return
        with ray_session(num_cpus=settings.num_workers):
            import ray

            ray.data.DataContext.get_current().enable_progress_bars = False  # ours are the platform's
            scored = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
                PartScorer,  # type: ignore[arg-type]  # Ray's types do not know that a class may be called too
                fn_constructor_args=(settings, trained.storage_root, trained.fingerprint, model_version, storage_root, name),
                compute=ray.data.ActorPoolStrategy(size=min(settings.num_workers, len(missing))),
                num_cpus=1,
            )
            for row in scored.iter_rows():
                bar.advance(row["count"])


class PartScorer:
    """What answers requests, in a process of Ray Data's."""

    def __init__(
        self, settings: BatchConfig, bundle_root: str, train: str, model_version: str, storage_root: str, name: str
    ) -> None:
        from serving.bundle import find_bundle
        from serving.recommender import Recommender
        from serving.scorer import Scorer

        self._settings = settings
        self._recommender = Recommender(Scorer.load(find_bundle(bundle_root, train)), model_version)
        self._shelf = _shelf(storage_root, name)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """Scores one part's ``users`` and writes the file ``name``."""
        beside = f".{part['name']}-{secrets.token_hex(8)}"  # the same batch may be under way twice
        with (
            self._shelf.open_output_stream(beside) as stream,
            pq.ParquetWriter(stream, SCHEMA, compression="zstd") as file,
        ):
            for table in self._tables(list(part["users"])):
                file.write_table(table)
        self._shelf.move(beside, part["name"])
        return {"count": len(part["users"])}

    def _tables(self, users: list[str]) -> Iterator[pa.Table]:
        from serving.schemas import RecommendRequest

        wanted = self._settings
        for start in range(0, len(users), _USERS_AT_ONCE):
            asked = users[start : start + _USERS_AT_ONCE]
            request = RecommendRequest(users=asked, k=wanted.k, debias=wanted.debias, exclude_seen=wanted.exclude_seen)
            answer = self._recommender.recommend(request, [[] for _ in asked])
            rows = [
                (result.user_id, item.rank, item.item_id, item.score, result.method)
                for result in answer.results
                for item in result.items
            ]
            columns = zip(*rows, strict=True) if rows else [[] for _ in SCHEMA]
            yield pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _facts(directory: Path) -> dict[str, int]:
    files = sorted(directory.glob("part-*.parquet"))
    num_rows = num_users = num_cold = 0
    for file in files:
        table = pq.read_table(file, columns=["rank", "method"])
        first = table.column("rank").to_numpy() == 1
        num_rows, num_users = num_rows + len(table), num_users + int(first.sum())
        num_cold += int((first & (table.column("method").to_numpy() != "personalised")).sum())
    return {"num_users": num_users, "num_rows": num_rows, "num_cold": num_cold, "num_parts": len(files)}
