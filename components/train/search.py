"""Coordinate search over grids: what tunes every model here, rivals and ours alike, with a number of fits that grows with the
sum of the grids' sizes and not with their product."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Settings = dict[str, Any]


def coordinate_search(
    start: Mapping[str, Any],
    grids: Mapping[str, Sequence[Any]],
    evaluate: Callable[[Settings], float],
    rounds: int = 2,
    others: Sequence[Mapping[str, Any]] = (),
) -> tuple[Settings, float, list[Settings]]:
    """Climbs one setting after the other along its ordered grid for as long as the value rises.

    Args:
        start: first settings; every value is on its grid.
        grids: setting -> allowed values in order; settings of one value are fixed.
        evaluate: larger is better; called once per distinct settings.
        rounds: passes over all settings at most; a pass that changes nothing ends the search.
        others: further starts, for settings that depend on each other so much that one climb ends where it began.

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

    def climbed(settings: Settings, name: str, direction: int) -> Settings:
        place = grids[name].index(settings[name]) + direction
        while 0 <= place < len(grids[name]):
            candidate = {**settings, name: grids[name][place]}
            if value_of(candidate) <= value_of(settings):
                break
            settings, place = candidate, place + direction
        return settings

    def best_from(start: Mapping[str, Any]) -> Settings:
        best = {name: start[name] for name in grids}
        value_of(best)  # the start is tried first, whatever the grids
        for _ in range(rounds):
            before = best
            for name in grids:
                up = climbed(best, name, 1)
                best = up if up != best else climbed(best, name, -1)  # where it rises upwards, the other side is left behind
            if best == before:
                break
        return best

    best = max([best_from(one) for one in (start, *others)], key=value_of)
    return best, value_of(best), log
