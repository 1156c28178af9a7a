"""Losses: ranking (BPR, sampled softmax), and contrast of representations (InfoNCE).

All softmax losses are one function, `mean_log_sum_exp`, which never holds more than a block of the logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CACHED = 1 << 18
"""Logits computed at once on a CPU: 1 MB of them stays in the cache, and out of freshly mapped memory."""
_ON_DEVICE = 1 << 26
"""Logits computed at once elsewhere: few large kernels."""


class _MeanLogSumExp(torch.autograd.Function):
    """Loss and gradients in one pass over blocks of rows: with the mean, a row's gradient needs nothing from outside."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, queries: Tensor, candidates: Tensor, left_out: Tensor) -> Tensor:
        num_rows, num_candidates = len(queries), len(candidates)
        block = max(64, (_CACHED if queries.device.type == "cpu" else _ON_DEVICE) // num_candidates)
        starts = torch.arange(0, num_rows + block, block, device=left_out.device)
        bounds = torch.searchsorted(left_out[0].contiguous(), starts).tolist()
        total = first.new_zeros(())
        of_first, of_queries, of_candidates = torch.empty_like(first), torch.empty_like(queries), torch.zeros_like(candidates)
        logits = queries.new_empty(min(block, num_rows), num_candidates)
        for number, start in enumerate(range(0, num_rows, block)):
            rows = slice(start, min(start + block, num_rows))
            found = torch.mm(queries[rows], candidates.T, out=logits[: rows.stop - start])
            row, column = left_out[:, bounds[number] : bounds[number + 1]]
            found[row - start, column] = -torch.inf
            peak = torch.maximum(found.amax(dim=1), first[rows]).clamp_min(torch.finfo(first.dtype).min)
            share = found.sub_(peak[:, None]).exp_()
            first_share = (first[rows] - peak).exp()
            mass = share.sum(dim=1) + first_share
            total += (mass.log() + peak).sum()
            share.div_(mass[:, None])
            of_first[rows] = first_share / mass
            of_queries[rows] = share @ candidates
            of_candidates.addmm_(share.T, queries[rows])
        ctx.save_for_backward(of_first, of_queries, of_candidates)
        ctx.num_rows = num_rows
        return total / num_rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        scale = gradients[0] / ctx.num_rows
        of_first, of_queries, of_candidates = ctx.saved_tensors
        return of_first * scale, of_queries * scale, of_candidates * scale, None


def mean_log_sum_exp(first: Tensor, queries: Tensor, candidates: Tensor, left_out: Tensor) -> Tensor:
    """Mean over rows r of log(exp(first_r) + sum over candidates c of exp(queries_r . c)), a scalar.

    Args:
        first: one more logit of each row, (num_rows,); -inf for none.
        queries: (num_rows, dim).
        candidates: shared by all rows, (num_candidates, dim).
        left_out: (row, candidate) pairs that do not count, (2, num_pairs) int64, rows ascending. Indices instead of a mask:
            there are few of them, and a dense mask would be as large as the logits.
    """
    result: Tensor = _MeanLogSumExp.apply(first, queries, candidates, left_out)  # type: ignore[no-untyped-call]
    return result


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking, mean of softplus(negative - positive): (batch,) x 2 -> scalar."""
    return functional.softplus(negative - positive).mean()


def sampled_softmax(positive: Tensor, users: Tensor, negatives: Tensor, false_negatives: Tensor) -> Tensor:
    """Cross-entropy of the true item against shared sampled ones: the scale of the scores is their 1/τ.

    Args:
        positive: score of each pair, (batch,).
        users: factors of each pair's user, (batch, dim).
        negatives: factors of the shared negatives, (num_negatives, dim); scores are inner products.
        false_negatives: (pair, negative) where the user has interacted with the negative, left out of the sum,
            (2, num_false_negatives) int64, pairs ascending.
    """
    return mean_log_sum_exp(positive, users, negatives, false_negatives) - positive.mean()


def info_nce(anchors: Tensor, targets: Tensor, temperature: float, own: Tensor | None = None) -> Tensor:
    """Every anchor must find its own target among all of them, by cosine (E9), a scalar.

    Args:
        anchors: (num_anchors, dim).
        targets: (num_targets, dim).
        own: row of each anchor's target, (num_anchors,) int64; the same row where not given.
    """
    rows = torch.arange(len(anchors), device=anchors.device)
    own = rows if own is None else own
    anchors, targets = functional.normalize(anchors, dim=1) / temperature, functional.normalize(targets, dim=1)
    return sampled_softmax((anchors * targets.index_select(0, own)).sum(dim=1), anchors, targets, torch.stack([rows, own]))
