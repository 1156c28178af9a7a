"""Backbones: collaborative representations of users and items from the interaction graph.

A new backbone is one file here, and its name that of the file: settings, the harness and its command line know it from then on.
It says how node representations come from an ID table, and inherits everything else. One step of propagation without the
nodes themselves, and its tests::

    # components/cllmr/backbones/neighbours.py
    '''One step of propagation: a node is the sum of its neighbours.'''

    import torch
    from torch import Tensor

    from components.cllmr.backbones.base import Backbone
    from components.cllmr.graph import propagate


    class Neighbours(Backbone):
        def nodes(self, embedding: Tensor, generator: torch.Generator | None) -> Tensor:
            return propagate(self.adjacency(generator), embedding)

    # tests/contract/test_backbones.py
    class TestNeighbours(BackboneContract):
        name = "neighbours"

Then ``cllmr experiment --dataset DIR --backbone neighbours`` compares it with the baselines.
"""

from components.cllmr.backbones.base import Backbone
from components.cllmr.registry import classes

BACKBONES: dict[str, type[Backbone]] = classes("backbones", Backbone)

__all__ = ["BACKBONES", "Backbone"]
