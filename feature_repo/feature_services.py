"""One service for training and one for serving.

A service names the features that belong together; it mixes both entities, and Feast looks up one entity set at a time, so
a reader asks for a service's features of one entity (`feature_repo.store.feature_refs`).
"""

from feast import FeatureService

from feature_repo.feature_views import (
    item_counts,
    item_side_information,
    item_spectrum,
    user_counts,
    user_history,
    user_side_information,
    user_spectrum,
)

training = FeatureService(
    name="training",
    description="What the model is trained on; nothing here has seen a held-out interaction.",
    # widest last: each join of the offline store copies, and hashes, the columns of those before it
    features=[
        item_counts,
        user_counts,
        item_spectrum,
        user_spectrum,
        item_side_information,
        user_side_information[["embedding", "introduction"]],
    ],
)

serving = FeatureService(
    name="serving",
    description="What a request looks up online: the user's recent items, how much is known, and the user's side information.",
    features=[user_history, user_counts, item_counts, user_side_information],
)
