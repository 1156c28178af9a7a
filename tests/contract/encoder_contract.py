"""What every side encoder must do; a new one inherits this suite by naming itself."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from components.cllmr.config import ModelConfig
from components.cllmr.encoders import ENCODERS, SideEncoder
from components.train.loop import SingleProcess, build_model, fit
from tests.behaviour.training import assert_resumes_to_the_bit, small_config, small_data, without_text

TEXT_DIM, RANK, DIM, NUM_NODES = 20, 6, 5, 12


class EncoderContract:
    """Inherit, and give `name` (and `settings`, where the encoder has variants)."""

    name: str
    settings: ClassVar[dict[str, Any]] = {}
    learns = True
    """Whether it has parameters."""

    def make(self, dim: int = DIM) -> SideEncoder:
        torch.manual_seed(0)
        config = ModelConfig(side_encoder=self.name, embedding_dim=dim, **self.settings)
        encoder = ENCODERS[self.name](TEXT_DIM, RANK, dim, config)
        encoder.prepare(self.inputs()[0])
        return encoder

    @staticmethod
    def inputs() -> tuple[Tensor, Tensor]:
        """Text with unit rows and spectrum; the last node has neither."""
        generator = torch.Generator().manual_seed(1)
        text = torch.nn.functional.normalize(torch.randn(NUM_NODES, TEXT_DIM, generator=generator), dim=1)
        spectrum = torch.randn(NUM_NODES, RANK, generator=generator) / RANK**0.5
        text[-1], spectrum[-1] = 0.0, 0.0
        return text, spectrum

    def test_shapes_and_finite_values_also_without_text_and_spectrum(self) -> None:
        encoder, inputs = self.make(), self.inputs()
        encoded = encoder(*inputs, torch.Generator().manual_seed(2))
        assert encoded.z.shape == encoder.encode(*inputs).shape == (NUM_NODES, DIM)
        assert encoded.loss.shape == ()
        assert torch.isfinite(encoded.z).all()
        assert torch.isfinite(encoder.encode(*inputs)).all()
        assert torch.isfinite(encoded.loss)

    @pytest.mark.parametrize("dim", [1, 3, TEXT_DIM + 13])
    def test_any_width_does_also_beyond_that_of_the_text(self, dim: int) -> None:
        encoder, inputs = self.make(dim), self.inputs()
        encoded = encoder(*inputs, torch.Generator().manual_seed(2))
        loss = encoded.loss + encoder.alignment(torch.randn(NUM_NODES, dim), encoded.z, inputs[0])
        assert encoder.encode(*inputs).shape == encoded.z.shape == (NUM_NODES, dim)
        assert torch.isfinite(encoded.z).all()
        assert torch.isfinite(loss)

    def test_encoding_has_no_noise_and_training_repeats_with_its_generator(self) -> None:
        encoder, inputs = self.make(), self.inputs()
        assert torch.equal(encoder.encode(*inputs), encoder.encode(*inputs))
        first, again = (encoder(*inputs, torch.Generator().manual_seed(2)) for _ in range(2))
        assert torch.equal(first.z, again.z)
        assert torch.equal(first.loss, again.loss)

    def test_a_node_is_encoded_by_itself(self) -> None:
        encoder, (text, spectrum) = self.make(), self.inputs()
        together = encoder.encode(text, spectrum)
        alone = torch.cat([encoder.encode(text[row : row + 1], spectrum[row : row + 1]) for row in range(NUM_NODES)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)

    def test_different_texts_have_different_representations(self) -> None:
        z = self.make().encode(*self.inputs())
        assert torch.pdist(z[:-1]).min() > 1e-4

    def test_the_gradient_reaches_what_can_learn(self) -> None:
        encoder, (text, spectrum) = self.make(), self.inputs()
        parameters = dict(encoder.named_parameters())
        assert bool(parameters) == self.learns
        if not self.learns:
            return
        encoded = encoder(text, spectrum, torch.Generator().manual_seed(2))
        (encoded.loss + encoder.alignment(torch.randn(NUM_NODES, DIM), encoded.z, text)).backward()
        hides = encoder.mask_ratio > 0  # then the token takes part in the model
        silent = [name for name, value in parameters.items() if value.grad is None and not (hides and name == "mask_token")]
        assert not silent

    def test_alignment_is_least_for_representations_that_agree(self) -> None:
        encoder, (text, spectrum) = self.make(), self.inputs()
        rows = slice(0, NUM_NODES - 1)
        z = encoder.encode(text[rows], spectrum[rows])
        other = z[torch.arange(len(z)).roll(1)]
        assert encoder.alignment(z, z, text[rows]) < encoder.alignment(other, z, text[rows])

    def test_a_model_trains_with_it_and_repeats_to_the_bit(self) -> None:
        config = small_config(max_epochs=2, model={"side_encoder": self.name, **self.settings})
        first, again = (fit(small_data(), config, SingleProcess())[0].representations() for _ in range(2))
        np.testing.assert_array_equal(first.mediator.users.numpy(), again.mediator.users.numpy())
        np.testing.assert_array_equal(first.item_side.numpy(), again.item_side.numpy())
        assert torch.isfinite(first.item_side).all()

    def test_an_interrupted_run_ends_with_the_weights_of_the_unbroken_one(self, tmp_path: Path) -> None:
        config = small_config(max_epochs=2, model={"side_encoder": self.name, **self.settings})
        assert_resumes_to_the_bit(small_data(), config, tmp_path)

    @pytest.mark.parametrize("gates", [True, False])
    def test_a_missing_text_is_one_learned_representation_and_no_zero_row(self, gates: bool) -> None:
        effect = "gates" if gates else "none"
        model = {"side_encoder": self.name, **self.settings, "counterfactual": gates, "l2_weight": 0.0}
        config = small_config(max_epochs=2, effect=effect, model=model)
        missing = np.array([0, 7, 50, 80])  # two users, two items
        data = without_text(small_data(), missing)
        (first, _), (again, _) = (fit(data, config, SingleProcess()) for _ in range(2))
        assert first.none_token is not None
        assert again.none_token is not None
        assert torch.equal(first.none_token, again.none_token)
        torch.manual_seed(config.seed)
        start = build_model(data, config).none_token
        assert start is not None
        assert not torch.equal(first.none_token, start), "it has learned nothing"
        with torch.no_grad():
            expected = first.side_encoder.encode(first.none_token, first.spectrum[:1])
            zero = first.side_encoder.encode(torch.zeros_like(first.none_token), first.spectrum[:1])
        found = first.representations()
        z = torch.cat([found.user_side, found.item_side])
        torch.testing.assert_close(z[:1], expected)
        assert (z[0] - zero[0]).norm() > 1e-3
        if self.settings.get("spectrum_input") != "concat":  # then z depends on more than the text
            torch.testing.assert_close(z[missing], z[:1].expand(len(missing), -1))
        told = torch.cat([z[1:7], z[8:50]])
        assert torch.pdist(told).min() > 1e-4, "other nodes keep their own texts"

    def test_where_every_node_has_text_there_is_no_more_to_learn(self) -> None:
        model = build_model(small_data(), small_config(model={"side_encoder": self.name, **self.settings}))
        assert model.none_token is None
        assert "none_token" not in model.state_dict()
