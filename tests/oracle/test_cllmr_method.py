"""The method's parts against hand-computed numbers, dense computations and torch's own distributions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from components.cllmr.backbone import LightGCN
from components.cllmr.config import ModelConfig
from components.cllmr.counterfactual import PropensityHeads, effects, mediator_factors
from components.cllmr.graph import normalised_adjacency, propagate
from components.cllmr.model import CLLMR, SideInformation
from components.cllmr.objective import bpr, info_nce, sampled_softmax
from components.cllmr.sampling import Batch
from components.cllmr.side_encoder import SpectrumSideEncoder, gaussian_kl, perturb_spectrum
from components.train.bundle import header, model_tensors
from components.train.loop import SingleProcess, fit
from serving.scorer import Scorer
from tests.behaviour.training import small_config, small_data

# user 0 chose items 0 and 1, user 1 chose item 1; nobody chose item 2
USERS, ITEMS = np.array([0, 0, 1]), np.array([0, 1, 1])


def random_graph(seed: int, num_users: int = 9, num_items: int = 7) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Users and items of distinct interactions in no order, and D^-1/2 A D^-1/2 as a dense float64 matrix."""
    rng = np.random.default_rng(seed)
    interactions = (rng.random((num_users, num_items)) < 0.3).astype(float)
    users, items = interactions.nonzero()
    order = rng.permutation(len(users))
    full = np.block([[np.zeros((num_users, num_users)), interactions], [interactions.T, np.zeros((num_items, num_items))]])
    degree = full.sum(axis=1)
    root = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1)), 0)
    return users[order], items[order], torch.from_numpy(root[:, None] * full * root[None, :])


def test_the_normalised_adjacency_equals_the_hand_example() -> None:
    found = normalised_adjacency(USERS, ITEMS, num_users=2, num_items=3).to_dense()
    half, root = 0.5, 1 / math.sqrt(2)
    expected = torch.tensor(
        [
            [0, 0, root, half, 0],  # user 0: degree 2; item 0: degree 1, item 1: degree 2
            [0, 0, 0, root, 0],  # user 1: degree 1
            [root, 0, 0, 0, 0],
            [half, root, 0, 0, 0],
            [0, 0, 0, 0, 0],  # an item without interactions sends and receives nothing
        ]
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_normalised_adjacency_equals_the_dense_computation_for_interactions_in_any_order(seed: int) -> None:
    users, items, dense = random_graph(seed)
    torch.testing.assert_close(normalised_adjacency(users, items, 9, 7).to_dense(), dense.float())


def test_propagation_and_its_gradient_equal_the_dense_ones() -> None:
    users, items, dense = random_graph(2)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    value = propagate(normalised_adjacency(users, items, 9, 7), x)
    (gradient,) = torch.autograd.grad((value * weight).sum(), x)
    expected = dense.float() @ x
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weight).sum(), x)[0])


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_lightgcn_equals_the_mean_of_dense_powers_in_values_and_gradients(layers: int) -> None:
    users, items, dense = random_graph(3)
    torch.manual_seed(0)
    backbone = LightGCN(normalised_adjacency(users, items, 9, 7), 9, 7, embedding_dim=5, num_layers=layers)
    user_rows, item_rows = backbone()
    assert user_rows.shape == (9, 5)
    assert item_rows.shape == (7, 5)
    weight = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    ((torch.cat([user_rows, item_rows]) * weight).sum()).backward()

    embedding = backbone.embedding.detach().double().requires_grad_()
    expected = torch.stack([torch.linalg.matrix_power(dense, power) @ embedding for power in range(layers + 1)]).mean(dim=0)
    (expected * weight).sum().backward()
    torch.testing.assert_close(torch.cat([user_rows, item_rows]).double(), expected, atol=1e-6, rtol=1e-5)
    assert backbone.embedding.grad is not None
    assert embedding.grad is not None
    torch.testing.assert_close(backbone.embedding.grad.double(), embedding.grad, atol=1e-6, rtol=1e-5)


def test_the_divergence_of_gaussians_equals_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    mean_q, log_var_q, mean_p, log_var_p = (torch.randn(6, 4, generator=generator) for _ in range(4))
    expected = kl_divergence(Normal(mean_q, (0.5 * log_var_q).exp()), Normal(mean_p, (0.5 * log_var_p).exp())).sum(dim=1)
    torch.testing.assert_close(gaussian_kl(mean_q, log_var_q, mean_p, log_var_p), expected)
    torch.testing.assert_close(gaussian_kl(mean_q, log_var_q, mean_q, log_var_q), torch.zeros(6))


def test_the_divergence_of_two_unit_gaussians_one_apart_is_a_half() -> None:
    zero = torch.zeros(1, 1)
    assert gaussian_kl(zero + 1, zero, zero, zero).item() == pytest.approx(0.5)


@pytest.mark.parametrize("noise", [0.01, 0.5])
def test_a_perturbed_spectrum_keeps_its_signs_and_moves_by_the_noise(noise: float) -> None:
    spectrum = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    moved = perturb_spectrum(spectrum, noise, torch.Generator().manual_seed(1))
    assert torch.equal(torch.sign(moved), torch.sign(spectrum))
    torch.testing.assert_close((moved - spectrum).norm(dim=1), torch.full((50,), noise), atol=1e-6, rtol=1e-4)
    assert (moved.abs() >= spectrum.abs()).all(), "E4 adds the noise in the direction of the signs"


def test_a_node_without_interactions_has_no_spectrum_to_perturb() -> None:
    assert perturb_spectrum(torch.zeros(3, 4), 0.5).abs().max() == 0


def test_the_same_generator_gives_the_same_step_of_the_side_encoder() -> None:
    torch.manual_seed(0)
    encoder = SpectrumSideEncoder(text_dim=6, rank=3, embedding_dim=4)
    text, spectrum = torch.randn(5, 6), torch.randn(5, 3)
    first, again, other = (encoder(text, spectrum, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.z, again.z)
    assert torch.equal(first.negative_elbo, again.negative_elbo)
    assert not torch.equal(first.z, other.z)
    assert torch.equal(encoder.encode(text, spectrum), encoder.encode(text, spectrum + 1)), "only the prior sees the spectrum"


def test_the_prior_starts_at_the_spectrum_itself() -> None:
    encoder = SpectrumSideEncoder(text_dim=6, rank=3, embedding_dim=5)
    torch.testing.assert_close(encoder.prior_mean(torch.tensor([[1.0, -2.0, 3.0]])), torch.tensor([[1.0, -2.0, 3.0, 0.0, 0.0]]))


def test_info_nce_equals_the_hand_computation() -> None:
    # cosines: [[1, 0], [0, 1]] whatever the lengths; temperature 1/2
    anchors, targets = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    assert info_nce(anchors, targets, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))
    # exchanged targets: every anchor finds the other's
    assert info_nce(anchors, targets.flip(0), 0.5).item() == pytest.approx(math.log(1 + math.exp(2)))
    # an anchor between two targets: log 2
    assert info_nce(torch.ones(2, 2), targets, 0.2).item() == pytest.approx(math.log(2))


def test_sampled_softmax_over_all_items_is_the_full_cross_entropy_without_the_users_other_items() -> None:
    scores = torch.tensor([[1.0, -0.5, 2.0, 0.25], [0.0, 3.0, -1.0, 0.5]])
    chosen = torch.tensor([2, 0])
    # user 0 also chose item 0; a positive among the negatives is left out as well
    is_positive = torch.tensor([[True, False, True, False], [True, False, False, False]])
    found = sampled_softmax(scores[[0, 1], chosen], scores, is_positive)
    first = -math.log(math.exp(2) / (math.exp(2) + math.exp(-0.5) + math.exp(0.25)))
    second = -math.log(math.exp(0) / (math.exp(0) + math.exp(3) + math.exp(-1) + math.exp(0.5)))
    assert found.item() == pytest.approx((first + second) / 2)
    masked = scores.masked_fill(torch.tensor([[True, False, False, False], [False] * 4]), -torch.inf)
    torch.testing.assert_close(found, nn.functional.cross_entropy(masked, chosen))


def test_a_user_who_has_chosen_every_negative_costs_nothing() -> None:
    assert sampled_softmax(torch.tensor([1.0]), torch.tensor([[5.0, 6.0]]), torch.tensor([[True, True]])).item() == 0


def test_bpr_equals_the_hand_computation() -> None:
    found = bpr(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert found.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)


def test_effects_equal_the_hand_computation() -> None:
    # m = 6, m* = 2, g_u = 0.5, g_i = 1.5: TE 4.5, NDE 1.5
    found = effects(*(torch.tensor(value) for value in (6.0, 2.0, 0.5, 1.5)), debias=0.25)
    assert [value.item() for value in found] == pytest.approx([4.5, 1.5, 3.0, 4.125])


def test_total_effect_is_the_sum_of_direct_and_indirect_and_debiasing_runs_between_them() -> None:
    generator = torch.Generator().manual_seed(0)
    mediator, reference = torch.rand(20, 30, generator=generator) * 8, torch.rand(20, 1, generator=generator) * 8
    user_gate, item_gate = torch.rand(20, 1, generator=generator), torch.rand(1, 30, generator=generator) * 2
    found = effects(mediator, reference, user_gate, item_gate, debias=0.4)
    torch.testing.assert_close(found.total, found.natural_direct + found.total_natural_indirect, atol=1e-6, rtol=0)
    zero, one = (effects(mediator, reference, user_gate, item_gate, debias) for debias in (0.0, 1.0))
    assert torch.equal(zero.debiased, found.total)
    assert torch.equal(one.debiased, found.total_natural_indirect)
    expected = 0.6 * found.total + 0.4 * found.total_natural_indirect
    torch.testing.assert_close(found.debiased, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scale", "offset"), [(4.0, 1.0), (1.0, 0.0), (6.5, 2.0)])
def test_the_factors_inner_product_is_the_scaled_cosine_with_its_offset(scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(6, 3, generator=generator), torch.randn(8, 3, generator=generator)
    items[0] = -users[0]  # the worst match there is
    factors = mediator_factors(users, items, cosine=True, scale=scale, offset=offset)
    cosine = nn.functional.cosine_similarity(users[:, None], items[None], dim=2)
    found = factors.users @ factors.items.T
    torch.testing.assert_close(found, scale * (cosine + offset), atol=1e-5, rtol=1e-5)
    assert (found.min() >= -1e-5) == (offset >= 1)


def test_without_the_cosine_the_match_is_the_inner_product() -> None:
    users, items = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    factors = mediator_factors(users, items, cosine=False, scale=2.0, offset=1.0)
    assert (factors.users @ factors.items.T).item() == pytest.approx(2 * (1 + 1))


def test_gates_are_sigmoids_relative_to_their_mean() -> None:
    heads = PropensityHeads(embedding_dim=2, initial_bias=0.0, user_gate=True)
    z = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    torch.testing.assert_close(heads.gate(heads.item, z), torch.ones(2))  # untrained heads prefer nobody
    with torch.no_grad():
        heads.item.weight.copy_(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(heads.gate(heads.item, z), torch.tensor([0.5, 0.75]) / 0.625)
    assert heads.gate(heads.item, torch.randn(40, 2)).mean().item() == pytest.approx(1.0, abs=1e-6)


def test_the_trained_models_served_inner_product_equals_the_definition() -> None:
    world = small_data()
    model, _ = fit(world, small_config(max_epochs=3, model={"user_gate": True}), SingleProcess())
    found = model.representations()
    tensors = {
        "user_factors": found.mediator.users.numpy(),
        "item_factors": found.mediator.items.numpy(),
        "user_gate": found.user_gate.numpy(),
        "item_gate": found.item_gate.numpy(),
    }
    described = header(embedding_dim=8, name="planted", fingerprint="0" * 16, debias_strength=0.3)
    num_users, num_items = world.train.shape
    items = [{"item_id": str(row), "title": ""} for row in range(num_items)]
    scorer = Scorer(model_tensors(tensors, world.train), described, [f"u{row}" for row in range(num_users)], items)

    with torch.no_grad():  # the definition, from the model's own parts: E12-E16
        users, items_ = (rows.double() for rows in model.backbone())
        z = model.side_encoder.encode(model.text, model.spectrum).double()
        mediator = (1 + nn.functional.cosine_similarity(users[:, None], items_[None], dim=2)) / model.config.temperature
        heads = model.heads.double()
        assert heads.user is not None
        user_gate = torch.sigmoid(heads.user(z[:num_users])).squeeze(1)
        item_gate = torch.sigmoid(heads.item(z[num_users:])).squeeze(1)
        gates = (user_gate / user_gate.mean())[:, None], (item_gate / item_gate.mean())[None]
        assert gates[1].std() > 1e-3, "gates that are all equal show nothing"
        reference = mediator.mean(dim=1, keepdim=True)
    everybody = np.arange(num_users)
    for debias in (0.0, 0.3, 0.7, 1.0):
        expected = effects(mediator, reference, *gates, debias=debias)
        np.testing.assert_allclose(scorer.score_all(everybody, debias), expected.debiased, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(scorer.score_all(everybody, effect="direct"), expected.natural_direct, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(scorer.score_all(everybody, effect="base"), mediator, atol=1e-5, rtol=1e-5)
    own = scorer.effects(2, np.arange(num_items), debias=1.0)
    np.testing.assert_allclose(own.total, own.direct + own.indirect, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", ["softmax", "bpr"])
def test_the_ranking_loss_of_a_step_equals_a_direct_computation(loss: str) -> None:
    """Indexing by unique rows must not change what is computed: here users and items repeat."""
    users, items, _ = random_graph(4)
    generator = torch.Generator().manual_seed(0)
    text = nn.functional.normalize(torch.randn(16, 6, generator=generator), dim=1)
    side = SideInformation(text, torch.randn(16, 3, generator=generator))
    torch.manual_seed(0)
    model = CLLMR(
        ModelConfig(embedding_dim=4, loss=loss, counterfactual=False),  # type: ignore[arg-type]  # one of its two words
        normalised_adjacency(users, items, 9, 7),
        9,
        7,
        side,
    )
    chosen = Batch(
        torch.tensor([3, 0, 3, 8]),
        torch.tensor([1, 1, 6, 0]),
        torch.tensor([0, 2, 1, 5]),
        torch.tensor([[True, False, False, True]] * 4) if loss == "softmax" else torch.zeros(0, 0, dtype=torch.bool),
    )
    _, parts = model(chosen, torch.Generator().manual_seed(1))
    with torch.no_grad():
        e_users, e_items = model.backbone()
        if loss == "softmax":
            match = nn.functional.cosine_similarity(e_users[:, None], e_items[None], dim=2) / model.config.temperature
            expected = sampled_softmax(
                match[chosen.users, chosen.items], match[chosen.users][:, chosen.negatives], chosen.is_positive
            )
        else:
            match = e_users @ e_items.T
            expected = bpr(match[chosen.users, chosen.items], match[chosen.users, chosen.negatives])
    torch.testing.assert_close(parts["ranking"], expected)
