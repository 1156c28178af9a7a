"""Settings of the evaluate stage, and the names of what it compares."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from components.settings import StageConfig

BaselineName = Literal["popularity", "random", "text_cosine", "bm25_knn", "ials", "ease", "ease_text", "alpharec", "lightgcn"]

SCORES: tuple[Literal["factual", "debiased"], ...] = ("factual", "debiased")
"""The scores of the bundle that are evaluated, by the name they have in every result."""

LABELS: dict[str, str] = {
    "popularity": "Popularity",
    "random": "Random",
    "text_cosine": "Text cosine",
    "bm25_knn": "BM25 item-kNN",
    "ials": "iALS",
    "ease": "EASE",
    "ease_text": "EASE + text",
    "alpharec": "AlphaRec (text MLP, graph convolution)",
    "lightgcn": "Backbone (no side information)",
    "factual": "CLLMR factual",
    "debiased": "CLLMR debiased",
}
"""Every model that can appear in a result, in the order of the result table, as people read it; the backbone gets its own name
when it is known, in "labels" of metrics.json."""

NEW_USERS = {
    "fold_in": "CLLMR fold-in of the history",
    "side_information": "CLLMR by the user's own text alone",
    "text_cosine": "Text cosine",
    "popularity": "CLLMR's popularity, as served",
}
"""How users who were not in the training data can be answered, as people read it."""

NEW_ITEMS = {
    "text_kernel": "CLLMR from the text, as /v1/items answers",
    "text_cosine": "Text cosine to the mean of the history",
    "popularity": "Popularity (which an item that is new does not have)",
}
"""How items that nobody has chosen yet can be ranked, as people read it."""

ACTIVITY = ("least active third", "middle third", "most active third")
"""Groups of users by their number of training interactions, in order."""


class EvaluateConfig(StageConfig):
    """How the bundle and its rivals are compared."""

    baselines: tuple[BaselineName, ...] = (
        "popularity",
        "random",
        "text_cosine",
        "bm25_knn",
        "ials",
        "ease",
        "ease_text",
        "alpharec",
        "lightgcn",
    )
    """Rivals on the same split. Each is tuned on validation over its own grid below and tested once. "lightgcn" is the backbone
    of the train stage, whichever that is, without side information."""
    bootstrap_samples: PositiveInt = 1000
    """Resamples of the users behind each 95 % confidence interval; the same resamples for every model (paired)."""
    seed: NonNegativeInt = 0
    """Of the bootstrap, of iALS' and AlphaRec's initial values and of the random ranking."""
    block_size: PositiveInt = 512
    """Users scored at once; memory grows with it (block_size x num_items x 4 bytes a few times over), results do not change."""
    bm25_neighbours: tuple[PositiveInt, ...] = Field(default=(20, 100, 500), min_length=1)
    """Grid of K, neighbours kept per item."""
    bm25_b: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(0.25, 0.5, 0.75), min_length=1)
    """Grid of BM25's length normalisation, 0 (none) to 1."""
    ials_factors: tuple[PositiveInt, ...] = Field(default=(64, 128, 256), min_length=1)
    """Grid of the number of factors."""
    ials_alpha: tuple[PositiveFloat, ...] = Field(default=(1.0, 5.0, 20.0), min_length=1)
    """Grid of the confidence of an interaction; without one it is 0."""
    ials_regularization: tuple[PositiveFloat, ...] = Field(default=(1.0, 10.0, 30.0, 100.0), min_length=1)
    """Grid of the weight of the squared factors."""
    ials_iterations: PositiveInt = 15
    """Alternating sweeps."""
    ease_l2: tuple[PositiveFloat, ...] = Field(default=(10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0), min_length=1)
    """Grid of the weight of the squared item-item coefficients; also of EASE + text."""
    ease_text_weight: tuple[PositiveFloat, ...] = Field(default=(1.0, 10.0, 100.0), min_length=1)
    """Grid of the weight of the text's Gram matrix in EASE + text."""
    ease_max_items: PositiveInt = 15_000
    """EASE holds several dense item-item matrices (15,000 items: 0.9 GB each); a larger catalogue skips it, and says so."""
    alpharec_temperature: tuple[PositiveFloat, ...] = Field(default=(0.15, 0.2, 0.3), min_length=1)
    """Grid of the temperature of AlphaRec's softmax."""

    def identity(self) -> dict[str, Any]:
        """Everything but what decides memory alone."""
        return self.model_dump(mode="json", exclude={"block_size"})
