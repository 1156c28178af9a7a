"""Small data sets whose right answers are known, as folders: what ``--suite quick`` runs on."""

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np

from components.experiment.store import write_atomically

_TOPICS = {
    "gardening": "spade seeds compost roses greenhouse pruning soil lawn watering tulips",
    "astronomy": "telescope nebula galaxy lens orbit comet eclipse planets starlight tripod",
    "baking": "flour yeast oven sourdough pastry whisk cinnamon butter crust dough",
    "cycling": "saddle pedals chain helmet brakes handlebar tyres gears puncture derailleur",
    "chess": "rook bishop gambit endgame opening checkmate clock queen pawn tactics",
    "sailing": "mast rudder spinnaker harbour anchor hull knots tide regatta compass",
}


def write_blocks(folder: str | Path, users_per_block: int = 25, items_per_block: int = 24, seed: int = 0) -> Path:
    """Users of a block like most items of their block and few others; an item's text is made of the words of its topic.

    Per user 60 % of the liked items are training, a fifth each validation and test. Every file is replaced in one step by the
    same bytes, so that another run may read them meanwhile.
    """
    directory = Path(folder)
    rng = np.random.default_rng(seed)
    topics = list(_TOPICS)
    user_block = np.repeat(np.arange(len(topics)), users_per_block)
    item_block = np.repeat(np.arange(len(topics)), items_per_block)
    chance = np.where(user_block[:, None] == item_block[None, :], 0.5, 0.02)
    # a few items are known to everybody, the others to some: popularity is worth something
    likes = rng.random(chance.shape) < chance * rng.choice([0.7, 1.0, 1.5], len(item_block), p=[0.5, 0.35, 0.15])
    place = np.argsort(np.where(likes, rng.random(likes.shape), 2.0), axis=1).argsort(axis=1)
    share = (place + 0.5) / np.maximum(likes.sum(axis=1, keepdims=True), 1)
    for name, part in (("trn", share < 0.6), ("val", (share >= 0.6) & (share < 0.8)), ("tst", share >= 0.8)):
        row, col = np.nonzero(likes & part)
        write_atomically(directory / f"{name}.npz", partial(np.savez, row=row, col=col, shape=np.array(likes.shape)))
    lines = []
    for item, block in enumerate(item_block):
        words = rng.choice(_TOPICS[topics[block]].split(), 5, replace=False)
        fields = {"iid": item, "title": f"{topics[block]} {words[0]}", "description": f"<p>{' '.join(words[1:])}</p>"}
        lines.append(json.dumps(fields) + "\n")
    packed = gzip.compress("".join(lines).encode(), mtime=0)
    write_atomically(directory / "items.jsonl.gz", lambda file: file.write(packed))
    return directory
