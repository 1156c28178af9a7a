"""What commands print of an answer."""

import io
import json
import shlex
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command

from pipelines.cli import app
from pipelines.config import PlatformConfig
from pipelines.summary import explanation_table, next_commands, ranking_table, side_by_side
from pipelines.terminal import error_line, make_console


def explained(direct: float, debias: float) -> list[str]:
    parts: dict[str, Any] = {
        "total_natural_indirect_effect": 1.5,
        "natural_direct_effect": direct,
        "total_effect": 1.5 + direct,
        "removed": debias * direct,
        "debiased_score": 1.5 + direct - debias * direct,
        "factual_rank": 3,
        "debiased_rank": 7,
    }
    answer = {"user_id": "u", "item_id": "i", "title": "T", "explanation": parts, "debias": debias, "already_seen": False}
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(explanation_table({**answer, "nearest_liked_items": []}))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO, see above


@pytest.mark.parametrize(
    ("direct", "debias", "values"),
    [
        (0.25, 0.4, ["1.50000", "+0.25000", "1.75000", "-0.10000", "1.65000"]),
        (-0.25, 1.0, ["1.50000", "-0.25000", "1.25000", "+0.25000", "1.50000"]),
        (0.25, 0.0, ["1.50000", "+0.25000", "1.75000", "+0.00000", "1.75000"]),
    ],
)
def test_an_explanation_is_a_sum_that_adds_up_with_the_signs_it_shows(direct: float, debias: float, values: list[str]) -> None:
    _, *rows, ranks = explained(direct, debias)
    assert [row.split()[-1] for row in rows] == values
    match, side, factual, removed, debiased = (float(value) for value in values)
    assert match + side == factual
    assert factual + removed == pytest.approx(debiased)
    assert [row for row in rows if row.startswith("= ")] == [rows[2], rows[4]]
    assert f"λ {debias:g}" in rows[3]
    assert ranks.split()[-2:] == ["3,", "7"]


def test_brackets_and_colons_of_titles_and_ids_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    titles = ["Roads [live]", "[untitled]", "AC [/]DC", "Kid A :fire:"]
    items = [
        {"rank": rank, "item_id": f"[b]{rank}", "title": title, "score": 1.0} for rank, title in enumerate(titles, start=1)
    ]
    answer = {"method": "personalised", "items": items, "factual": items}
    out = make_console()
    out.print(ranking_table(answer))
    out.print(side_by_side(answer, 1.0))
    out.print(error_line("'[raw]/a[/b].csv' is empty."))
    shown = capsys.readouterr().out
    for item in items:
        assert shown.count(item["item_id"]) == 1
        assert shown.count(item["title"]) == 3
    assert shown.endswith("error: '[raw]/a[/b].csv' is empty.\n")


@pytest.mark.parametrize("user_id", ["44", "anna smith", "-5", "--k", "x;touch y", "o'brien", 'a"b', "$(id)", "жанна\\n"])
def test_the_commands_to_type_next_ask_for_that_user(user_id: str) -> None:
    settings = PlatformConfig(storage_root="/my data/root")
    _, serve, curl, recommend, _ = (shlex.split(line) for line in next_commands(settings, user_id))
    assert serve[:4] == ["cllmr", "serve", "--storage", "/my data/root"]
    assert json.loads(curl[-1])["users"] == [user_id]
    _, name, *arguments = recommend
    command = get_command(app).get_command(None, name)  # type: ignore[attr-defined, arg-type]  # a group, which asks for no more
    given = command.make_context(name, arguments).params
    assert (given["user_ids"], given["storage"], given["compare"]) == ([user_id], "/my data/root", True)
