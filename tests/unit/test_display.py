"""How events are shown, on a terminal and elsewhere."""

import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from rich.color import ColorSystem
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines import display
from pipelines.display import Bars, Lines, make_display, memory
from pipelines.terminal import error_line, make_console

EVENTS: list[dict[str, Any]] = [
    {"event": "stage reused", "time": 1.0, "stage": "ingest", "fingerprint": "f", "seconds": 2.5},
    {"event": "stage started", "time": 2.0, "stage": "train", "fingerprint": "g"},
    {"event": "progress", "time": 3.0, "stage": "train", "done": 0, "total": 20, "unit": "epochs"},
    {"event": "progress", "time": 3.0, "stage": "train", "done": 20, "total": 20, "unit": "epochs", "loss": 0.412345},
    {"event": "stage done", "time": 4.0, "stage": "train", "fingerprint": "g", "seconds": 61.04, "peak_memory_mb": 1536.0},
    {"event": "artifact refused", "time": 4.0, "stage": "train", "reason": "sha256 differs"},
    {"event": "something of the stage's own", "time": 4.0},
]


def shown(terminal: bool, events: Sequence[Mapping[str, Any]] = EVENTS) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with make_display(console, ["ingest", "train"]) as made:
        assert isinstance(made, Bars if terminal else Lines)
        for event in events:
            made.show(event)
            made.tick()
    return console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO, see above


def test_without_a_terminal_every_step_is_one_plain_line() -> None:
    assert shown(terminal=False).splitlines() == [
        "ingest     reused, nothing changed (took 2.5 s when it was built)",
        "train      started",
        "train      20/20 epochs  loss 0.4123",
        "train      done in 61.0 s, peak memory 1.5 GiB",
        "train      warning: sha256 differs; it is built again",
    ]


def test_without_a_terminal_long_work_is_told_before_its_first_part_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), width=120)
    event = {"event": "progress", "stage": "experiment", "done": 0, "total": 2, "unit": "units"}
    with Lines(console) as lines:
        lines.show(event)  # nothing to say yet
        lines.show({**event, "model": "CLLMR", "epoch": 3})
    assert console.file.getvalue() == "experiment 0/2 units  model CLLMR  epoch 3\n"  # type: ignore[attr-defined]  # a StringIO


def test_a_terminal_obeys_no_control_characters_of_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    console = make_console()
    console.file, console._force_terminal, console._color_system = io.StringIO(), True, ColorSystem.STANDARD
    table = Table("item", "title")
    table.add_row("\x1b]0;owned\x07", Text("a\x9b2Jb and so on", "bold"))
    console.print(table)
    console.print(error_line("item '\x1b[2J\x7f' is unknown"), soft_wrap=True)
    with make_display(console, ["train"]) as made:
        made.show({"event": "warning", "stage": "train", "message": "\x1bc of Hawaiʻi"})
    text = console.file.getvalue()
    for shown in (r"\x1b]0;owned\x07", r"a\x9b2Jb", r"item '\x1b[2J\x7f' is unknown", r"train: \x1bc of Hawaiʻi"):
        assert shown in text
    assert "\x1b[1;31merror:\x1b[0m" in text, "the command's own styles are"
    for obeyed in ("\x1b]", "\x1b[2J", "\x1bc", "\x9b", "\x7f"):
        assert obeyed not in text


def test_on_a_terminal_there_is_a_line_per_stage_with_seconds_and_memory() -> None:
    final = {stage: [line for line in shown(terminal=True).splitlines() if stage in line][-1] for stage in ("ingest", "train")}
    assert "reused" in final["ingest"]
    assert "61.0 s peak 1.5 GiB" in final["train"]


@pytest.mark.parametrize("terminal", [False, True])
def test_brackets_in_what_is_told_are_no_markup(terminal: bool) -> None:
    about, names = {"time": 1.0, "stage": "train"}, "'/data/[raw]/a[/b].csv'"
    told = shown(
        terminal,
        [
            {"event": "warning", "message": f"{names} has blanks", **about},
            {"event": "artifact refused", "reason": f"{names} differs", **about},
            {"event": "progress", "done": 1, "total": 1, "unit": "fits", "data": names, **about},
        ],
    )
    for text in (f"{names} has blanks\n", f"{names} differs; it is built again\n", f"1/1 fits  data {names}"):
        assert text in told


def test_figures_longer_than_the_line_leave_the_stage_and_its_bar_whole() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    event = {"event": "progress", "stage": "experiment", "done": 3, "total": 4, "unit": "units"}
    with make_display(console, ["experiment"]) as made:
        made.show({"event": "stage started", "stage": "experiment", "time": time.time() - 61})
        made.show({**event, "model": "CLLMR, seed 2023", **{f"part.{number}.loss": 0.5 for number in range(9)}})
    last = [line for line in console.file.getvalue().splitlines() if "experiment" in line][-1]  # type: ignore[attr-defined]
    assert "━" * 10 in last
    assert "61 s 3/4 units  model" in last


def test_memory_is_written_in_the_unit_that_reads_best() -> None:
    assert [memory(812.4), memory(1024.0)] == ["812 MiB", "1.0 GiB"]
