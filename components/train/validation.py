"""Validation while training: full ranking of a share of the users, as sums that can be added over workers."""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

from components.cllmr.model import CLLMR
from components.evaluate.metrics import among

BLOCK = 256  # users scored at once: their scores stay in the cache between product, mask and top-k
K = 20


@torch.no_grad()
def validation_sums(model: CLLMR, train: sp.csr_array, held_out: sp.csr_array, rank: int, world_size: int) -> Tensor:
    """Sums over this rank's users of Recall@20 and NDCG@10 of the factual score, and the number of users: (3,) float64.

    Protocol: all items ranked, training items masked, users without held-out items skipped.
    """
    representations = model.representations()
    item_matrix = representations.mediator.items * representations.item_gate[:, None]
    users = np.flatnonzero(np.diff(held_out.indptr) > 0)[rank::world_size]
    top = top_unseen(representations.mediator.users[torch.from_numpy(users)], item_matrix, train[users], K)
    relevant = held_out[users]
    hits = among(relevant, top)
    size = np.diff(relevant.indptr)
    discount = 1.0 / np.log2(np.arange(2, 12))
    dcg = (hits[:, :10] * discount[: hits[:, :10].shape[1]]).sum(axis=1)
    ideal = np.cumsum(discount)[np.minimum(size, 10) - 1]
    return torch.tensor([(hits.sum(axis=1) / size).sum(), (dcg / ideal).sum(), len(users)], dtype=torch.float64)


def top_unseen(users: Tensor, items: Tensor, seen: sp.csr_array, k: int) -> npt.NDArray[np.int64]:
    """Items with the k largest inner products that each user has not seen, best first, (num_users, at most k).

    Product, mask and top-k are done block by block in one piece of memory: a new one for each block would spend more time on
    mapping its pages than on the product.

    Args:
        users: factors of the users, (num_users, dim).
        items: factors of all items, (num_items, dim).
        seen: interactions of these users, (num_users, num_items).
    """
    k = min(k, len(items))
    memory = torch.empty(min(BLOCK, len(users)), len(items))
    top = torch.empty(len(users), k, dtype=torch.int64)
    row, column = (torch.from_numpy(axis.astype(np.int64)) for axis in seen.tocoo().coords)
    for start in range(0, len(users), BLOCK):
        block = users[start : start + BLOCK]
        scores = torch.mm(block, items.T, out=memory[: len(block)])
        interactions = slice(int(seen.indptr[start]), int(seen.indptr[start + len(block)]))
        scores[row[interactions] - start, column[interactions]] = -torch.inf
        top[start : start + BLOCK] = scores.topk(k, dim=1).indices
    return top.numpy()
