"""What attacks in item texts gain, with and without the guard, with and without debiasing: tables in Markdown.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.redteam --seeds 3

World, attacks and the gullible LLM are those of tests/redteam.py. The LLM obeys everything: a worst case, and no measurement of
a real one.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from components.train.config import EffectName
from tests.redteam import (
    TOPICS,
    USERS_OF_CROWD,
    USERS_PER_TOPIC,
    WRITERS,
    Embedder,
    Lift,
    Trial,
    World,
    corpus,
    lift,
    make_world,
)

EFFECTS: tuple[EffectName, ...] = ("counterfactual_clicks", "counterfactual_log")
SCORES = ("factual", *EFFECTS)
GROUPS: dict[str, Callable[[World], Iterable[int]]] = {
    "attacked, guard knows it": lambda world: world.attacked_by("removes"),
    "attacked, guard misses it": lambda world: world.attacked_by("misses"),
    "attacked by a description": lambda world: world.attacked_by("leaves"),
    "not attacked": lambda world: world.bystanders,
}
TRICKS = tuple(dict.fromkeys(attack.trick for attack in corpus()))
Lifts = dict[tuple[str, bool, str, str], Lift]
"""By writer, guard, score and group or trick."""


def measured(seed: int, embed: Embedder) -> Lifts:
    """All lifts in the world of that seed."""
    world = make_world(seed)
    groups = {name: list(chosen(world)) for name, chosen in GROUPS.items()}
    groups |= {trick: [item for item, attack in world.attacks.items() if attack.trick == trick] for trick in TRICKS}
    found: Lifts = {}
    for writer in WRITERS:
        with tempfile.TemporaryDirectory() as directory:
            trial = Trial(writer, world, embed, Path(directory))
            for guarded in (False, True):
                for effect in EFFECTS:
                    clean, attacked = trial.run(guarded, effect)
                    for name, items in groups.items():
                        for score, column in (("factual", "factual"), ("debiased", effect)):
                            found[writer, guarded, column, name] = lift(clean.places[score], attacked.places[score], items)
    return found


def cell(lifts: list[Lift]) -> str:
    """Mean and standard deviation over seeds of the places, and the shares of top tens in percent."""
    rank, before, after = np.array(lifts).T
    spread = rank.std(ddof=1) if len(rank) > 1 else 0.0
    return f"{rank.mean():+.1f} ± {spread:.1f}; {100 * before.mean():.1f} → {100 * after.mean():.1f} %"


def head(*names: str) -> str:
    """First two lines of a table."""
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def main(seeds: Annotated[int, typer.Option(help="Worlds, from seed 0 on.")] = 3) -> None:
    """Measures and prints."""
    embed = Embedder()
    runs = [measured(seed, embed) for seed in range(seeds)]
    num_users = USERS_OF_CROWD + USERS_PER_TOPIC * (len(TOPICS) - 1)
    typer.echo(f"{num_users} users, {len(make_world(0).new)} items, {len(corpus())} attacks, {seeds} seeds\n")
    typer.echo(head("profiles by", "guard", "items", "λ = 0", *(f"λ = 1, {effect.replace('_', ' ')}" for effect in EFFECTS)))
    for writer in WRITERS:
        for guarded in (False, True):
            for name in GROUPS:
                cells = [cell([run[writer, guarded, score, name] for run in runs]) for score in SCORES]
                typer.echo(f"| {writer} | {'with' if guarded else 'without'} | {name} | {' | '.join(cells)} |")
    typer.echo("\n" + head("trick, λ = 0", "metadata, no guard", "metadata, guard", "LLM, no guard", "LLM, guard"))
    for trick in TRICKS:
        cells = [
            cell([run[writer, guarded, "factual", trick] for run in runs]) for writer in WRITERS for guarded in (False, True)
        ]
        typer.echo(f"| {trick} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
