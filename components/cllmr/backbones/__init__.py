"""Backbones: collaborative representations of users and items from the interaction graph.

A new backbone is a file here, a line in `BACKBONES` and a word in `ModelConfig.backbone`. It says how node representations
come from an ID table, and inherits everything else. One step of propagation without the nodes themselves:

>>> import numpy as np, torch
>>> from components.cllmr.backbones.base import Backbone
>>> from components.cllmr.config import ModelConfig
>>> from components.cllmr.graph import Graph, propagate
>>> class Neighbours(Backbone):
...     def nodes(self, embedding, generator):
...         return propagate(self.graph.adjacency, embedding)
>>> graph = Graph(np.array([0, 1]), np.array([0, 0]), num_users=2, num_items=1)  # both users chose the one item
>>> users, items = Neighbours(graph, ModelConfig(embedding_dim=4))()
>>> users.shape, items.shape, torch.equal(users[0], users[1])
(torch.Size([2, 4]), torch.Size([1, 4]), True)

Its tests are a class with one line, see tests/contract/backbone_contract.py.
"""

from components.cllmr.backbones.autocf import AutoCF
from components.cllmr.backbones.base import Backbone
from components.cllmr.backbones.dccf import DCCF
from components.cllmr.backbones.gccf import GCCF
from components.cllmr.backbones.lightgcn import LightGCN
from components.cllmr.backbones.mf import MatrixFactorisation
from components.cllmr.backbones.sgl import SGL
from components.cllmr.backbones.simgcl import SimGCL

BACKBONES: dict[str, type[Backbone]] = {
    "mf": MatrixFactorisation,
    "lightgcn": LightGCN,
    "gccf": GCCF,
    "sgl": SGL,
    "simgcl": SimGCL,
    "dccf": DCCF,
    "autocf": AutoCF,
}

__all__ = ["BACKBONES", "Backbone"]
