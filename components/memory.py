"""How much memory a piece of work took, its children's included."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def peak_memory(every: float = 1.0) -> Iterator[Callable[[], float]]:
    """Watches this process and its children; the yielded function gives the largest sum seen, in MiB.

    Proportional set size, so that pages shared between processes count once; sampled every `every` seconds, less often where
    that would take more than a fiftieth of a core: the kernel looks at every page.
    """
    peak, stop, process = 0.0, threading.Event(), psutil.Process()

    def sample() -> None:
        nonlocal peak
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                total += member.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # ended between the listing and the reading
        peak = max(peak, total / 2**20)

    def watch() -> None:
        took = 0.0
        while not stop.wait(max(every, 50 * took)):
            start = time.thread_time()
            sample()
            took = time.thread_time() - start

    def result() -> float:
        sample()
        return round(peak, 1)

    watcher = threading.Thread(target=watch, daemon=True, name="peak-memory")
    watcher.start()
    try:
        yield result
    finally:
        stop.set()
        watcher.join()
