"""One service for training and one for serving.

A service names the features that belong together; it may mix both entities, and Feast looks up one entity set at a time, so
a reader asks for a service's features of one entity (`feature_repo.store.feature_refs`).
"""

from feast import FeatureService

from feature_repo.feature_views import (
    item_side_information,
    item_spectrum,
    user_history,
    user_side_information,
    user_spectrum,
)

training = FeatureService(
    name="training",
    description="What the model is trained on; nothing here has seen a held-out interaction.",
    # widest last: each join of the offline store copies, and hashes, the columns of those before it
    features=[
        item_spectrum,
        user_spectrum,
        item_side_information,
        user_side_information[["embedding", "introduction"]],
    ],
)

serving = FeatureService(
    name="serving",
    description="What a request looks up online of a user in the feature set: recent items, and the embedding of the own text.",
    features=[user_history[["item_ids"]], user_side_information[["introduction"]]],
)
