"""Validation while training: full ranking of a share of the users, as sums that can be added over workers."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from components.cllmr.model import CLLMR

BLOCK = 1024  # users scored at once


@torch.no_grad()
def validation_sums(model: CLLMR, train: sp.csr_array, held_out: sp.csr_array, rank: int, world_size: int) -> Tensor:
    """Sums over this rank's users of Recall@20 and NDCG@10 of the factual score, and the number of users: (3,) float64.

    Protocol: all items ranked, training items masked, users without held-out items skipped.
    """
    representations = model.representations()
    item_matrix = representations.mediator.items * representations.item_gate[:, None]
    users = np.flatnonzero(np.diff(held_out.indptr) > 0)[rank::world_size]
    sums = torch.zeros(3, dtype=torch.float64)
    discount = 1.0 / np.log2(np.arange(2, 12))
    for start in range(0, len(users), BLOCK):
        block = users[start : start + BLOCK]
        scores = representations.mediator.users[torch.from_numpy(block)] @ item_matrix.T  # (block, num_items)
        seen = train[block].tocoo()
        scores[
            torch.from_numpy(seen.coords[0].astype(np.int64)), torch.from_numpy(seen.coords[1].astype(np.int64))
        ] = -torch.inf
        top = scores.topk(min(20, scores.shape[1]), dim=1).indices.numpy()
        relevant = held_out[block].toarray()
        hits = np.take_along_axis(relevant, top, axis=1)  # (block, 20)
        size = relevant.sum(axis=1)
        ideal = np.cumsum(discount)[np.minimum(size, 10).astype(int) - 1]
        dcg = (hits[:, :10] * discount[: hits[:, :10].shape[1]]).sum(axis=1)
        sums += torch.tensor([(hits.sum(axis=1) / size).sum(), (dcg / ideal).sum(), len(block)], dtype=torch.float64)
    return sums
