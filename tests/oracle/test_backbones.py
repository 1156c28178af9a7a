"""The graph and every backbone against dense NumPy computations on a small graph, and their gradients."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from components.cllmr.backbones import BACKBONES, Backbone
from components.cllmr.backbones.autocf import AutoCF
from components.cllmr.backbones.dccf import DCCF
from components.cllmr.backbones.gccf import GCCF
from components.cllmr.backbones.lightgcn import LightGCN
from components.cllmr.backbones.sgl import SGL
from components.cllmr.backbones.simgcl import SimGCL
from components.cllmr.config import ModelConfig
from components.cllmr.graph import Graph, edge_products, propagate, propagate_weighted, smooth
from components.cllmr.sampling import Batch

NUM_USERS, NUM_ITEMS, DIM = 9, 7, 4
NUM_NODES = NUM_USERS + NUM_ITEMS
Matrix = npt.NDArray[np.float64]

BATCH = Batch(
    torch.tensor([3, 0, 3, 8]), torch.tensor([1, 1, 6, 0]), torch.tensor([0, 2, 1, 5]), torch.zeros(2, 0, dtype=torch.int64)
)


def interactions(seed: int) -> npt.NDArray[np.bool_]:
    """Of all but the last user and the last item, which have none."""
    dense = np.random.default_rng(seed).random((NUM_USERS, NUM_ITEMS)) < 0.35
    dense[-1], dense[:, -1] = False, False
    return dense


def graph_of(dense: npt.NDArray[np.bool_]) -> Graph:
    """The edges handed over in no order, in double precision."""
    users, items = dense.nonzero()
    order = np.random.default_rng(0).permutation(len(users))
    return Graph(users[order], items[order], *dense.shape).double()


def square(dense: Matrix | npt.NDArray[np.bool_]) -> Matrix:
    """(num_users, num_items) -> symmetric (num_nodes, num_nodes)."""
    num_users, num_items = dense.shape
    return np.block([[np.zeros((num_users, num_users)), dense], [dense.T, np.zeros((num_items, num_items))]])


def normalised(adjacency: Matrix) -> Matrix:
    degree = adjacency.sum(axis=1)
    root = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1e-30)), 0)
    return root[:, None] * adjacency * root[None, :]


def made(name: str, seed: int = 3, **settings: Any) -> tuple[Any, npt.NDArray[np.bool_]]:
    """A backbone in double precision over `interactions(seed)`."""
    dense = interactions(seed)
    config = ModelConfig.model_validate({"backbone": name, "embedding_dim": DIM, **settings})
    torch.manual_seed(0)
    return BACKBONES[name](graph_of(dense), config).double(), dense


def table(backbone: Backbone) -> Matrix:
    return backbone.embedding.detach().numpy()


def all_nodes(backbone: Backbone, generator: torch.Generator | None = None) -> Matrix:
    return torch.cat(backbone(generator)).detach().numpy()


def unit(x: Matrix) -> Matrix:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nce(anchors: Matrix, targets: Matrix, own: Any, temperature: float) -> float:
    logits = unit(anchors) @ unit(targets).T / temperature
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(anchors)), own]))


# -- the graph


def test_the_normalised_adjacency_equals_the_hand_example() -> None:
    # user 0 chose items 0 and 1, user 1 chose item 1; nobody chose item 2
    found = Graph(np.array([1, 0, 0]), np.array([1, 1, 0]), num_users=2, num_items=3).adjacency.to_dense()
    half, root = 0.5, 1 / np.sqrt(2)
    expected = [
        [0, 0, root, half, 0],  # user 0: degree 2; item 0: degree 1, item 1: degree 2
        [0, 0, 0, root, 0],  # user 1: degree 1
        [root, 0, 0, 0, 0],
        [half, root, 0, 0, 0],
        [0, 0, 0, 0, 0],  # an item without interactions sends and receives nothing
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_normalised_adjacency_equals_the_dense_computation_for_interactions_in_any_order(seed: int) -> None:
    dense = interactions(seed)
    np.testing.assert_allclose(graph_of(dense).adjacency.to_dense().numpy(), normalised(square(dense)), atol=1e-7)


def test_weights_reach_both_directions_of_their_edge() -> None:
    dense = interactions(2)
    graph, weighted = graph_of(dense), np.zeros(dense.shape)
    weight = np.arange(1.0, graph.num_edges + 1)
    weighted[dense] = weight  # row by row: by user, then item
    np.testing.assert_array_equal(graph.matrix(torch.from_numpy(weight)).to_dense().numpy(), square(weighted))


def test_a_dropped_edge_is_gone_in_both_directions_and_the_others_keep_their_weight() -> None:
    users, items = np.ones((40, 30)).nonzero()
    graph = Graph(users, items, 40, 30)
    found = graph.matrix(graph.dropped(graph.weight, 0.8, torch.Generator().manual_seed(0))).to_dense()
    assert torch.equal(found, found.T)
    kept = found[:40, 40:] > 0
    assert torch.equal(found[:40, 40:][kept], graph.adjacency.to_dense()[:40, 40:][kept])
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.035)  # three standard deviations of 1200 draws


def test_self_loops_count_in_the_degree_and_edges_that_are_not_kept_do_not() -> None:
    dense = interactions(1)
    graph = graph_of(dense)
    looped = normalised(square(dense) + np.eye(NUM_NODES))
    weight = graph.normalised(torch.ones(graph.num_edges, dtype=torch.float64), self_loops=1.0)
    np.testing.assert_allclose(graph.matrix(weight).to_dense().numpy(), looped - np.diag(np.diag(looped)), atol=1e-12)
    kept = torch.arange(graph.num_edges) % 3 > 0
    fewer = dense.copy()
    fewer[dense] = kept.numpy()
    found = graph.matrix(graph.normalised(kept.double())).to_dense().numpy()
    np.testing.assert_allclose(found, normalised(square(fewer)), atol=1e-12)


def test_propagation_and_its_gradients_equal_finite_differences() -> None:
    graph = graph_of(interactions(2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_NODES, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(graph.num_edges, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: propagate(graph.adjacency, x), (x,))
    assert torch.autograd.gradcheck(lambda x: smooth(graph.adjacency, x, 3), (x,))
    assert torch.autograd.gradcheck(lambda weight, x: propagate_weighted(graph, weight, x), (weight, x))
    assert torch.autograd.gradcheck(lambda x: edge_products(graph, x), (x,))


def test_propagation_with_weights_and_products_over_edges_equal_the_dense_ones() -> None:
    dense = interactions(2)
    graph = graph_of(dense)
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(NUM_NODES, 3)), rng.random(graph.num_edges)
    weighted = np.zeros(dense.shape)
    weighted[dense] = weight
    found = propagate_weighted(graph, torch.from_numpy(weight), torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), square(weighted) @ x, atol=1e-12)
    products = edge_products(graph, torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(products, (x[:NUM_USERS] @ x[NUM_USERS:].T)[dense], atol=1e-12)


# -- propagation of each backbone


def test_matrix_factorisation_is_the_table_itself() -> None:
    backbone, _ = made("mf")
    np.testing.assert_array_equal(all_nodes(backbone), table(backbone))


def layers_of(dense: npt.NDArray[np.bool_], x: Matrix, num_layers: int) -> list[Matrix]:
    adjacency = normalised(square(dense))
    return [np.linalg.matrix_power(adjacency, power) @ x for power in range(num_layers + 1)]


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("combination", ["mean", "sum"])
def test_lightgcn_equals_dense_powers_combined_in_values_and_gradients(layers: int, combination: str) -> None:
    backbone, dense = made("lightgcn", num_layers=layers, layer_combination=combination)
    powers = np.sum(layers_of(dense, np.eye(NUM_NODES), layers), axis=0) / (layers + 1 if combination == "mean" else 1)
    np.testing.assert_allclose(all_nodes(backbone), powers @ table(backbone), atol=1e-7)  # weights are made in float32
    weight = np.random.default_rng(0).normal(size=(NUM_NODES, DIM))
    (torch.cat(backbone()) * torch.from_numpy(weight)).sum().backward()
    np.testing.assert_allclose(backbone.embedding.grad, powers.T @ weight, atol=1e-6)


@pytest.mark.parametrize("name", ["sgl", "simgcl"])
def test_what_is_ranked_by_contrastive_backbones_is_lightgcn_without_noise(name: str) -> None:
    backbone, dense = made(name, num_layers=2)
    expected = np.mean(layers_of(dense, table(backbone), 2), axis=0)
    for generator in (None, torch.Generator().manual_seed(0)):
        np.testing.assert_allclose(all_nodes(backbone, generator), expected, atol=1e-7)


def test_gccf_puts_layers_with_self_loops_side_by_side() -> None:
    backbone, dense = made("gccf", num_layers=2)
    adjacency = normalised(square(dense) + np.eye(NUM_NODES))
    expected = np.hstack([np.linalg.matrix_power(adjacency, power) @ table(backbone) for power in range(3)])
    assert isinstance(backbone, GCCF)
    assert backbone.output_dim == 3 * DIM
    np.testing.assert_allclose(all_nodes(backbone), expected, atol=1e-6)


def dense_dccf(backbone: DCCF, dense: npt.NDArray[np.bool_]) -> tuple[Matrix, list[list[Matrix]]]:
    """Combined layers, and the four views of each layer."""
    x = table(backbone)
    layers, views = [x], []
    intents = [part.detach().numpy() for part in (backbone.user_intents, backbone.item_intents)]
    for _ in range(backbone.config.num_layers):
        local = normalised(square(dense)) @ x
        sides = []
        for side, table_ in zip((x[:NUM_USERS], x[NUM_USERS:]), intents, strict=True):
            odds = np.exp(side @ table_)
            sides.append(odds / odds.sum(axis=1, keepdims=True) @ table_.T)
        mixed = np.vstack(sides)
        adaptive = []
        for ends in (local, mixed):
            likeness = (unit(ends) @ unit(ends).T + 1) / 2 * square(dense)
            adaptive.append(likeness / np.maximum(likeness.sum(axis=1, keepdims=True), 1e-8) @ x)
        views.append([local, mixed, *adaptive])
        x = local + mixed + adaptive[0] + adaptive[1] + x
        layers.append(x)
    return np.mean(layers, axis=0), views


def test_dccf_equals_the_dense_computation_with_its_loss() -> None:
    settings = {"num_layers": 2, "num_intents": 5, "ssl_weight": 0.3, "ssl_temperature": 0.4}
    backbone, dense = made("dccf", **settings)
    expected, views = dense_dccf(backbone, dense)
    np.testing.assert_allclose(all_nodes(backbone), expected, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    loss = backbone.auxiliary_loss(BATCH, *backbone(generator), generator)
    total = 0.0
    for local, *others in views:
        for other in others:
            for rows in ([0, 3, 8], [NUM_USERS + 0, NUM_USERS + 1, NUM_USERS + 6]):
                total += nce(local[rows], other[rows], np.arange(3), 0.4)
    assert loss.item() == pytest.approx(0.3 * total, rel=1e-6)


def dense_attention(backbone: AutoCF, x: Matrix, pairs: Matrix) -> Matrix:
    """Attention over pairs given as counts, (num_nodes, num_nodes), head by head."""
    query, key, value = (x @ part.detach().numpy() for part in (backbone.query, backbone.key, backbone.value))
    result = np.zeros_like(x)
    width = DIM // backbone.num_heads
    for head in range(backbone.num_heads):
        of = slice(head * width, (head + 1) * width)
        odds = np.exp(np.clip(query[:, of] @ key[:, of].T, -10, 10)) * pairs
        result[:, of] = odds / (odds.sum(axis=1, keepdims=True) + 1e-8) @ value[:, of]
    return result


def test_autocf_at_inference_smooths_and_attends_over_the_whole_graph() -> None:
    backbone, dense = made("autocf", num_layers=2)
    layers = layers_of(dense, table(backbone), 2)
    decoded = dense_attention(backbone, layers[-1], square(dense) + np.eye(NUM_NODES))
    np.testing.assert_allclose(all_nodes(backbone), (sum(layers) + decoded) / 4, atol=1e-7)


def test_autocf_hides_the_edges_around_its_seeds() -> None:
    """A path: user 0 - item 0 - user 1 - item 1 - user 2 - item 2 - user 3."""
    users, items = np.array([0, 1, 1, 2, 2, 3]), np.array([0, 0, 1, 1, 2, 2])
    seeds = torch.tensor([0])  # user 0
    for depth, kept, nodes in ((1, [1, 2, 3, 4, 5], {0}), (2, [2, 3, 4, 5], {0, 4}), (3, [3, 4, 5], {0, 4, 1})):
        config = ModelConfig(backbone="autocf", embedding_dim=DIM, mask_depth=depth)
        stays, masked = AutoCF(Graph(users, items, 4, 3), config).masked(seeds)
        assert torch.nonzero(stays).squeeze(1).tolist() == kept, depth
        assert set(masked.tolist()) == nodes, depth


def test_autocf_in_training_equals_the_dense_computation_with_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, dense = made("autocf", num_layers=1, mask_seeds=1, mask_depth=1, ssl_weight=0.7)
    drawn: list[tuple[Tensor, Tensor]] = []
    attended = AutoCF.attended

    def watched(self: AutoCF, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        drawn.append((source, target))
        return attended(self, x, source, target)

    monkeypatch.setattr(AutoCF, "attended", watched)
    for seed in range(20):  # until a seed is drawn that has edges
        generator = torch.Generator().manual_seed(seed)
        users, items = backbone(generator)
        source, target = drawn[-1]
        hidden = sorted(set(source[-NUM_NODES:].tolist()) - set(square(dense).nonzero()[0].tolist()))
        pairs = np.zeros((NUM_NODES, NUM_NODES))
        np.add.at(pairs, (source.numpy(), target.numpy()), 1)
        gone = square(dense) - np.minimum(pairs, square(dense))
        if gone.any():
            break
    assert gone.any()
    assert hidden == [NUM_USERS - 1, NUM_NODES - 1], "the example's nodes without interactions"
    (seed_node,) = np.flatnonzero(gone.sum(axis=1) == gone.sum() / 2)[:1]
    assert gone[seed_node].sum() == square(dense)[seed_node].sum() == gone.sum() / 2, "all its edges are gone, and no others"
    # the only masked node is the seed, so random pairs are the seed with itself, one per edge that is gone, both ways
    assert pairs[seed_node, seed_node] == 1 + gone.sum()
    x = table(backbone)
    smoothed = normalised(square(dense) - gone) @ x
    expected = (x + smoothed + dense_attention(backbone, smoothed, pairs)) / 3
    np.testing.assert_allclose(torch.cat([users, items]).detach().numpy(), expected, atol=1e-6)

    loss = backbone.auxiliary_loss(BATCH, users, items, generator)
    spread = 0.0
    for rows, side in (([0, 3, 8], expected[:NUM_USERS]), ([0, 1, 6], expected[NUM_USERS:])):
        spread += np.log(np.exp(side[rows] @ side.T).sum(axis=1)).mean()
    everyone = square(dense)
    walks = everyone @ everyone
    np.fill_diagonal(walks, 0)
    reached = everyone + walks
    surroundings = unit(reached @ x / (reached.sum(axis=1, keepdims=True) + 1e-8))
    agreement = -np.log1p(np.exp(-(surroundings * unit(x)).sum(axis=1))).mean()
    assert loss.item() == pytest.approx(0.7 * spread - 0.1 * agreement, rel=1e-6)


# -- contrast


@pytest.mark.parametrize("candidates", ["all", "batch"])
def test_sgls_loss_equals_the_dense_one_on_its_two_views(candidates: str) -> None:
    backbone, dense = made("sgl", num_layers=2, ssl_weight=0.5, ssl_temperature=0.3, ssl_candidates=candidates)
    loss = backbone.auxiliary_loss(BATCH, *backbone(), torch.Generator().manual_seed(5))
    generator, views = torch.Generator().manual_seed(5), []
    for _ in range(2):
        kept = np.zeros(dense.shape)
        kept[dense] = (torch.rand(int(dense.sum()), generator=generator) < 0.8).numpy()
        adjacency = normalised(square(dense)) * square(kept)  # masked, not normalised anew
        views.append(np.mean([np.linalg.matrix_power(adjacency, power) @ table(backbone) for power in range(3)], axis=0))
    assert np.abs(views[0] - views[1]).max() > 1e-3
    expected = contrasted(views[0], views[1], [0, 3, 8], [0, 1, 2, 5, 6], 0.3, candidates)  # negatives too
    assert isinstance(backbone, SGL)
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-6)


@pytest.mark.parametrize("candidates", ["all", "batch"])
def test_simgcls_loss_equals_the_dense_one_on_its_two_views(candidates: str) -> None:
    settings = {"ssl_weight": 0.5, "ssl_temperature": 0.3, "ssl_noise": 0.2, "ssl_candidates": candidates}
    backbone, dense = made("simgcl", num_layers=2, **settings)
    loss = backbone.auxiliary_loss(BATCH, *backbone(), torch.Generator().manual_seed(5))
    generator, views = torch.Generator().manual_seed(5), []
    for _ in range(2):
        layers = [table(backbone)]
        for _ in range(2):
            layer = normalised(square(dense)) @ layers[-1]
            noise = unit(torch.rand(layer.shape, generator=generator).double().numpy())
            assert np.linalg.norm(0.2 * noise, axis=1) == pytest.approx(0.2)
            layers.append(layer + 0.2 * np.sign(layer) * noise)
        views.append(np.mean(layers, axis=0))
    expected = contrasted(views[0], views[1], [0, 3, 8], [0, 1, 6], 0.3, candidates)  # chosen items alone
    assert isinstance(backbone, SimGCL)
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-6)


def contrasted(first: Matrix, second: Matrix, users: list[int], items: list[int], temperature: float, candidates: str) -> float:
    total = 0.0
    for rows, nodes in ((users, slice(None, NUM_USERS)), (items, slice(NUM_USERS, None))):
        anchors, targets, own = first[nodes][rows], second[nodes], np.array(rows)
        if candidates == "batch":
            targets, own = targets[rows], np.arange(len(rows))
        total += nce(anchors, targets, own, temperature)
    return total


@pytest.mark.parametrize("name", ["lightgcn", "mf", "gccf"])
def test_backbones_without_self_supervision_have_no_loss_of_their_own(name: str) -> None:
    backbone, _ = made(name)
    generator = torch.Generator().manual_seed(0)
    assert backbone.auxiliary_loss(BATCH, *backbone(generator), generator) is None


# -- gradients


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_the_gradient_of_a_training_pass_equals_finite_differences(name: str) -> None:
    settings = {"num_layers": 2, "num_intents": 3, "mask_seeds": 2, "mask_depth": 1, "edge_keep": 0.8, "ssl_weight": 1.0}
    backbone, _ = made(name, **settings)
    weight = torch.randn(NUM_NODES, backbone.output_dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def loss() -> Tensor:
        generator = torch.Generator().manual_seed(4)
        users, items = backbone(generator)
        auxiliary = backbone.auxiliary_loss(BATCH, users, items, generator)
        value: Tensor = (torch.cat([users, items]) * weight).sum()
        return value if auxiliary is None else value + auxiliary

    loss().backward()
    step = 1e-6
    for parameter in backbone.parameters():
        assert parameter.grad is not None
        flat = parameter.data.view(-1)
        for place in range(0, len(flat), max(1, len(flat) // 12)):
            before = flat[place].item()
            values = []
            for moved in (before + step, before - step):
                flat[place] = moved
                values.append(loss().item())
            flat[place] = before
            expected = (values[0] - values[1]) / (2 * step)
            assert parameter.grad.view(-1)[place].item() == pytest.approx(expected, abs=1e-6, rel=1e-5)


@pytest.mark.parametrize("name", ["lightgcn", "gccf", "dccf"])
def test_edges_are_dropped_in_training_alone(name: str) -> None:
    backbone, _ = made(name, edge_keep=0.5)
    assert isinstance(backbone, LightGCN | GCCF | DCCF)
    at_rest = all_nodes(backbone)
    training = all_nodes(backbone, torch.Generator().manual_seed(0))
    assert np.abs(at_rest - training).max() > 1e-3
    np.testing.assert_array_equal(all_nodes(backbone, torch.Generator().manual_seed(0)), training)
    np.testing.assert_array_equal(all_nodes(backbone), at_rest)
