"""Requests and answers of the HTTP API: strict, unknown fields refused, examples that run against the sample data."""

import time
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from components.ids import MAX_ID_LENGTH

MAX_USERS = 100
MAX_K = 200
MAX_CANDIDATES = 1_000
MAX_FILTER_ITEMS = 10_000
MAX_FILTER_COLUMNS = 16
MAX_FILTER_VALUES = 200
MAX_NEIGHBOURS = 20
MAX_RECENT = 200
MAX_EVENTS = 1_000
MAX_NEW_ITEMS = 20
MAX_TEXT_LENGTH = 10_000


def _without_blanks_around(raw_id: str) -> str:
    """As ingest reads an id: tables and forms pad them."""
    stripped = raw_id.strip()
    if not stripped:
        raise ValueError("an id of blanks alone is none")
    return stripped


_Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_LENGTH)]
RawId = Annotated[_Name, AfterValidator(_without_blanks_around)]


def _each_user_once(recent: Any) -> Any:
    """Before blanks are taken away: two users that are one id would be one entry then, and the items of the first lost."""
    ids = [user_id.strip() for user_id in recent if isinstance(user_id, str)] if isinstance(recent, dict) else []
    if len(set(ids)) < len(ids):
        raise ValueError("a user is there twice, with other blanks around the id, which do not count")
    return recent


Recent = Annotated[dict[RawId, Annotated[list[RawId], Field(max_length=MAX_RECENT)]], BeforeValidator(_each_user_once)]
Debias = Annotated[
    float | None,
    Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Debias strength λ: 0 is the factual ranking, 1 removes the whole direct effect of the side information. "
        "Left out: the strength chosen when the model was trained.",
    ),
]
Method = Literal["personalised", "fold_in", "side_information", "popularity", "static"]
EventStatus = Literal["stored", "duplicate", "too_old", "in_the_future"]
HistoryAge = Literal["fresh", "stale", "last_good"] | None
_HISTORY_AGE = (
    "How current the user's history from the feature store is: fresh, also where data have no timestamps; stale, older than "
    "its view allows, as the user was away or no features were built for long; last_good, the one last seen, as the store did "
    "not answer (X-Degraded says why). The worst where parts differ; null where nothing is known from there."
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Range(_Strict):
    """Numbers from `min` to `max`, both included."""

    min: float | None = Field(default=None, allow_inf_nan=False, description="Left out: from the least.")
    max: float | None = Field(default=None, allow_inf_nan=False, description="Left out: to the greatest.")

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("a range needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min:g} is above max = {self.max:g}")
        return self


def _kind_of_filter(given: Any) -> str | None:
    """Which kind is meant, so that what is wrong with it is told of that one; None: neither."""
    if isinstance(given, list):
        return "values"
    return "range" if isinstance(given, dict | Range) else None


Filter = Annotated[
    Annotated[list[_Name], Field(min_length=1, max_length=MAX_FILTER_VALUES), Tag("values")] | Annotated[Range, Tag("range")],
    Discriminator(
        _kind_of_filter,
        custom_error_type="filter",
        custom_error_message='a filter is a list of texts, such as ["Comedy", "Drama"], or a range of numbers, such as '
        '{"min": 1990, "max": 1999}',
    ),
]


class RecommendRequest(_Strict):
    """Rank items for one or many users."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"users": ["1"], "k": 10},
                {"users": ["1", "2"], "k": 5, "debias": 1.0, "compare": True, "deny": ["50"]},
                {"users": ["somebody new"], "k": 5, "recent": {"somebody new": ["50", "181"]}},
                {"users": ["1"], "filters": {"genres": ["Comedy", "Drama"], "release_year": {"min": 1990, "max": 1999}}},
            ]
        }
    )

    users: list[RawId] = Field(
        min_length=1, max_length=MAX_USERS, description="User ids; an unknown one without a history gets the popular items."
    )
    recent: Recent = Field(
        default={},
        max_length=MAX_USERS,
        description="User id -> ids of items the user interacted with just now. They count as seen and shape the ranking; with "
        "them, or with a history in the feature store, a user without training interactions is answered too.",
    )
    k: int = Field(default=10, ge=1, le=MAX_K, description="Items per user; fewer come back when fewer are candidates.")
    exclude_seen: bool = Field(default=True, description="Leave out what the user already interacted with.")
    debias: Debias
    compare: bool = Field(default=False, description="Also answer the factual ranking, with every item's rank in both.")
    allow: list[RawId] | None = Field(default=None, max_length=MAX_FILTER_ITEMS, description="Only these items are candidates.")
    deny: list[RawId] = Field(default=[], max_length=MAX_FILTER_ITEMS, description="These items are no candidates.")

    filters: dict[_Name, Filter] = Field(
        default={},
        max_length=MAX_FILTER_COLUMNS,
        description="Column of the items' table -> values, one of which an item must have, or a range of numbers; only items "
        "that pass all are candidates. /v1/model lists the columns.",
    )

    @field_validator("recent")
    @classmethod
    def _of_users_asked_for(cls, recent: dict[str, list[str]], info: ValidationInfo) -> dict[str, list[str]]:
        asked = info.data.get("users")  # not there when they are wrong themselves
        if asked is not None and (strangers := recent.keys() - set(asked)):
            raise ValueError(f"it names {len(strangers)} users that are not in users")
        return recent


class ScoreRequest(_Strict):
    """Score given items for one user."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user_id": "1", "item_ids": ["50", "181", "258"]}]})

    user_id: RawId
    item_ids: list[RawId] = Field(min_length=1, max_length=MAX_CANDIDATES)
    recent: list[RawId] = Field(
        default=[],
        max_length=MAX_RECENT,
        description="Items of the user's, as in /v1/recommend: with them the score is as there. Of users without training "
        "interactions there is none.",
    )
    debias: Debias


class ExplainRequest(_Strict):
    """Take one score apart."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user_id": "1", "item_id": "50"}]})

    user_id: RawId
    item_id: RawId
    recent: list[RawId] = Field(
        default=[],
        max_length=MAX_RECENT,
        description="Items of the user's, as in /v1/recommend: with them the score is as there. Of users without training "
        "interactions there is none.",
    )
    debias: Debias
    num_neighbours: int = Field(default=5, ge=0, le=MAX_NEIGHBOURS, description="Nearest liked items to name.")


class Event(_Strict):
    """A user interacted with an item."""

    user_id: RawId
    item_id: RawId
    timestamp: int = Field(
        default_factory=lambda: int(time.time()),
        ge=0,
        lt=2**40,
        description="When, Unix seconds. Left out: now; give it where an event may be sent again, so that it is known again.",
    )

    @model_serializer(mode="wrap")
    def _with_its_time(self, rest: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without defaults too: pydantic takes the time for one where it is now, and sent again it would be another event."""
        return {**rest(self), "timestamp": self.timestamp}


class EventsRequest(_Strict):
    """New interactions of one or many users, for their next recommendations."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"events": [{"user_id": "1", "item_id": "50"}, {"user_id": "somebody new", "item_id": "181"}]},
            ]
        }
    )

    events: list[Event] = Field(
        min_length=1, max_length=MAX_EVENTS, description="In any order; the same user, item and time again changes nothing."
    )


class NewItem(_Strict):
    """An item that the model does not know."""

    item_id: RawId = Field(description="Names it in the answer; it may be anything.")
    text: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_LENGTH, pattern=r"\S")] = Field(
        description="What is known of it, in the form that profiles have (see /v1/explain): title, description, columns. Rare "
        "words among its first twelve may count by themselves, so it begins with the title."
    )


class ItemsRequest(_Strict):
    """Score items that were not there in training, from their text."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {"item_id": "new", "text": "Rogue One. Release year: 2016. Genres: Action, Adventure, Sci-Fi, War."}
                    ],
                    "users": ["1", "2"],
                    "num_neighbours": 3,
                }
            ]
        }
    )

    items: list[NewItem] = Field(min_length=1, max_length=MAX_NEW_ITEMS)
    users: list[RawId] = Field(default=[], max_length=MAX_USERS, description="For whom; nobody: nearest items alone.")
    recent: Recent = Field(default={}, max_length=MAX_USERS, description="As in /v1/recommend.")
    num_neighbours: int = Field(default=0, ge=0, le=MAX_NEIGHBOURS, description="Nearest known items to name.")


class RankedItem(_Strict):
    """One place of a ranking."""

    rank: int
    item_id: str
    title: str
    score: float = Field(
        description="The ranking's own score: the weighted sum of its members' scores, each in standard deviations above the "
        "mean item; of a history's texts alone, their similarity."
    )
    factual_rank: int | None = Field(
        default=None,
        description="With compare: rank without debiasing among all candidates, without what the user has seen and what "
        "filters leave out; in /v1/explain among all items.",
    )
    debiased_rank: int | None = Field(default=None, description="With compare: rank with debiasing among the same.")
    rank_change: int | None = Field(default=None, description="factual_rank - debiased_rank: places gained by debiasing.")


class UserRecommendations(_Strict):
    """One user's ranking."""

    user_id: str
    model_version: str = Field(description="Of the model that made it: the champion, or a challenger.")
    debias: float = Field(description="The debias strength used: where none is asked for, that of this model.")
    cold: bool = Field(description="Whether the user has no training interactions; true where no model could be asked.")
    method: Method = Field(
        description="How the ranking was made, best first: the model; its members that need a history alone; texts "
        "alone, of the history's items or the user's own; popularity; where no model answers, popularity as last seen."
    )
    reason: str | None = Field(description="Why the ranking is not personalised, null when it is.")
    history: HistoryAge = Field(default=None, description=_HISTORY_AGE)
    items: list[RankedItem]
    factual: list[RankedItem] | None = Field(default=None, description="With compare: the ranking without debiasing.")


class Answer(_Strict):
    """What a model answered."""

    model_version: str


class RecommendResponse(Answer):
    """Rankings, in the order the users were given."""

    debias: float = Field(description="The debias strength of model_version; results of a challenger have their own.")
    results: list[UserRecommendations]


class ItemScore(_Strict):
    """Scores of one item; all null for an unknown item or user."""

    item_id: str
    title: str | None
    score: float | None = Field(description="The debiased score: factual - debias * direct.")
    factual: float | None = Field(description="Total effect: the score without debiasing.")
    direct: float | None = Field(description="Natural direct effect: what the side information does by itself.")
    popularity: int | None = Field(description="Training interactions of the item.")


class ScoreResponse(Answer):
    """Scores, in the order the items were given."""

    user_id: str
    cold: bool
    reason: str | None
    history: HistoryAge = Field(default=None, description=_HISTORY_AGE)
    debias: float
    scores: list[ItemScore]
    unknown_items: list[str]


class EventsResponse(Answer):
    """What became of the events."""

    stored: int = Field(description="Events that are new in the online history.")
    statuses: list[EventStatus] = Field(
        description="Of each event, in the order they were given: stored; duplicate, known before; too_old, beyond what is "
        "kept of a user; in_the_future, by more than five minutes."
    )
    unknown_items: list[str] = Field(
        description="Items of the events that the model does not know: their events are kept and count once a model does."
    )


class Neighbour(_Strict):
    """A known item that is near the one in question; of an explanation, one that the user liked."""

    item_id: str
    title: str
    similarity: float = Field(description="Cosine of the items' representations, -1 to 1.")


class NewItemScore(_Strict):
    """What a new item is to one user; null where the user has no history that the texts could be compared with."""

    user_id: str
    cold: bool
    score: float | None = Field(description="Standard deviations above the user's mean item, by the similarity of texts alone.")
    rank: int | None = Field(description="Its place among the known items, were all ranked by their texts alone.")
    reason: str | None = Field(description="Why there is no score: no_history.")
    history: HistoryAge = Field(default=None, description=_HISTORY_AGE)


class NewItemAnswer(_Strict):
    """What the model makes of a new item."""

    item_id: str
    scores: list[NewItemScore]
    nearest_items: list[Neighbour]


class ItemsResponse(Answer):
    """Scores of new items, in the order they were given."""

    encoder: str = Field(description="The text encoder, the same as in training.")
    results: list[NewItemAnswer]


class Explanation(_Strict):
    """The parts of one score; total_effect = natural_direct_effect + total_natural_indirect_effect."""

    total_effect: float
    natural_direct_effect: float
    total_natural_indirect_effect: float
    removed: float = Field(
        description="debias * natural_direct_effect: what debiasing takes away; negative where it gives something back."
    )
    debiased_score: float = Field(description="total_effect - removed.")
    propensity: float = Field(
        description="How much the item's text speaks for it whatever the user, not negative: the estimated share of its clicks "
        "that the text brought in, or its gate where the model has gates."
    )
    factual_rank: int = Field(
        description="Rank without debiasing among all items, also those the user has seen; in /v1/recommend among candidates."
    )
    debiased_rank: int = Field(description="Rank with debiasing among the same.")


class ExplainResponse(Answer):
    """Why an item has its score for a user."""

    user_id: str
    item_id: str
    cold: bool
    reason: str | None = Field(description="Why there is no explanation: unknown_user or unknown_item.")
    history: HistoryAge = Field(default=None, description=_HISTORY_AGE)
    debias: float
    title: str | None
    profile: str | None = Field(
        description="The text the side information was made of: the item's own, an LLM's profile, or both."
    )
    already_seen: bool
    explanation: Explanation | None
    nearest_liked_items: list[Neighbour]


class FeaturesState(_Strict):
    """The feature store as one gateway replica sees it."""

    state: Literal["ready", "loading", "unavailable", "not_configured"]
    reason: str | None = None


class FilterColumn(_Strict):
    """A column of the items' table that /v1/recommend can filter by."""

    kind: Literal["values", "numbers"]
    num_items: int = Field(description="Items of which the column says something.")
    num_values: int | None = Field(default=None, description="Of values: how many there are.")
    values: list[str] = Field(
        default=[],
        description="Of values: the most frequent ones, most frequent first; none where most items share "
        "no value with another, as of descriptions.",
    )
    min: float | None = Field(default=None, description="Of numbers: the least.")
    max: float | None = Field(default=None, description="Of numbers: the greatest.")


class ModelInfo(_Strict):
    """The bundle behind the endpoint."""

    name: str
    fingerprint: str
    num_users: int
    num_items: int
    embedding_dim: int
    debias_strength: float
    effect: str = Field(description="How the text's propensity is told from taste.")
    members: dict[str, float] = Field(description="The models behind the score, and their weights.")
    backbone: str | None
    side_encoder: str | None
    filters: dict[str, FilterColumn] = Field(
        default={}, description="What items can be filtered by; empty where the bundle has no such columns."
    )
    golden_requests: int = Field(description="Recorded requests that were replayed when the bundle was loaded.")
    item_storage: Literal["float32", "float16", "int8"] = Field(description="How item vectors are kept in memory.")
    storage_overlap: float | None = Field(
        description="Share of the 20 best items by float32 that are the 20 best as stored; null where float32 is stored."
    )
    storage_ndcg: float | None = Field(description="NDCG@20 of the ranking as stored, the 20 best by float32 being relevant.")
    ann: Literal["off", "on", "refused"] = Field(
        description="Whether an approximate index answers; refused where it found less than was asked for."
    )
    ann_recall: float | None = Field(description="Share of the 20 best items that the index finds, measured at loading.")
    lists: Literal["off", "missing", "on", "refused"] = Field(
        description="Whether rankings of `cllmr batch` are looked up; missing where none have been made with this model."
    )
    lists_recall: float | None = Field(description="Share of the 20 best items that those lists have, measured at loading.")


class ModelResponse(Answer):
    """What is being served."""

    deployed_version: str = Field(
        description="The model of the endpoint's configuration; another one is served once the registry's champion is another."
    )
    model: ModelInfo
    features: FeaturesState


class Health(_Strict):
    """Liveness or readiness."""

    status: Literal["ok"]
    reason: str | None = None


class ErrorBody(_Strict):
    """Every error of the API."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "code": "invalid_request",
                    "message": "users: List should have at least 1 item after validation, not 0.",
                    "hint": "See /docs for the fields and their limits.",
                    "request_id": "7c9e2a4f0b1d4c58",
                }
            ]
        }
    )

    code: str
    message: str
    hint: str
    request_id: str
