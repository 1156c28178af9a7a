"""Draws the events of a run: bars on a terminal, one line per step elsewhere."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0
_OF_THE_BAR = frozenset({"event", "time", "stage", "done", "total", "unit"})


class Display(Protocol):
    """Shows the events of one run; a context manager."""

    def __enter__(self) -> "Display": ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, event: Mapping[str, Any]) -> None:
        """Draws one event."""

    def tick(self) -> None:
        """Called several times a second while the run goes on."""


def make_display(console: Console, stages: list[str]) -> Display:
    """Bars when the console is a terminal, plain lines otherwise."""
    return Bars(console, stages) if console.is_terminal else Lines(console)


def figures(event: Mapping[str, Any]) -> str:
    """What a progress event says beside its count: ``loss 0.412  recall@20 0.21``."""
    shown = {key: value for key, value in event.items() if key not in _OF_THE_BAR}
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())


def count(event: Mapping[str, Any]) -> str:
    """``12/30 epochs``, or ``12 fits`` where nobody knows how many there will be."""
    total = "" if event.get("total") is None else f"/{event['total']}"
    return f"{event.get('done', 0)}{total} {event.get('unit', '')}".strip()


def memory(megabytes: float) -> str:
    """MiB as the reader wants it: ``812 MiB``, ``1.4 GiB``."""
    return f"{megabytes:.0f} MiB" if megabytes < 1024 else f"{megabytes / 1024:.1f} GiB"


class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, 0.0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def tick(self) -> None:
        """Nothing moves in a plain log."""

    def show(self, event: Mapping[str, Any]) -> None:
        """Writes a line, progress at most every few seconds."""
        stage, now = event.get("stage", ""), time.monotonic()
        match event["event"]:
            case "stage started":
                text = "started"
            case "stage done":
                text = f"done in {event['seconds']:.1f} s, peak memory {memory(event['peak_memory_mb'])}"
            case "stage reused":
                text = f"reused, nothing changed (took {event['seconds']:.1f} s when it was built)"
            case "progress" if (event.get("done") or figures(event)) and (
                now - self._last >= SECONDS_BETWEEN_LINES or event["done"] == event["total"]
            ):
                text = f"{count(event)}  {figures(event)}".rstrip()
            case "manifest refused" | "artifact refused":
                text = f"warning: {event.get('reason', '')}; it is built again"
            case "warning":
                text = f"warning: {event.get('message', '')}"
            case _:
                return
        self._last = now
        self._console.print(f"{stage:<10} {text}", markup=False, highlight=False, soft_wrap=True)


class Bars:
    """One line per stage: state, bar with figures, seconds, peak memory."""

    def __init__(self, console: Console, stages: list[str]) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.fields[mark]} {task.description:<10}", table_column=Column(no_wrap=True, min_width=12)),
            BarColumn(bar_width=24, table_column=Column(no_wrap=True, min_width=24)),
            TextColumn("{task.fields[seconds]:>7}", table_column=Column(no_wrap=True, min_width=7)),
            # the only one that gives way: figures may be longer than the line
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            expand=True,
            console=console,
            refresh_per_second=8,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        for stage in stages:
            self._tasks[stage] = self._progress.add_task(
                stage, start=False, total=1, mark=" ", text="", seconds="", visible=True
            )

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        for stage in self._started:  # a stage that did not end is not left spinning in the scrollback
            self._progress.update(self._tasks[stage], mark="[red]✗[/red]")
            self._progress.stop_task(self._tasks[stage])
        self._progress.stop()

    def tick(self) -> None:
        """Moves the clocks of the stages at work."""
        for stage, started in self._started.items():
            self._progress.update(self._tasks[stage], seconds=f"{time.time() - started:.0f} s")

    def show(self, event: Mapping[str, Any]) -> None:
        """Updates the line of the event's stage."""
        task = self._tasks.get(event.get("stage", ""))
        if task is None:
            return
        stage = event["stage"]
        match event["event"]:
            case "stage started":
                self._started[stage] = event["time"]
                self._progress.start_task(task)
                self._progress.update(task, total=None, mark="[cyan]•[/cyan]", text="")
            case "progress":
                text = f"{count(event)}  {figures(event)}".rstrip()
                self._progress.update(task, total=event["total"], completed=event["done"], text=text)
                self.tick()  # an experiment has no other clock
            case "stage done":
                self._finish(stage, event["seconds"], f"peak {memory(event['peak_memory_mb'])}")
            case "stage reused":
                self._finish(stage, 0.0, "reused")
            case "stage failed":
                self._started.pop(stage, None)
                self._progress.update(task, mark="[red]✗[/red]", text="failed")
                self._progress.stop_task(task)
            case "manifest refused" | "artifact refused":
                self._say(f"{stage}: {event.get('reason', '')}; it is built again")
            case "warning":
                self._say(f"{stage}: {event.get('message', '')}")

    def _say(self, text: str) -> None:
        self._progress.console.print(Text(text, "yellow"))  # a path or a name in it may have brackets, which are no markup

    def _finish(self, stage: str, seconds: float, text: str) -> None:
        self._started.pop(stage, None)
        self._progress.start_task(self._tasks[stage])
        shown = f"{seconds:.1f} s" if seconds else ""
        self._progress.update(self._tasks[stage], total=1, completed=1, mark="[green]✓[/green]", text=text, seconds=shown)
        self._progress.stop_task(self._tasks[stage])
