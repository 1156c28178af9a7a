"""The user-item graph: edges, their weights, and propagation over them.

Nodes are numbered users first: user ``u`` is node ``u``, item ``i`` is node ``num_users + i``. Every interaction is one
undirected edge with one weight; edges are numbered by user, then item. Dropping or re-weighting edges is a new array of
weights over the same indices, and reaches both directions of an edge by construction.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

IntArray = npt.NDArray[np.integer[Any]]


class Graph(nn.Module):
    """Distinct interactions as a symmetric sparse matrix. No parameters: a module so that it moves with the model.

    Args:
        users: row numbers of the users of distinct interactions, (num_interactions,), in any order.
        items: row numbers of their items, (num_interactions,).
    """

    def __init__(self, users: IntArray, items: IntArray, num_users: int, num_items: int) -> None:
        super().__init__()
        self.num_users, self.num_items, self.num_nodes = num_users, num_items, num_users + num_items
        order = np.lexsort((items, users))
        user_nodes, item_nodes = users[order].astype(np.int64), items[order].astype(np.int64) + num_users
        by_item = np.argsort(item_nodes, kind="stable")
        degree = np.bincount(np.concatenate([user_nodes, item_nodes]), minlength=self.num_nodes)
        columns = np.concatenate([item_nodes, user_nodes[by_item]])  # rows of the users in the order of edges, then the items'
        # 32-bit indices: propagation is a third faster on CPU than with 64-bit ones
        self.user_nodes = self._buffer("user_nodes", user_nodes)
        self.item_nodes = self._buffer("item_nodes", item_nodes)
        self.degree = self._buffer("degree", degree.astype(np.float32))
        self._by_item = self._buffer("_by_item", by_item.astype(np.int32))
        self._columns = self._buffer("_columns", columns.astype(np.int32))
        self._indptr = self._buffer("_indptr", np.concatenate([[0], np.cumsum(degree)]).astype(np.int32))
        weight = self.normalised(torch.ones(len(user_nodes)))
        self.weight: Tensor
        self.register_buffer("weight", weight, persistent=False)
        self.adjacency: Tensor
        self.register_buffer("adjacency", self.matrix(weight, check=True), persistent=False)

    def _buffer(self, name: str, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        self.register_buffer(name, tensor, persistent=False)  # derived from the data: not part of a checkpoint
        return tensor

    @property
    def num_edges(self) -> int:
        """How many interactions there are."""
        return len(self.user_nodes)

    def normalised(self, kept: Tensor, self_loops: float = 0.0) -> Tensor:
        """Weights of D^-1/2 A D^-1/2 over some of the edges, (num_edges,).

        Args:
            kept: 1 for an edge that is there and 0 for one that is not, (num_edges,).
            self_loops: weight of an edge from every node to itself, which counts in its degree.
        """
        degree = self_loops + torch.zeros(self.num_nodes).to(kept).index_add(0, self.user_nodes, kept).index_add(
            0, self.item_nodes, kept
        )
        scale = degree.clamp_min(torch.finfo(kept.dtype).tiny).rsqrt()
        return kept * scale[self.user_nodes] * scale[self.item_nodes]

    def dropped(self, weight: Tensor, keep: float, generator: torch.Generator) -> Tensor:
        """`weight` of the edges (num_edges,) with each kept with probability `keep`, not rescaled.

        A mask on one array: rebuilding the sparse matrix costs four times as much.
        """
        return weight * (torch.rand(self.num_edges, generator=generator) < keep).to(weight)

    def matrix(self, weight: Tensor, check: bool = False) -> Tensor:
        """The symmetric matrix with these weights of the edges, CSR, (num_nodes, num_nodes); indices are shared."""
        values = torch.cat([weight, weight.index_select(0, self._by_item)])
        size = (self.num_nodes, self.num_nodes)
        return torch.sparse_csr_tensor(self._indptr, self._columns, values, size=size, check_invariants=check)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """left_u . right_i of every edge, (num_edges,), computed where there are edges only and without gathering rows."""
        num_users, num_edges = self.num_users, self.num_edges
        users_rows = torch.sparse_csr_tensor(
            self._indptr[: num_users + 1],
            self._columns[:num_edges],
            torch.zeros(num_edges).to(left),
            size=(num_users, self.num_nodes),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(users_rows, left[:num_users].contiguous(), right.T, beta=0.0).values()


class _Propagate(torch.autograd.Function):
    """A @ x for a symmetric A: its gradient is the same product, which autograd cannot know (and is 20 times slower at)."""

    @staticmethod
    def forward(ctx: Any, adjacency: Tensor, x: Tensor) -> Tensor:
        ctx.adjacency = adjacency
        return adjacency @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.adjacency @ gradients[0]


class _Smooth(torch.autograd.Function):
    """x + A x + ... + A^L x for a symmetric A by Horner's rule, y <- x + A y: one kernel a step, its own gradient."""

    @staticmethod
    def forward(ctx: Any, adjacency: Tensor, x: Tensor, num_layers: int) -> Tensor:
        ctx.adjacency, ctx.num_layers = adjacency, num_layers
        return _horner(adjacency, x, num_layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, _horner(ctx.adjacency, gradients[0].contiguous(), ctx.num_layers), None


def _horner(adjacency: Tensor, x: Tensor, num_layers: int) -> Tensor:
    memory = torch.empty_like(x), torch.empty_like(x)  # mapping new memory for every layer takes as long as the product
    y = x
    for layer in range(num_layers):
        y = torch.addmm(x, adjacency, y, out=memory[layer % 2])
    return y.clone() if y is x else y


class _PropagateWeighted(torch.autograd.Function):
    """A(w) @ x: the gradient of x is the same product again, that of an edge's weight two inner products."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, weight: Tensor, x: Tensor) -> Tensor:
        ctx.graph = graph
        ctx.save_for_backward(weight, x)
        return graph.matrix(weight) @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        (weight, x), gradient = ctx.saved_tensors, gradients[0].contiguous()
        along = ctx.graph.products(gradient, x) + ctx.graph.products(x, gradient)
        return None, along, ctx.graph.matrix(weight) @ gradient


class _EdgeProducts(torch.autograd.Function):
    """x_u . x_i of every edge: the dual of propagation, whose gradient is propagation with the gradient as weights."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, x: Tensor) -> Tensor:
        ctx.graph = graph
        ctx.save_for_backward(x)
        return graph.products(x, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, ctx.graph.matrix(gradients[0].contiguous()) @ x


def propagate(adjacency: Tensor, x: Tensor) -> Tensor:
    """One step of message passing over a symmetric graph: (num_nodes, dim) -> (num_nodes, dim)."""
    result: Tensor = _Propagate.apply(adjacency, x)  # type: ignore[no-untyped-call]  # torch does not type it
    return result


def smooth(adjacency: Tensor, x: Tensor, num_layers: int) -> Tensor:
    """Sum of layers 0 to `num_layers` of message passing over a symmetric graph: (num_nodes, dim) -> (num_nodes, dim)."""
    result: Tensor = _Smooth.apply(adjacency, x, num_layers)  # type: ignore[no-untyped-call]
    return result


def propagate_weighted(graph: Graph, weight: Tensor, x: Tensor) -> Tensor:
    """One step with weights of the edges (num_edges,) that have gradients too: (num_nodes, dim) -> (num_nodes, dim)."""
    result: Tensor = _PropagateWeighted.apply(graph, weight, x)  # type: ignore[no-untyped-call]
    return result


def edge_products(graph: Graph, x: Tensor) -> Tensor:
    """x_u . x_i of every edge: (num_nodes, dim) -> (num_edges,)."""
    result: Tensor = _EdgeProducts.apply(graph, x)  # type: ignore[no-untyped-call]
    return result
