"""The endpoint: a pure scorer, the HTTP API over it, and the Ray Serve application that runs both."""

APPLICATION = "cllmr"
"""Name of the Ray Serve application."""
RATE = r"^[1-9][0-9]{0,6}/(second|minute|hour)$"
"""How a rate is written, for example 50/second."""
