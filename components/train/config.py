"""Settings of the train stage: the model's own, the optimiser's, and how the debias strength is chosen."""

from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from components.artifacts import StageConfig
from components.cllmr.config import ModelConfig


class TrainConfig(StageConfig):
    """How CLLMR is trained."""

    model: ModelConfig = ModelConfig()
    """Shape of the model and weights of its losses."""
    learning_rate: PositiveFloat = 1e-2
    """Adam's step size; 1e-3 is usual for BPR."""
    batch_size: PositiveInt = 2048
    """Interactions per step, over all workers."""
    max_epochs: PositiveInt = 60
    """Passes over the training interactions at most."""
    evaluate_every: PositiveInt = 3
    """Epochs between two validations; a checkpoint is written at each."""
    patience: PositiveInt = 4
    """Validations without a better Recall@20 before training stops."""
    num_workers: PositiveInt = 2
    """Data-parallel workers; part of the fingerprint, because each draws its own negatives."""
    seed: NonNegativeInt = 2024
    """Of initial weights, batches, negatives and noise."""
    debias_grid: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Debias strengths λ that are tried on the validation interactions."""
    debias_tolerance: NonNegativeFloat = 0.02
    """Share of the best validation NDCG@10 that debiasing may cost: the largest λ within it is served. Validation clicks carry
    the same propensity as training clicks, so some loss on them is what removing it looks like."""
    max_failures: NonNegativeInt = 2
    """Workers' deaths after which training goes on from the last checkpoint."""
    use_gpu: bool = False
    """One GPU per worker. Placement, not part of the fingerprint."""
    cpus_per_worker: PositiveFloat = Field(default=1.0)
    """CPU cores that Ray reserves per worker, and threads of its matrix products. Placement, not part of the fingerprint."""

    def identity(self) -> dict[str, Any]:
        """Everything but placement: the same model on other hardware is the same model."""
        return self.model_dump(mode="json", exclude={"use_gpu", "cpus_per_worker", "max_failures"})
