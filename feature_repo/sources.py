"""Offline tables: one Parquet file per view, one row per entity; and the push source of what happens between two of them.

Paths are relative to the feature set's directory (the Feast repo path), so a feature set can be moved or fetched from an
object store and still be read.
"""

from feast import FileSource, PushSource
from feast.data_format import ParquetFormat

EVENT_TIMESTAMP = "event_timestamp"


def _table(view: str) -> FileSource:
    return FileSource(
        name=f"{view}_table",
        path=f"data/{view}.parquet",
        timestamp_field=EVENT_TIMESTAMP,
        file_format=ParquetFormat(),
    )


item_side_information_table = _table("item_side_information")
user_side_information_table = _table("user_side_information")
item_spectrum_table = _table("item_spectrum")
user_spectrum_table = _table("user_spectrum")
item_counts_table = _table("item_counts")
user_counts_table = _table("user_counts")
user_history_table = _table("user_history")
user_recommendations_table = _table("user_recommendations")  # Feast wants one; batch scoring writes online only

interactions = PushSource(
    name="interactions",
    description="What users did since the tables were made, written online only: the next ingest brings it into the tables.",
    batch_source=_table("user_events"),  # Feast wants one; the table is never written
)
