"""The method's parts against hand-computed numbers, dense computations and torch's own distributions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from components.cllmr.backbones import BACKBONES
from components.cllmr.config import ModelConfig
from components.cllmr.effects.gates import PropensityHeads, mediator_factors
from components.cllmr.encoders.sse import SpectrumSideEncoder, gaussian_kl, perturb_spectrum
from components.cllmr.graph import Graph
from components.cllmr.model import CLLMR, SideInformation
from components.cllmr.objective import bpr, info_nce, mean_log_sum_exp, sampled_softmax
from components.cllmr.sampling import Batch
from components.train.bundle import header, model_tensors
from components.train.graph import as_arrays
from components.train.loop import SingleProcess, build_model, fit, make_sampler
from serving.scorer import Scorer
from tests.behaviour.training import small_config, small_data
from tests.bundles import NO_BLOCKS, graph_alone


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
    encoder = SpectrumSideEncoder(6, 3, 4, ModelConfig(embedding_dim=4))
    text, spectrum = torch.randn(5, 6), torch.randn(5, 3)
    first, again, other = (encoder(text, spectrum, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.z, again.z)
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.z, other.z)
    assert torch.equal(encoder.encode(text, spectrum), encoder.encode(text, spectrum + 1)), "only the prior sees the spectrum"


def test_the_prior_starts_at_the_spectrum_itself() -> None:
    encoder = SpectrumSideEncoder(6, 3, 5, ModelConfig(embedding_dim=5))
    assert encoder.prior_mean is not None
    torch.testing.assert_close(encoder.prior_mean(torch.tensor([[1.0, -2.0, 3.0]])), torch.tensor([[1.0, -2.0, 3.0, 0.0, 0.0]]))


def test_info_nce_equals_the_hand_computation() -> None:
    # cosines: [[1, 0], [0, 1]] whatever the lengths; temperature 1/2
    anchors, targets = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    assert info_nce(anchors, targets, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))
    # exchanged targets: every anchor finds the other's
    assert info_nce(anchors, targets.flip(0), 0.5).item() == pytest.approx(math.log(1 + math.exp(2)))
    # an anchor between two targets: log 2
    assert info_nce(torch.ones(2, 2), targets, 0.2).item() == pytest.approx(math.log(2))


def pairs(*of: tuple[int, int]) -> Tensor:
    """(row, column) pairs as indices, (2, n)."""
    return torch.tensor(of, dtype=torch.int64).reshape(-1, 2).T


def test_info_nce_among_more_targets_than_anchors_equals_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors, targets = torch.randn(3, 4, generator=generator), torch.randn(7, 4, generator=generator)
    own = torch.tensor([5, 0, 5])
    cosines = nn.functional.cosine_similarity(anchors[:, None], targets[None], dim=2)
    torch.testing.assert_close(info_nce(anchors, targets, 0.3, own), nn.functional.cross_entropy(cosines / 0.3, own))


def test_sampled_softmax_over_all_items_is_the_full_cross_entropy_without_the_users_other_items() -> None:
    users = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    items = torch.tensor([[1.0, 0.0], [-0.5, 3.0], [2.0, -1.0], [0.25, 0.5]])
    scores = users @ items.T  # [[1, -0.5, 2, 0.25], [0, 3, -1, 0.5]]
    chosen = torch.tensor([2, 0])
    # user 0 also chose item 0; a positive among the negatives is left out as well
    found = sampled_softmax(scores[[0, 1], chosen], users, items, pairs((0, 0), (0, 2), (1, 0)))
    first = -math.log(math.exp(2) / (math.exp(2) + math.exp(-0.5) + math.exp(0.25)))
    second = -math.log(math.exp(0) / (math.exp(0) + math.exp(3) + math.exp(-1) + math.exp(0.5)))
    assert found.item() == pytest.approx((first + second) / 2)
    masked = scores.masked_fill(torch.tensor([[True, False, False, False], [False] * 4]), -torch.inf)
    torch.testing.assert_close(found, nn.functional.cross_entropy(masked, chosen))


def test_a_user_who_has_chosen_every_negative_costs_nothing() -> None:
    positive, users, items = (torch.tensor(value, requires_grad=True) for value in ([1.0], [[1.0]], [[5.0], [6.0]]))
    loss = sampled_softmax(positive, users, items, pairs((0, 0), (0, 1)))
    loss.backward()
    assert loss.item() == 0
    assert [part.grad.abs().sum().item() for part in (positive, users, items)] == [0.0, 0.0, 0.0]  # type: ignore[union-attr]


@pytest.mark.parametrize("num_rows", [5, 150])
def test_the_softmax_in_blocks_equals_the_dense_one_in_values_and_gradients(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.cllmr.objective._CACHED", 1)  # then a block has 64 rows: 150 rows are three, the last short
    generator = torch.Generator().manual_seed(0)
    first, queries, candidates = (
        torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in ((num_rows,), (num_rows, 3), (11, 3))
    )
    out = torch.rand(num_rows, 11, generator=generator) < 0.3
    first[0], out[1] = -torch.inf, True  # a row without a first logit, and one with nothing else
    inputs = [part.requires_grad_() for part in (first, queries, candidates)]
    found = mean_log_sum_exp(*inputs, torch.nonzero(out).T)
    logits = (queries @ candidates.T).masked_fill(out, -torch.inf)
    expected = torch.logsumexp(torch.cat([first[:, None], logits], dim=1), dim=1).mean()
    torch.testing.assert_close(found, expected)
    for left, right in zip(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(left, right)


def test_the_losses_gradients_equal_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, users, items = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((4,), (4, 3), (6, 3))
    )
    out = pairs((0, 5), (2, 1), (2, 3))
    assert torch.autograd.gradcheck(lambda *parts: sampled_softmax(*parts, out), (positive, users, items))
    assert torch.autograd.gradcheck(lambda *parts: info_nce(*parts, 0.5, torch.tensor([1, 5, 0, 1])), (users, items))
    assert torch.autograd.gradcheck(bpr, (positive, positive.detach().flip(0).requires_grad_()))


def test_bpr_equals_the_hand_computation() -> None:
    found = bpr(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert found.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)


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
    model, state = fit(world, small_config(max_epochs=3, model={"user_gate": True}), SingleProcess())
    graph = as_arrays(model, state)
    described = header(
        embedding_dim=8, name="planted", fingerprint="0" * 16, effect="gates", history_blocks=NO_BLOCKS, debias_strength=0.3
    )
    num_users, num_items = world.train.shape
    items = [{"item_id": str(row), "title": ""} for row in range(num_items)]
    tensors = model_tensors(graph_alone(graph), graph.items, world.train)
    scorer = Scorer(tensors, described, [f"u{row}" for row in range(num_users)], items)

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
        total, direct = (part * gates[0] * gates[1] for part in (mediator, mediator.mean(dim=1, keepdim=True)))
    everybody = np.arange(num_users)
    for debias in (0.0, 0.3, 0.7, 1.0):
        np.testing.assert_allclose(scorer.score_all(everybody, debias), total - debias * direct, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(scorer.score_all(everybody, effect="direct"), direct, atol=1e-5, rtol=1e-5)
    own = scorer.effects(2, np.arange(num_items), debias=1.0)
    np.testing.assert_allclose(own.total, own.direct + own.indirect, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("loss", "similarity"), [("softmax", "cosine"), ("softmax", "inner_product"), ("bpr", "cosine")])
def test_the_ranking_loss_of_a_step_equals_a_direct_computation(loss: str, similarity: str) -> None:
    """Indexing by unique rows must not change what is computed: here users and items repeat."""
    users, items = (np.random.default_rng(4).random((9, 7)) < 0.3).nonzero()
    generator = torch.Generator().manual_seed(0)
    text = nn.functional.normalize(torch.randn(16, 6, generator=generator), dim=1)
    side = SideInformation(text, torch.randn(16, 3, generator=generator))
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"embedding_dim": 4, "loss": loss, "similarity": similarity, "counterfactual": False})
    model = CLLMR(config, Graph(users, items, 9, 7), side)
    seen = torch.tensor([[True, False, False, True]] * 4)
    chosen = Batch(
        torch.tensor([3, 0, 3, 8]),
        torch.tensor([1, 1, 6, 0]),
        torch.tensor([0, 2, 1, 5]),
        torch.nonzero(seen).T if loss == "softmax" else pairs(),
    )
    _, parts = model(chosen, torch.Generator().manual_seed(1))
    with torch.no_grad():
        e_users, e_items = model.backbone()
        if loss == "softmax":
            if similarity == "cosine":
                e_users, e_items = nn.functional.normalize(e_users, dim=1), nn.functional.normalize(e_items, dim=1)
            match = e_users @ e_items.T / config.temperature
            logits = match[chosen.users][:, chosen.negatives].masked_fill(seen, -torch.inf)
            logits = torch.cat([match[chosen.users, chosen.items, None], logits], dim=1)
            expected = nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
        else:
            match = e_users @ e_items.T
            expected = bpr(match[chosen.users, chosen.items], match[chosen.users, chosen.negatives])
    torch.testing.assert_close(parts["ranking"], expected)


STEP = Batch(torch.tensor([3, 0, 3, 8]), torch.tensor([1, 1, 6, 0]), torch.tensor([0, 2, 1, 5]), pairs((0, 0), (2, 2), (3, 1)))


@pytest.mark.parametrize("loss", ["softmax", "bpr"])
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_the_loss_of_a_step_of_every_backbone_is_its_ranking_in_dense_numpy_and_its_own_part(name: str, loss: str) -> None:
    """Of the representations as they are in that step, noise and hidden edges included; the own part has its oracles in
    test_backbones.py."""
    users, items = (np.random.default_rng(4).random((9, 7)) < 0.3).nonzero()
    settings = {"num_layers": 2, "num_intents": 3, "mask_seeds": 2, "mask_depth": 1, "edge_keep": 0.8, "ssl_weight": 0.7}
    config = ModelConfig.model_validate(
        {"backbone": name, "embedding_dim": 4, "loss": loss, "side_encoder": "none", **settings}
    )
    torch.manual_seed(0)
    model = CLLMR(config, Graph(users, items, 9, 7).double(), None).double()
    found, _ = model(STEP, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    tensors = model.backbone(generator)
    own = model.backbone.auxiliary_loss(STEP, *tensors, generator)
    e_users, e_items = (rows.detach().numpy() for rows in tensors)
    if loss == "softmax":
        e_users, e_items = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (e_users, e_items))
    scores = e_users @ e_items.T / (config.temperature if loss == "softmax" else 1)
    positive, opposing = scores[STEP.users, STEP.items], scores[STEP.users][:, STEP.negatives]
    if loss == "softmax":
        counts = np.ones(opposing.shape)
        counts[tuple(STEP.false_negatives)] = 0
        expected = np.mean(np.log(np.exp(positive) + (counts * np.exp(opposing)).sum(axis=1)) - positive)
    else:
        expected = np.mean(np.log1p(np.exp(np.diag(opposing) - positive)))
    assert found.item() == pytest.approx(expected + (0.0 if own is None else own.item()), rel=1e-6)


def test_the_parts_of_a_steps_loss_are_added_by_their_weights() -> None:
    data = small_data()
    weights = {"elbo": 0.2, "alignment": 0.3, "gate": 0.5}
    model = {"backbone": "sgl", "counterfactual": True, **{f"{name}_weight": weight for name, weight in weights.items()}}
    torch.manual_seed(0)
    found, parts = build_model(data, small_config(model=model))(
        make_sampler(data.train, small_config()).batch(0, 0), torch.Generator().manual_seed(1)
    )
    assert set(parts) == {"ranking", "auxiliary", *weights}
    assert all(part > 0 for part in parts.values())
    expected = parts["ranking"] + parts["auxiliary"] + sum(weight * parts[name] for name, weight in weights.items())
    torch.testing.assert_close(found.detach(), expected)


def test_the_heads_read_the_side_representation_and_do_not_shape_it() -> None:
    data, config = small_data(), small_config(model={"user_gate": True, "elbo_weight": 0.0, "alignment_weight": 0.0})
    torch.manual_seed(0)
    model = build_model(data, config)
    for weight in model.heads.parameters():
        nn.init.normal_(weight)  # heads of zeros would pass nothing on
    loss, _ = model(make_sampler(data.train, config).batch(0, 0), torch.Generator().manual_seed(1))
    loss.backward()
    shaped = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert shaped == {"backbone.embedding", "heads.item.weight", "heads.item.bias", "heads.user.weight", "heads.user.bias"}


def test_the_gated_score_of_a_step_is_the_mediator_times_the_gates() -> None:
    """Gates are multiplied into the factors: here the step's loss from the matrix of gated scores."""
    data = small_data()
    torch.manual_seed(0)
    model = build_model(data, small_config(model={"user_gate": True, "max_aligned_nodes": 1000}))
    with torch.no_grad():
        for head in (model.heads.item, model.heads.user):
            assert head is not None
            nn.init.normal_(head.weight, std=2.0)
    batch = make_sampler(data.train, small_config()).batch(0, 0)
    encoded: list[Tensor] = []
    model.side_encoder.register_forward_hook(lambda _module, _inputs, output: encoded.append(output[0].detach()))
    _, parts = model(batch, torch.Generator().manual_seed(1))
    with torch.no_grad():
        users, user_of_pair = torch.unique(batch.users, return_inverse=True)
        items, position = torch.unique(torch.cat([batch.items, batch.negatives]), return_inverse=True)
        e_users, e_items = model.backbone()
        cosine = nn.functional.cosine_similarity(e_users[users][:, None], e_items[items][None], dim=2)
        z = encoded[0]
        assert model.heads.user is not None
        user_gate = torch.sigmoid(model.heads.user(z[: len(users)]))[:, 0]
        item_gate = torch.sigmoid(model.heads.item(z[len(users) :]))[:, 0]
        table = (1 + cosine) / model.config.temperature * user_gate[:, None] / user_gate.mean() * item_gate / item_gate.mean()
        chosen, negatives = position[: len(batch.items)], position[len(batch.items) :]
        logits = table[user_of_pair][:, negatives]
        logits[batch.false_negatives[0], batch.false_negatives[1]] = -torch.inf
        logits = torch.cat([table[user_of_pair, chosen, None], logits], dim=1)
        expected = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    torch.testing.assert_close(parts["ranking"], expected)
