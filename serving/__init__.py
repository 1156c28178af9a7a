"""The endpoint: a pure scorer, the HTTP API over it, and the Ray Serve application that runs both."""

APPLICATION = "cllmr"
"""Name of the Ray Serve application."""
