"""Settings of the ingest stage: where the interactions come from, which of them count, and how they are split."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core.core_schema import ValidationInfo

from components.errors import DataError
from components.settings import StageConfig, Uri

SAMPLE_DISTRIBUTION = "recbole"
SAMPLE_HINT = "pip install --no-deps recbole==1.2.1"
OWN_DATA = "own-data"
Quoting = Literal["minimal", "none"]


class ColumnsConfig(BaseModel):
    """What the user's files call their columns.

    A rating, timestamp or review column that keeps its default name may be absent; one that is named must be there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: str = "user_id"
    """Column of interactions (and users) with the user's id; any text."""
    item_id: str = "item_id"
    """Column of interactions and items with the item's id; any text."""
    rating: str | None = "rating"
    """Column of interactions with a number, the higher the better; null: every interaction counts."""
    timestamp: str | None = "timestamp"
    """Column of interactions with Unix time (seconds; milli-, micro- and nanoseconds are recognised); null: none."""
    review: str | None = "review"
    """Column of interactions with what the user wrote; an LLM that describes items and users is shown some; null: none."""
    title: str | None = "title"
    """Column of items with the name shown to people; null: the item's id is shown."""


class SplitConfig(BaseModel):
    """How each user's interactions are divided into train, validation and test."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["random", "temporal", "stable"] = "random"
    """random: a seeded draw per user. temporal: each user's latest interactions are tested, those before them validate; the
    order of equal times is drawn. stable: a seeded draw of each interaction by itself, which is the same whatever else comes
    in, as incremental training needs it. A user with few interactions may then have none for training, and is evaluated as a
    new one."""
    ratios: tuple[PositiveFloat, NonNegativeFloat, NonNegativeFloat] = (3, 1, 1)
    """Shares of train, validation and test, in any unit ("stable": chances); held-out counts are rounded down."""
    seed: int = 2023
    """Seed of the draws."""


class IngestConfig(StageConfig):
    """Reading, filtering and splitting the interactions."""

    name: str = Field(default="ml-100k", min_length=1)
    """Name of the data set in reports and in the bundle; "own-data" when source is "files" and no name is given."""
    source: Literal["sample", "files"] = "sample"
    """sample: MovieLens-100k as the `recbole` package carries it. files: the files named below."""
    interactions: Uri | None = Field(default=None, validate_default=True)
    """CSV, TSV or Parquet file, one row per interaction; a local path or a URI that pyarrow reads (s3://, gs://)."""
    items: Uri | None = None
    """CSV, TSV or Parquet file, one row per item: id, title, any text columns; null: an item's id is its title."""
    users: Uri | None = None
    """CSV, TSV or Parquet file, one row per user; null: users have no text of their own."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names of the user's files (not of the sample)."""
    quoting: Quoting = "minimal"
    """minimal: a value of the user's CSV and TSV files may stand in quotation marks, and then hold separators and line ends.
    none: a quotation mark is a character like any other, as in files whose texts may begin with one."""
    item_text_columns: tuple[str, ...] | None = None
    """Columns of items that describe them; null: all but id and title (the sample: release_year, genres); []: none."""
    user_text_columns: tuple[str, ...] | None = None
    """Columns of users that describe them; null and []: none (null: with a warning that names those that there are)."""
    min_rating: float | None = 4.0
    """Implicit-feedback threshold: interactions rated below it are removed, as are those whose rating is missing;
    null: all count, rated or not. No effect without a column of ratings."""
    k_core: PositiveInt = 5
    """Every user and item keeps at least this many interactions; 1 = off."""
    split: SplitConfig = SplitConfig()
    """Train, validation and test."""

    @model_validator(mode="before")
    @classmethod
    def _name_own_data(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("source") == "files" and "name" not in values:
            return {**values, "name": OWN_DATA}
        return values

    @field_validator("interactions", "items", "users")
    @classmethod
    def _path_fits_source(cls, path: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source")
        if source == "sample" and path is not None:
            raise ValueError("it has no effect while ingest.source is 'sample'; set ingest.source=files")
        if source == "files" and path is None and info.field_name == "interactions":
            raise ValueError("a CSV, TSV or Parquet file is needed when ingest.source is 'files'")
        return path

    @field_validator("item_text_columns", "user_text_columns")
    @classmethod
    def _text_needs_its_file(cls, columns: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        table = f"{str(info.field_name).partition('_')[0]}s"
        if columns and info.data.get("source") == "files" and info.data.get(table) is None:
            raise ValueError(f"these are columns of the file ingest.{table}, which is not set")
        return columns

    def identity(self) -> dict[str, Any]:
        """The settings with each path replaced by the sha256 of the file's bytes, the sample by its package's version.

        So moving a file keeps the stage's fingerprint, and changing it does not.

        Raises:
            DataError: a file does not exist, or the sample's package is not installed.
        """
        from components.ingest.readers import sha256_source

        described = self.model_dump(mode="json")
        if self.source == "sample":
            described["sample"] = f"{SAMPLE_DISTRIBUTION}=={sample_version()}"
            del described["columns"], described["quoting"]
        for field in ("interactions", "items", "users"):
            path = described[field]
            # the extension says how the bytes are read, so it belongs to the identity
            described[field] = None if path is None else f"{sha256_source(path)}.{path.rpartition('.')[2].lower()}"
        return described


def sample_version() -> str:
    """Version of the distribution that carries the sample; raises DataError when it is not installed."""
    try:
        return version(SAMPLE_DISTRIBUTION)
    except PackageNotFoundError:
        raise DataError(
            f"the sample data are not here: no distribution '{SAMPLE_DISTRIBUTION}' is installed.",
            f"Install it: {SAMPLE_HINT} (or set ingest.source=files)",
        ) from None
