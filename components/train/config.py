"""Settings of the train stage: the model's own, the optimiser's, the recipe's, and how debiasing is done."""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from components.cells import SEPARATORS
from components.cllmr.config import ModelConfig
from components.settings import StageConfig, Uri, config_error

MemberName = Literal["graph", "ease", "factors", "text", "popularity"]
MEMBERS: tuple[MemberName, ...] = get_args(MemberName)
EffectName = Literal["counterfactual_clicks", "counterfactual_log", "reference_texts", "gates", "none"]
PositiveGrid = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
Grid = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
Shares = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]
Counts = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


NONE, CHAMPION = "none", "champion"  # of `TrainConfig.warm_start`
BATCH_SIZE, MOST_STEPS = 4096, 64  # of an epoch, where no batch size is given


class RegistryConfig(StageConfig):
    """The model registry in which the champion is looked up; as in the promote stage's settings."""

    tracking_uri: Uri = ""
    model_name: str = "cllmr"


class RecipeConfig(StageConfig):
    """Which members make the score, and what is tried for each; a tuple is a grid in order, and the search climbs along it."""

    members: Annotated[tuple[MemberName, ...], Field(min_length=1)] = MEMBERS
    """Which members take part, in the order they are fitted: "ease" can use the side representations of a "graph" before it."""
    graph_joins: bool = True
    """Whether "graph" has a part in the score. Without, it lends its side representations to "ease" and nothing else."""
    graph_settings: tuple[dict[str, float], ...] = ({"alignment_weight": 0.1, "temperature": 0.2},)
    """Of "graph", where there is text: other values of `model` that are tried beside those given there, each by a whole
    training; [] for none."""
    neighbours: PositiveInt = 2000
    """Weights kept per item of "ease" and "text": what is evaluated and served. A bundle holds up to 8 bytes for each."""
    side_mix: Shares = (0.0, 0.3)
    """Grid of the share of the side representations z in the Gram matrix of "ease", the rest being the text itself."""
    max_items: PositiveInt = 25_000
    """A larger catalogue does without "ease" and "text", which compare every item with every other (20,000 items: 1.6 GB for
    each of several matrices)."""
    ease_l2: PositiveGrid = (10.0, 30.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 3000.0, 10000.0, 30000.0)
    ease_side_weight: Grid = (0.0, 1.0, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
    ease_user_power: Shares = (0.0, 0.15, 0.3, 0.5)
    ease_item_power: Shares = (0.0, 0.1, 0.2, 0.3, 0.4)
    ease_popularity_power: Shares = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
    """Settings of "ease": see `components.cllmr.linear.ease`."""
    large_catalogue: PositiveInt = 9_000
    """From this many items on one fit of "ease" takes ten seconds, and a minute at 18,000: its powers of user and item are then
    fixed at 0.15 and 0.2, and one pass over its other settings must do."""
    ials_factors: Counts = (32, 64, 128, 256)
    ials_alpha: PositiveGrid = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0)
    ials_regularization: PositiveGrid = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    ials_prior: Grid = (0.0, 1.0, 3.0, 10.0, 30.0)
    """Settings of "factors"; prior: the pull towards the side information in units of the regularisation, 0 is without."""
    ials_iterations: PositiveInt = 15
    text_power: PositiveGrid = (1.0, 2.0, 3.0, 4.0, 6.0)
    """Setting of "text": see `components.cllmr.linear.kernel`."""

    @field_validator("graph_joins")
    @classmethod
    def _a_graph_lends_to_ease(cls, joins: bool, info: ValidationInfo) -> bool:
        members = info.data.get("members", MEMBERS)  # not there when they are wrong themselves
        lends = "graph" in members and "ease" in members[members.index("graph") :]
        if not joins and not lends:
            raise ValueError(f"members are {', '.join(members)}; it is true unless 'graph' is among them, before 'ease'")
        return joins


class TrainConfig(StageConfig):
    """How CLLMR is trained."""

    model: ModelConfig = ModelConfig()
    """The graph member: its shape and the weights of its losses."""
    learning_rate: PositiveFloat = 1e-2
    """Adam's step size; 1e-3 is usual for BPR."""
    batch_size: PositiveInt | None = None
    """Interactions per step, over all workers; null: 4,096, or a 64th of all where that is more. Each step of a graph model
    propagates all of them, so that with a given size the cost of an epoch grows with their square."""
    max_epochs: PositiveInt = 40
    """Passes over the training interactions at most."""
    evaluate_every: PositiveInt = 4
    """Epochs between two validations; a checkpoint is written at each."""
    patience: PositiveInt = 3
    """Validations without a better Recall@20 before training stops."""
    num_workers: PositiveInt = 2
    """Data-parallel workers; part of the fingerprint, because each draws its own negatives."""
    seed: NonNegativeInt = 2024
    """Of initial weights, batches, negatives, noise and factors."""
    recipe: RecipeConfig = RecipeConfig()
    """The members beside the graph model, and how all are tuned and joined."""
    effect: EffectName = Field(default="counterfactual_log", validate_default=True)
    """How the text's propensity is told from taste: see `components.cllmr.effects`. "reference_texts" needs texts that an LLM
    wrote; "gates" is the paper's, and needs model.counterfactual and "graph"; "none" serves the factual score."""
    debias_grid: Shares = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Debias strengths λ, 0 to 1 in any order, that are tried on the validation interactions."""
    debias_tolerance: NonNegativeFloat = 0.02
    """Share of the best validation NDCG@10 that debiasing may cost: the largest λ within it is served. Validation clicks carry
    the same propensity as training clicks, so some loss on them is what removing it looks like."""
    filter_columns: tuple[str, ...] | None = None
    """Columns of the items' table (of those that ingest.item_text_columns keeps) that requests can filter by; null: all that
    have numbers or at most 200 distinct values; []: none."""
    filter_separator: str | None = Field(default=SEPARATORS, min_length=1)
    """Marks any of which stands between several values of one cell ("Comedy|Drama"), or a space alone; null: a cell is one
    value."""
    refit: bool = True
    """Whether what is served is fitted once more, with all that was chosen, to all interactions: those by which it was chosen
    and evaluated are the latest, or as good as any. It costs a fit without a search; figures stay those of the model that
    has not seen them."""
    warm_start: str = Field(default=NONE, pattern=rf"^({NONE}|{CHAMPION}|[0-9a-f]{{16}})$")
    """What the graph member begins with: "none", the ID table of the "champion", or that of another output of this stage, by
    its fingerprint; users and items are joined by id, new ones begin as ever. Other members are fitted anew. Training begins
    without the champion, and says so, where it has seen interactions that are held out today: see `components.train.warm`."""
    registry: RegistryConfig | None = None
    """Where the champion is looked up; the pipeline gives promote's own settings. Not part of the fingerprint."""
    max_failures: NonNegativeInt = 2
    """Workers' deaths after which training goes on from the last checkpoint."""
    use_gpu: bool = False
    """One GPU per worker. Placement, not part of the fingerprint."""
    cpus_per_worker: PositiveFloat = Field(default=1.0)
    """CPU cores that Ray reserves per worker, and threads of its matrix products. Placement, not part of the fingerprint."""

    @field_validator("filter_separator")
    @classmethod
    def _each_mark_separates(cls, marks: str | None) -> str | None:
        if marks is None or marks == " ":
            return marks
        if any(mark.isalnum() or mark.isspace() for mark in marks) or len(set(marks)) < len(marks):
            raise ValueError(
                "each character of it separates values: give marks alone, such as ; or /, each once, no letters, no spaces, or "
                "one space and nothing else"
            )
        return marks

    @field_validator("recipe")
    @classmethod
    def _graph_settings_are_of_the_model(cls, recipe: RecipeConfig, info: ValidationInfo) -> RecipeConfig:
        model = info.data.get("model", ModelConfig())  # not there when it is wrong itself
        for other in recipe.graph_settings:
            try:
                ModelConfig.model_validate({**model.model_dump(), **other})
            except ValidationError as error:
                raise config_error(ModelConfig, error, "recipe.graph_settings") from None
        return recipe

    @field_validator("effect")
    @classmethod
    def _gates_are_in_the_model(cls, effect: EffectName, info: ValidationInfo) -> EffectName:
        model = info.data.get("model")  # not there when it is wrong itself
        if model is not None and (effect == "gates") != model.counterfactual:
            raise ValueError(
                f"model.counterfactual is {model.counterfactual}; it is true with the effect 'gates' and false with any other"
            )
        recipe = info.data.get("recipe")
        if effect == "gates" and recipe is not None and "graph" not in recipe.members:
            raise ValueError(f"recipe.members are {', '.join(recipe.members)}; the gates are those of 'graph'")
        return effect

    def batch_size_of(self, num_interactions: int) -> int:
        """Interactions per step, of so many in training."""
        return self.batch_size or max(BATCH_SIZE, -(-num_interactions // MOST_STEPS))

    def identity(self) -> dict[str, Any]:
        """Everything but placement: the same model on other hardware is the same model."""
        return self.model_dump(mode="json", exclude={"use_gpu", "cpus_per_worker", "max_failures", "registry"})
