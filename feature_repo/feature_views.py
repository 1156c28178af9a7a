"""The views. All but `user_history`, `user_events` and `user_recommendations` are computed from training interactions:
training may read them.

A feature set is a snapshot: the event timestamp of a training view is the last training interaction of the whole data set,
that of a history is the user's own last interaction. ``ttl`` is how long a row may be used after that; Feast applies it to
historical reads and not to online ones, where the reader compares the event timestamp itself.
"""

from datetime import timedelta

from feast import FeatureView, Field
from feast.types import Array, Float32, Int64, String

from feature_repo.entities import item, user
from feature_repo.sources import (
    interactions,
    item_counts_table,
    item_side_information_table,
    item_spectrum_table,
    user_counts_table,
    user_history_table,
    user_recommendations_table,
    user_side_information_table,
    user_spectrum_table,
)

SNAPSHOT_TTL = timedelta(days=30)
"""Side information, spectrum and counts: older than this and the retraining schedule has stopped."""

HISTORY_TTL = timedelta(days=365)
"""A user who has not been seen for longer is better served as a new one."""

EVENTS_TTL = timedelta(days=30)
"""What happened since the last ingest: after so long it has been in several of them."""

_SIDE_INFORMATION = [
    Field(name="embedding", dtype=Array(Float32), description="Embedding of `profile`, (dim,), L2-normalised."),
    Field(name="profile", dtype=String, description="The text that was embedded: own text, profile, or both."),
]
_INTRODUCTION = Field(
    name="introduction",
    dtype=Array(Float32),
    description="Embedding of the user's own text columns alone, (dim,), L2-normalised: what is known before he does anything; "
    "zeros where there is none, empty where nobody has any.",
)
_SPECTRUM = [
    Field(
        name="spectrum", dtype=Array(Float32), description="Row of the training matrix's scaled spectrum, (q,) (CLLMR, E1-E3)."
    ),
]
_COUNTS = [
    Field(name="train_interactions", dtype=Int64, description="Training interactions of this entity."),
    Field(name="last_train_timestamp", dtype=Int64, description="The latest of them, Unix seconds; 0 if none or untimed."),
]

item_side_information = FeatureView(
    name="item_side_information",
    entities=[item],
    schema=_SIDE_INFORMATION,
    source=item_side_information_table,
    ttl=SNAPSHOT_TTL,
)
user_side_information = FeatureView(
    name="user_side_information",
    description="Of all users with a text, also of those without any interaction.",
    entities=[user],
    schema=[_SIDE_INFORMATION[0], _INTRODUCTION, *_SIDE_INFORMATION[1:]],
    source=user_side_information_table,
    ttl=SNAPSHOT_TTL,
)
item_spectrum = FeatureView(
    name="item_spectrum", entities=[item], schema=_SPECTRUM, source=item_spectrum_table, ttl=SNAPSHOT_TTL
)
user_spectrum = FeatureView(
    name="user_spectrum", entities=[user], schema=_SPECTRUM, source=user_spectrum_table, ttl=SNAPSHOT_TTL
)
item_counts = FeatureView(name="item_counts", entities=[item], schema=_COUNTS, source=item_counts_table, ttl=SNAPSHOT_TTL)
user_counts = FeatureView(name="user_counts", entities=[user], schema=_COUNTS, source=user_counts_table, ttl=SNAPSHOT_TTL)

user_history = FeatureView(
    name="user_history",
    description="The user's latest interactions of every split: for serving only, training must never read it.",
    entities=[user],
    schema=[
        Field(name="item_ids", dtype=Array(String), description="Items, most recent last, at most features.history_length."),
        Field(name="timestamps", dtype=Array(Int64), description="When, Unix seconds, beside item_ids; 0 if untimed."),
    ],
    source=user_history_table,
    ttl=HISTORY_TTL,
)

user_events = FeatureView(
    name="user_events",
    description="What a user did since the feature set was built, pushed through the endpoint; never materialised.",
    entities=[user],
    schema=[
        Field(name="item_ids", dtype=Array(String), description="Items, most recent last, bounded."),
        Field(name="timestamps", dtype=Array(Int64), description="When, Unix seconds, beside item_ids."),
    ],
    source=interactions,
    ttl=EVENTS_TTL,
)

user_recommendations = FeatureView(
    name="user_recommendations",
    description="The user's ranking as batch scoring wrote it last (batch.to_feast); its event timestamp says when.",
    entities=[user],
    schema=[
        Field(name="item_ids", dtype=Array(String), description="Items, best first."),
        Field(name="scores", dtype=Array(Float32), description="Their scores, beside item_ids."),
        Field(name="method", dtype=String, description="How the ranking was made, as in an answer of the endpoint."),
        Field(name="model_version", dtype=String, description="What made it."),
    ],
    source=user_recommendations_table,
    ttl=SNAPSHOT_TTL,
)
