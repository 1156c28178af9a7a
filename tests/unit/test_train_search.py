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


def test_a_ridge_that_one_climb_cannot_leave_is_left_from_another_start() -> None:
    def ridge(settings: dict) -> float:
        """Only both at once lead from (2, 10) to (5, 30)."""
        return {(2, 10): 1.0, (5, 30): 3.0, (5, 20): 2.0}.get((settings["x"], settings["y"]), 0.0)

    near, far = {"x": 2, "y": 10}, {"x": 5, "y": 20}
    assert coordinate_search(near, GRIDS, ridge)[0] == near
    asked = []
    best, value, log = coordinate_search(
        near, GRIDS, lambda settings: asked.append(dict(settings)) or ridge(settings), others=[far, near]
    )
    assert (best, value) == ({"x": 5, "y": 30}, 3.0)
    assert len(asked) == len({tuple(one.items()) for one in asked}) == len(log)
    assert coordinate_search(far, GRIDS, ridge, others=[near])[0] == best
