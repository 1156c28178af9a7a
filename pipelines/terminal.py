"""What commands say and how they end: results, progress, errors and exit codes, of what runs here or on a cluster.

What is heavy is imported when it is needed, so that the command line's help comes at once.
"""

import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from components.errors import ConfigError, UserError

if TYPE_CHECKING:
    from pipelines.cluster import Cluster
    from pipelines.config import PlatformConfig

WIDTH_OF_A_PIPE = 130  # of tables that are not printed on a terminal
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for a tab and the end of a line


class _Output(Console):
    """Shows the control characters of what it prints, which a terminal would obey: an id or a title may hold some.

    It goes on in silence when its reader has gone: the command's work, its files and its exit code are wanted all the same.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """See rich, which calls it for every text without a style: before it is measured, so that a table makes room."""
        return super().render_str(_CONTROL.sub(_escaped, text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See rich, which calls it for everything; its own movements of the cursor and styles are no text."""
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else _CONTROL.sub(_escaped, segment.text)
            yield segment._replace(text=shown)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())  # where what is left in its buffer goes as well


def make_console(stderr: bool = False) -> Console:
    """Results go to standard output, progress and errors to standard error; what is printed may hold anything of the user's, so
    no brackets are read as styles and no colons as emoji."""
    make = partial(_Output, stderr=stderr, highlight=False, markup=False, emoji=False)
    console = make()
    return console if console.is_terminal else make(width=WIDTH_OF_A_PIPE)


def _escaped(control: re.Match[str]) -> str:
    return f"\\x{ord(control[0]):02x}"


def error_line(text: str, begins: str = "error:") -> Text:
    """What went wrong, behind a word that is seen."""
    return Text.assemble((begins, "bold red"), f" {text}")


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """Ends the command with the right exit code, and one line instead of a traceback for what the user can mend."""
    errors = make_console(stderr=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `docker stop` and CI systems end it as Ctrl-C does
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # that takes SIGTERM for a crash; read at Ray's import
    try:
        yield
    except UserError as error:
        errors.print(error_line(f"{error.message} {error.hint}".rstrip()), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        errors.print(f"interrupted: {str(interrupt) or 'nothing is left running.'}", soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ends_that_are_asked_for() -> Iterator[SimpleQueue[int]]:
    """Within, Ctrl-C and SIGTERM are put into the queue and interrupt nothing: an interrupted print would be written twice.

    A queue, as a handler may run while its reader holds the lock of an Event. A signal that is ignored stays so.
    """
    asked: SimpleQueue[int] = SimpleQueue()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, lambda got, frame: asked.put(got))
    try:
        yield asked
    finally:
        for number in heard:
            signal.signal(number, before[number])


def write_result(path: Path | None, value: Any) -> None:
    """Writes a command's result as JSON where it is asked for."""
    if path is None:
        return
    with writing("--json", path):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def check_writable(option: str, path: Path) -> None:
    """Raises ConfigError for a file that cannot be written; makes its folder, and leaves no file that was not there."""
    if path.is_fifo():  # whoever reads it would take this for the end
        return
    with writing(option, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        was_there = path.exists()
        path.open("a").close()
        if not was_there:
            path.resolve().unlink()


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Names the option whose path cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror or error}.", "Choose another path.") from None


@contextmanager
def events_told(file: Path) -> Iterator[None]:
    """At its end, what stages that worked in this process have told, in the lines of a run; `file` holds it until then."""
    from components.progress import EVENTS_VARIABLE, events_of
    from pipelines.display import Lines

    before, os.environ[EVENTS_VARIABLE] = os.environ.get(EVENTS_VARIABLE), str(file)
    file.touch()
    try:
        yield
    finally:
        del os.environ[EVENTS_VARIABLE]
        if before is not None:
            os.environ[EVENTS_VARIABLE] = before
        with Lines(make_console(stderr=True)) as shown:
            for event in events_of(file.read_text(encoding="utf-8").splitlines()):
                shown.show(event)


@contextmanager
def crash_told(progress: Console) -> Iterator[None]:
    """Ends the command with the last lines of a stage that crashed, and where the whole log is."""
    from pipelines.local import StageCrashed

    try:
        yield
    except StageCrashed as crash:
        for line in crash.tail:
            progress.print(line, soft_wrap=True, style="dim")
        progress.print(error_line(f"stage {crash.stage} crashed. The whole log: {crash.log}"), soft_wrap=True)
        raise typer.Exit(1) from None


def connected(settings: "PlatformConfig") -> "Cluster":
    """The Kubeflow Pipelines of these settings; says so while it is failing or away and asked again."""
    from pipelines.cluster import Cluster

    errors = make_console(stderr=True)
    return Cluster(settings.cluster, lambda text: errors.print(text, soft_wrap=True))


@contextmanager
def ended_with_the_command(
    cluster: "Cluster", find: Callable[[], str | None], terminate: bool, write: Callable[[str | None, str | None], None]
) -> Iterator[None]:
    """On Ctrl-C or SIGTERM ends the run as well, if it is there and that is asked for, and says what became of it.

    Interrupted once more, or with KFP away, it says that the run may go on.

    Args:
        cluster: where the run is.
        find: its id; None: there is none.
        terminate: whether it is ended.
        write: told, after an interruption, the run's id and its state, each None where it is not known.
    """
    try:
        yield
    except KeyboardInterrupt:
        may_go_on = "the run may have begun and go on. See cllmr runs"
        run_id = state = None
        try:
            run_id = find()
            if run_id is None:
                became = "no run was started."
            elif not terminate:
                became = f"run {run_id} goes on. next: cllmr wait {run_id}"
            else:
                may_go_on = f"run {run_id} may go on. See {cluster.url(run_id)}"
                state = cluster.terminate(run_id)
                became = f"run {run_id} was told to end and is {state.lower()}."
        except KeyboardInterrupt:
            became = may_go_on
        except UserError as error:
            became = f"{error.message} {may_go_on}"
        try:
            write(run_id, state)
        except KeyboardInterrupt:  # a pipe whose reader has ended
            pass
        except UserError as error:  # what became of the run is told whatever becomes of the file
            became = f"{became} {error.message}"
        raise KeyboardInterrupt(became) from None


def watched(cluster: "Cluster", run_id: str, deadline: float) -> str:
    """Waits for a run and tells of its tasks as they go on, and of what failed; its state."""
    from pipelines.cluster import failures

    progress = make_console(stderr=True)
    run = cluster.wait(run_id, deadline, lambda task, state: progress.print(f"{task}: {state.lower()}", soft_wrap=True))
    for failure in failures(run):
        progress.print(error_line(f"{failure.task}: {failure.message.strip()}", "failed:"), soft_wrap=True)
    return str(run.state)


def exit_with(state: str, deadline: float, run_id: str) -> None:
    """Ends the command with the exit code of a run's state, and says it; 124 for one that has not ended."""
    from pipelines.cluster import FINISHED, SUCCEEDED

    errors = make_console(stderr=True)
    if state in SUCCEEDED:
        errors.print(f"run {run_id}: {state.lower()}", soft_wrap=True)
        return
    if state in FINISHED:
        errors.print(error_line(f"run {run_id}: {state.lower()}"), soft_wrap=True)
        raise typer.Exit(1)
    message = f"run {run_id} is {state.lower()} after {deadline:g} s. next: cllmr wait {run_id}"
    errors.print(error_line(message), soft_wrap=True)
    raise typer.Exit(124)
