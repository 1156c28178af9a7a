"""Settings of batch scoring."""

from pathlib import Path
from typing import Any

from pydantic import Field

from components.artifacts import sha256_file
from components.errors import DataError
from components.settings import StageConfig, Uri


class BatchConfig(StageConfig):
    """Rankings for all users, or for those in a file, as a table."""

    train: str | None = None
    """Fingerprint of the train artifact whose bundle scores; None: the registry's champion's."""
    model_name: str = Field(default="cllmr", min_length=1)
    """Name in the model registry; of the pipeline: what promote has."""
    tracking_uri: Uri = ""
    """MLflow server or database; empty: SQLite in mlflow.db below the storage root. Of the pipeline: what promote has."""
    users: str | None = None
    """CSV, TSV or Parquet file with a column user_id; None: all users of the bundle. Unknown users get the popular items; rows
    without a usable id are left out, and told."""
    k: int = Field(default=20, ge=1, le=200)
    """Items per user; fewer where fewer are candidates."""
    debias: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """Debias strength λ; None: the bundle's own."""
    exclude_seen: bool = True
    """Whether a user's training interactions are left out."""
    to_feast: bool = False
    """Whether the rankings are written to the online store of the model's feature set too: view ``user_recommendations``. Done
    again by every run, also one whose table is there already, so that the store has the rankings of the latest."""
    users_per_part: int = Field(default=10_000, ge=1)
    """Users of one file of the table: what a worker holds at a time, and what is lost when it dies."""
    num_workers: int = Field(default=1, ge=1)
    """Processes that score; each holds the bundle."""

    def identity(self) -> dict[str, Any]:
        """What decides the table: the bytes of the file of users instead of its path; not who scores, or who reads it.

        Raises DataError when the file cannot be read.
        """
        described = self.model_dump(mode="json", exclude={"train", "model_name", "tracking_uri", "to_feast", "num_workers"})
        if self.users is not None:
            if not Path(self.users).is_file():
                raise DataError(f"there is no file of users '{self.users}'.", "Check batch.users.")
            described["users"] = f"{sha256_file(self.users)}{Path(self.users).suffix.lower()}"
        return described
