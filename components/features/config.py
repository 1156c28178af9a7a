"""Settings of the features stage."""

from typing import Literal

from pydantic import Field

from components.settings import StageConfig


class FeaturesConfig(StageConfig):
    """The online store and what goes into it.

    Redis' address is a secret and so no setting: it is the environment variable ``CLLMR_ONLINE_STORE``
    (``host:port[,db=0][,ssl=true][,password=...]``).
    """

    online_store: Literal["sqlite", "redis"] = "sqlite"
    """Where online rows lie. ``sqlite``: a file below a local storage root; ``redis``: the server in ``CLLMR_ONLINE_STORE``."""

    history_length: int = Field(default=200, ge=1, le=10_000)
    """Most recent interactions kept per user in `user_history`, at least 1; older ones are dropped from the view. A bundle
    names the feature set that it is served with, so that another length, which is another feature set, trains again."""
