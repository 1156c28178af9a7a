"""How a request to a server is repeated: tenacity with one policy, which does what the server asks."""

from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

MAX_PAUSE_S = 30.0
TRANSIENT = (429, 500, 502, 503, 504)
"""HTTP states after which the same request may succeed."""


def retrying(
    transient: Callable[[BaseException], bool],
    patience_s: float,
    told: Callable[[BaseException], None] = lambda error: None,
) -> Retrying:
    """Calls a function again while it raises what is `transient`, for `patience_s` seconds; then the last error is raised.

    `told` gets the first error, before the waiting begins.
    """

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None and state.attempt_number == 1:
            told(error)

    return Retrying(
        retry=retry_if_exception(transient), wait=_pause, stop=stop_after_delay(patience_s), before_sleep=tell, reraise=True
    )


def _pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the server asked for (Retry-After), else longer every time."""
    error = state.outcome.exception() if state.outcome else None
    asked = str((getattr(error, "headers", None) or {}).get("Retry-After", ""))
    return min(float(asked), MAX_PAUSE_S) if asked.isdigit() else wait_exponential_jitter(initial=0.5, max=MAX_PAUSE_S)(state)
