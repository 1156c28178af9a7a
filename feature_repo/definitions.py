"""All that is registered with Feast, by name: what ``feast apply`` finds (see .feastignore), what the features stage applies of
it for a feature set, and what belongs to none of them: the online history and the rankings of batch scoring."""

from typing import Any

from feature_repo.entities import item, user
from feature_repo.feature_services import serving, training
from feature_repo.feature_views import (
    item_counts,
    item_side_information,
    item_spectrum,
    user_counts,
    user_events,
    user_history,
    user_recommendations,
    user_side_information,
    user_spectrum,
)
from feature_repo.sources import interactions, user_recommendations_table

VIEWS = [
    item_side_information,
    user_side_information,
    item_spectrum,
    user_spectrum,
    item_counts,
    user_counts,
    user_history,
]
DEFINITIONS: list[Any] = [item, user, *(view.batch_source for view in VIEWS), *VIEWS, training, serving]
SHARED: list[Any] = [user, interactions, user_events, user_recommendations_table, user_recommendations]
