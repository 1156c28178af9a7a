"""A typed client of the endpoint: time limits, retries where nothing was answered, errors a person can act on."""

import ipaddress
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from components.errors import ServingError
from serving.schemas import (
    ErrorBody,
    Event,
    EventsRequest,
    EventsResponse,
    ExplainRequest,
    ExplainResponse,
    Filter,
    ItemsRequest,
    ItemsResponse,
    ModelResponse,
    NewItem,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)

_NOBODY_ANSWERS = (408, 502, 503, 504)
"""503 is the endpoint's own too; 502 and 504 are a proxy's that finds no replica; 408 is what a gateway says that the proxy has
asked for one that died with the body."""

_Response = TypeVar("_Response", bound=BaseModel)


def _is_unanswered(response: httpx.Response) -> bool:
    return response.status_code in _NOBODY_ANSWERS


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine: a proxy would look for it on its own, and be shown the token."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


class Client:
    """Asks one endpoint; use it as a context manager, or call `close`.

    Every question only reads, and events that are written twice are there once, so all are asked again after a dropped
    connection and after 408, 502, 503 and 504. An endpoint on this machine is asked directly, others through a proxy that
    HTTP_PROXY names.

    Args:
        url: base URL, for example ``http://127.0.0.1:8000``.
        timeout: seconds one try may take.
        retries: further tries after the first.
        backoff: seconds before the first retry, doubled each time; a server's Retry-After counts if it is longer. Up to as
            much again is added by chance, so that callers who were refused together do not come back together.
        token: to show, where the endpoint needs one.
        transport: for tests.

    Raises:
        ServingError: `url` is no address, or `token` no token.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 10.0,
        retries: int = 2,
        backoff: float = 0.2,
        token: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._retries, self._backoff = retries, wait_exponential(multiplier=backoff)
        if token and not token.isascii():
            raise ServingError("the token has characters that no token has.", "Copy it again.")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._http = httpx.Client(
                base_url=self._url,
                timeout=timeout,
                headers=headers,
                transport=transport,
                trust_env=not _is_loopback(httpx.URL(self._url).host),
            )
        except httpx.InvalidURL as error:
            raise ServingError(f"'{url}' is no address: {error}.", "Give one such as http://127.0.0.1:8000.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def ask(self, request: RecommendRequest) -> RecommendResponse:
        """Rankings for a request that is built already; raises ServingError as `recommend`."""
        return self._ask("/v1/recommend", request, RecommendResponse)

    def recommend(
        self,
        users: list[str],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        debias: float | None = None,
        compare: bool = False,
        allow: list[str] | None = None,
        deny: list[str] | None = None,
        recent: dict[str, list[str]] | None = None,
        filters: dict[str, Filter] | None = None,
    ) -> RecommendResponse:
        """Rankings for some users, see RecommendRequest.

        Raises:
            ServingError: nothing listens, or the endpoint refuses the request or fails.
            pydantic.ValidationError: the arguments are not a valid request.
        """
        request = RecommendRequest(
            users=users,
            recent=recent or {},
            k=k,
            exclude_seen=exclude_seen,
            debias=debias,
            compare=compare,
            allow=allow,
            deny=deny or [],
            filters=filters or {},
        )
        return self.ask(request)

    def score(
        self, user_id: str, item_ids: list[str], *, debias: float | None = None, recent: list[str] | None = None
    ) -> ScoreResponse:
        """Scores of given items, see ScoreRequest; raises as `recommend`."""
        request = ScoreRequest(user_id=user_id, item_ids=item_ids, recent=recent or [], debias=debias)
        return self._ask("/v1/score", request, ScoreResponse)

    def explain(
        self,
        user_id: str,
        item_id: str,
        *,
        debias: float | None = None,
        recent: list[str] | None = None,
        num_neighbours: int = 5,
    ) -> ExplainResponse:
        """One score taken apart, see ExplainRequest; raises as `recommend`."""
        request = ExplainRequest(
            user_id=user_id, item_id=item_id, recent=recent or [], debias=debias, num_neighbours=num_neighbours
        )
        return self._ask("/v1/explain", request, ExplainResponse)

    def new_items(
        self,
        items: list[NewItem],
        users: list[str] | None = None,
        *,
        recent: dict[str, list[str]] | None = None,
        num_neighbours: int = 0,
    ) -> ItemsResponse:
        """Scores of items that the model does not know, from their text, see ItemsRequest; raises as `recommend`."""
        request = ItemsRequest(items=items, users=users or [], recent=recent or {}, num_neighbours=num_neighbours)
        return self._ask("/v1/items", request, ItemsResponse)

    def tell(self, events: list[Event]) -> EventsResponse:
        """Writes what users did to the online history, see EventsRequest; raises as `recommend`."""
        return self._ask("/v1/events", EventsRequest(events=events), EventsResponse)

    def model(self) -> ModelResponse:
        """What is being served; raises ServingError as `recommend`."""
        return self._ask("/v1/model", None, ModelResponse)

    def _ask(self, path: str, request: BaseModel | None, answer: type[_Response]) -> _Response:
        # what is as it would be anyway is left out: an endpoint of an earlier version need not know it
        body = None if request is None else request.model_dump(mode="json", exclude_defaults=True)
        response = self._send(path, body)
        if response.status_code != 200:
            raise self._refused(response)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise ServingError(
                f"{self._url}{path} answers something else than this client understands: {error.error_count()} fields differ.",
                "Use the client of the same version as the endpoint, or check the address.",
            ) from None

    def _send(self, path: str, body: dict[str, Any] | None) -> httpx.Response:
        def attempt() -> httpx.Response:
            return self._http.get(path) if body is None else self._http.post(path, json=body)

        tries = Retrying(
            stop=stop_after_attempt(self._retries + 1),
            wait=self._pause,
            retry=retry_if_exception_type(httpx.TransportError) | retry_if_result(_is_unanswered),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        try:
            response: httpx.Response = tries(attempt)
        except httpx.RequestError as error:
            raise self._unreachable(error) from None
        return response

    def _pause(self, state: RetryCallState) -> float:
        """Seconds before the next try: the back-off, or the server's Retry-After if that is longer, and up to twice that."""
        pause = self._backoff(state)
        if state.outcome is not None and not state.outcome.failed:
            told = state.outcome.result().headers.get("Retry-After", "")
            pause = max(pause, float(told)) if told.isdecimal() else pause  # digits such as ² are no numbers
        return pause + wait_random(0, pause)(state)

    def _unreachable(self, error: httpx.RequestError) -> ServingError:
        if isinstance(error, httpx.ConnectError):
            return ServingError(f"nothing listens at {self._url}.", "Start the endpoint: make serve (or: cllmr serve).")
        if isinstance(error, httpx.TimeoutException):
            return ServingError(f"{self._url} does not answer in time.", "Look at its log, or ask again later.")
        return ServingError(f"{self._url} cannot be asked: {type(error).__name__}.", "Check the address and try again.")

    def _refused(self, response: httpx.Response) -> ServingError:
        try:
            error = ErrorBody.model_validate_json(response.content)
        except ValidationError:
            if _is_unanswered(response):
                return ServingError(
                    f"{response.url} answers status {response.status_code}: a proxy in front says that no replica answers.",
                    "Look at the endpoint, or ask again later.",
                )
            return ServingError(
                f"{response.url} answers status {response.status_code} and is no endpoint of ours.", "Check the address."
            )
        hint = error.hint
        if error.message.endswith("Extra inputs are not permitted."):  # pydantic's; requests are typed, so it is no misspelling
            hint = "The endpoint does not know that field: use the client of the same version as the endpoint."
        return ServingError(f"the endpoint refuses: {error.message}", f"{hint} (request {error.request_id})")
