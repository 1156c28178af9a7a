"""What every backbone must do; a new one inherits this suite by naming itself."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from components.cllmr.backbones import BACKBONES, Backbone
from components.cllmr.config import ModelConfig
from components.cllmr.graph import Graph
from components.evaluate.metrics import rank
from components.train.bundle import model_tensors
from components.train.graph import as_arrays
from components.train.loop import SingleProcess, TrainData, build_model, fit, make_sampler
from serving.api import create_app
from serving.recommender import Recommender
from serving.scorer import Scorer
from tests.backends import LocalBackend
from tests.behaviour.training import assert_resumes_to_the_bit, small_config, small_data
from tests.bundles import graph_alone, write_bundle

NUM_USERS, NUM_ITEMS, DIM = 7, 5, 6


class BackboneContract:
    """Inherit, and give `name` (and `settings`, where the backbone has variants)."""

    name: str
    settings: ClassVar[dict[str, Any]] = {}

    def config(self, **changes: Any) -> ModelConfig:
        return ModelConfig(
            backbone=self.name, embedding_dim=DIM, **{"mask_seeds": 2, "num_intents": 4, **self.settings, **changes}
        )

    def make(self) -> Backbone:
        """Over a graph whose last user and last item have no edge."""
        torch.manual_seed(0)
        users, items = np.array([0, 0, 1, 2, 3, 4, 5, 5]), np.array([0, 1, 1, 2, 3, 0, 2, 3])
        return BACKBONES[self.name](Graph(users, items, NUM_USERS, NUM_ITEMS), self.config())

    def train_data(self) -> TrainData:
        data = small_data()
        return TrainData(data.train, data.held_out, None)

    def test_shapes_and_finite_values_also_of_isolated_nodes(self) -> None:
        backbone = self.make()
        for generator in (None, torch.Generator().manual_seed(1)):
            users, items = backbone(generator)
            assert users.shape == (NUM_USERS, backbone.output_dim)
            assert items.shape == (NUM_ITEMS, backbone.output_dim)
            assert torch.isfinite(users).all()
            assert torch.isfinite(items).all()

    @pytest.mark.parametrize("loss", ["softmax", "bpr"])
    @pytest.mark.parametrize("dim", [1, 3, 150])
    def test_any_width_does_also_beyond_the_number_of_nodes(self, dim: int, loss: str) -> None:
        data = self.train_data()
        assert sum(data.train.shape) < 150
        config = small_config(model={**self.bare(loss), "embedding_dim": dim})
        model = build_model(data, config)
        value, _ = model(make_sampler(data.train, config).batch(0, 0), torch.Generator().manual_seed(0))
        value.backward()
        assert torch.isfinite(value)
        assert model.backbone.embedding.grad is not None
        assert torch.isfinite(model.backbone.embedding.grad).all()
        assert torch.cat(model.backbone()).shape == (sum(data.train.shape), model.backbone.output_dim)

    def test_inference_has_no_noise_and_a_training_pass_repeats_with_its_generator(self) -> None:
        backbone = self.make()
        for first, again in zip(backbone(), backbone(), strict=True):
            assert torch.equal(first, again)
        first, again = (torch.cat(backbone(torch.Generator().manual_seed(3))) for _ in range(2))
        assert torch.equal(first, again)

    def test_the_given_table_is_used_instead_of_its_own(self) -> None:
        backbone = self.make()
        other = torch.randn(NUM_USERS + NUM_ITEMS, DIM)
        assert not torch.allclose(torch.cat(backbone(embedding=other)), torch.cat(backbone()))
        assert torch.equal(torch.cat(backbone(embedding=backbone.embedding)), torch.cat(backbone()))

    @pytest.mark.parametrize("loss", ["softmax", "bpr"])
    def test_the_gradient_of_a_step_reaches_the_table_and_every_parameter(self, loss: str) -> None:
        data, config = self.train_data(), small_config(model=self.bare(loss))
        model = build_model(data, config)
        batch = make_sampler(data.train, config).batch(0, 0)
        value, parts = model(batch, torch.Generator().manual_seed(0))
        value.backward()
        assert all(torch.isfinite(part) for part in parts.values())
        silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not silent
        assert model.backbone.embedding.grad is not None
        assert model.backbone.embedding.grad.abs().sum() > 0

    def test_training_repeats_to_the_bit_and_another_seed_differs(self) -> None:
        found = [
            fit(self.train_data(), small_config(max_epochs=2, seed=seed, model=self.bare()), SingleProcess())[
                0
            ].representations()
            for seed in (1, 1, 2)
        ]
        first, again, other = (torch.cat([one.mediator.users, one.mediator.items]) for one in found)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_an_interrupted_run_ends_with_the_weights_of_the_unbroken_one(self, tmp_path: Path) -> None:
        assert_resumes_to_the_bit(self.train_data(), small_config(max_epochs=2, model=self.bare()), tmp_path)

    def test_the_api_answers_with_the_scores_that_the_trained_model_has(self, tmp_path: Path) -> None:
        data = self.train_data()
        trained, state = fit(data, small_config(max_epochs=1, evaluate_every=1, model=self.bare()), SingleProcess())
        graph = as_arrays(trained, state)
        num_users, num_items = data.train.shape
        items = [{"item_id": f"i{row}", "title": "", "profile": ""} for row in range(num_items)]
        model = model_tensors(graph_alone(graph), graph.items, data.train)
        header = {"embedding_dim": graph.items.shape[1]}
        users = [f"u{row}" for row in range(num_users)]
        scorer = Scorer.load(write_bundle(tmp_path / "bundle", model=model, header=header, users=users, items=items))
        expected = (graph.users.astype(np.float64) @ graph.items.T) * graph.user_gate[:, None] * graph.item_gate
        app = create_app(LocalBackend(Recommender(scorer, "1")))
        with TestClient(app) as http:
            for row in range(0, num_users, 7):
                asked = {"user_id": users[row], "item_ids": [item["item_id"] for item in items], "debias": 0.0}
                scores = [item["score"] for item in http.post("/v1/score", json=asked).json()["scores"]]
                np.testing.assert_allclose(scores, expected[row], atol=1e-5)

    @pytest.mark.parametrize("loss", ["softmax", "bpr"])
    def test_it_finds_the_blocks_of_a_planted_world(self, loss: str) -> None:
        data = self.train_data()
        epochs = 15 if loss == "softmax" else 40
        config = small_config(max_epochs=epochs, evaluate_every=epochs, learning_rate=0.02, model=self.bare(loss))
        users, items = fit(data, config, SingleProcess())[0].representations().mediator
        recall = rank(lambda rows: (users[torch.from_numpy(rows)] @ items.T).numpy(), data.train, data.held_out).mean()[
            "recall@10"
        ]
        assert recall > 0.75, f"recall@10 {recall:.3f}"  # by chance a third of what can be found, about 0.3

    def bare(self, loss: str = "softmax") -> dict[str, Any]:
        """Settings of the model without side information."""
        return {"backbone": self.name, "loss": loss, "side_encoder": "none", "mask_seeds": 2, "num_intents": 8, **self.settings}
