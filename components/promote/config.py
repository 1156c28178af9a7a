"""Settings of the promote stage: the gate between challenger and champion."""

from typing import Literal

from pydantic import Field

from components.settings import StageConfig, Uri

Metric = Literal["recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20"]


class PromoteConfig(StageConfig):
    """What a challenger must show before it is served. All checks are on the test interactions, for the debiased score."""

    model_name: str = Field(default="cllmr", min_length=1, pattern=r"^[\w][\w .-]*$")
    """Name in the model registry: letters, digits, '_', '-', '.' and spaces. Champions of different names do not meet, but what
    users do online and their rankings by batch scoring are kept by user id alone: another product, whose user 44 is somebody
    else, needs a storage root of its own, and with Redis a database of its own."""
    tracking_uri: Uri = ""
    """MLflow server or database (http://..., sqlite:///...), without a password; empty: SQLite in mlflow.db below the storage
    root. Passwords are taken from the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD."""
    primary_metric: Metric = "ndcg@10"
    """The metric that is compared."""
    max_relative_loss: float = Field(default=0.02, ge=0, le=1)
    """How much of the champion's primary metric the challenger may lose: 0.02 lets it through down to 98 %."""
    min_over_popularity: float = Field(default=0.0, ge=-1)
    """How much better than the popularity baseline the primary metric must be, relative: 0 means better at all, 0.1 by more
    than 10 %. -1 switches the check off."""
    max_head_exposure: float = Field(default=0.98, ge=0, le=1)
    """Largest share of the top-10 places that the most popular 20 % of the items may hold; 1 switches the check off."""
    min_coverage: float = Field(default=0.01, ge=0, le=1)
    """Smallest share of the items that must appear in some user's top 10; 0 switches the check off."""
    min_common_users: float = Field(default=0.5, ge=0, le=1)
    """Champion and challenger were evaluated on different data: they are compared on the evaluated users that both know, when
    those are at least this share; otherwise they are not compared, and the verdict says so."""
    needs_comparison: bool = False
    """Whether a challenger that cannot be compared with the champion is kept back; without, it passes that check."""
