"""Questions to a running endpoint over HTTP, as any client would ask them."""

from collections.abc import Mapping
from typing import Any

from components.errors import ServingError

SECONDS = 30.0


def post(url: str, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of ``/v1/<route>``.

    Raises:
        ServingError: nothing answers at `url`, or the endpoint refuses the question; its message and hint are handed on.
    """
    import httpx

    address = f"{url.rstrip('/')}/v1/{route}"
    try:
        response = httpx.post(address, json=dict(body), timeout=SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServingError(
            f"no endpoint answers at {url} ({type(error).__name__}).", "Start one with: cllmr serve, or leave out --url."
        ) from None
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ServingError(f"{address} answered status {response.status_code}, not JSON.", "Is that a CLLMR endpoint?")
    if response.is_error:
        raise ServingError(str(answer.get("message", f"status {response.status_code}")), str(answer.get("hint", "")))
    return answer
