"""Coordinate search finds the top of a hill, asks nothing twice and says what it tried."""

from components.train.search import coordinate_search

GRIDS = {"x": (1, 2, 3, 4, 5, 6), "y": (0, 10, 20, 30)}


def hill(settings: dict) -> float:
    return -((settings["x"] - 5) ** 2) - ((settings["y"] - 10) / 10) ** 2


def test_it_climbs_to_the_top_from_either_side() -> None:
    for start in ({"x": 1, "y": 30}, {"x": 6, "y": 0}, {"x": 3, "y": 10}):
        best, value, _ = coordinate_search(start, GRIDS, hill)
        assert best == {"x": 5, "y": 10}
        assert value == 0


def test_nothing_is_asked_twice_and_everything_is_logged() -> None:
    asked = []
    _, _, log = coordinate_search(
        {"x": 1, "y": 30}, GRIDS, lambda settings: asked.append(dict(settings)) or hill(settings), rounds=5
    )
    assert len(asked) == len({tuple(one.items()) for one in asked}) == len(log)
    assert all(entry["value"] == hill(entry) for entry in log)


def test_a_flat_function_keeps_the_start() -> None:
    assert coordinate_search({"x": 3, "y": 0}, GRIDS, lambda settings: 1.0)[0] == {"x": 3, "y": 0}
