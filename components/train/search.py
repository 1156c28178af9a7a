"""Coordinate search over grids: what tunes every model here, rivals and ours alike, with a number of fits that grows with the
sum of the grids' sizes and not with their product."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Settings = dict[str, Any]


def coordinate_search(
    start: Mapping[str, Any], grids: Mapping[str, Sequence[Any]], evaluate: Callable[[Settings], float], rounds: int = 2
) -> tuple[Settings, float, list[Settings]]:
    """Climbs one setting after the other along its ordered grid for as long as the value rises.

    Args:
        start: first settings; every value is on its grid.
        grids: setting -> allowed values in order; settings of one value are fixed.
        evaluate: larger is better; called once per distinct settings.
        rounds: passes over all settings at most; a pass that changes nothing ends the search.

    Returns:
        The best settings, their value, and everything tried as ``{**settings, "value": value}`` in the order tried.
    """
    tried: dict[tuple[Any, ...], float] = {}
    log: list[Settings] = []

    def value_of(settings: Settings) -> float:
        key = tuple(settings[name] for name in grids)
        if key not in tried:
            tried[key] = evaluate(settings)
            log.append({**settings, "value": round(tried[key], 6)})
        return tried[key]

    best = {name: start[name] for name in grids}
    best_value = value_of(best)
    for _ in range(rounds):
        before = dict(best)
        for name, grid in grids.items():
            place = grid.index(best[name])
            for direction in (1, -1):
                neighbour = place + direction
                moved = False
                while 0 <= neighbour < len(grid):
                    candidate = {**best, name: grid[neighbour]}
                    value = value_of(candidate)
                    if value <= best_value:
                        break
                    best, best_value, moved = candidate, value, True
                    neighbour += direction
                if moved:
                    break  # the other side was left behind
        if best == before:
            break
    return best, best_value, log
