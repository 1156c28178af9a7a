"""Which of the processes that share the tests runs which file (`pytest -n`)."""

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class RayApart(LoadFileScheduling):
    """A file at a time for every process, those that start Ray for the first one; who is done with a kind helps with the other.

    Ray alone keeps two cores busy: tests of two of them take longer side by side than one after another.
    """

    def _assign_work_unit(self, node: WorkerController) -> None:
        has_ray = node is self.nodes[0]
        for file in self.workqueue:
            if _starts_ray(self.config.rootpath / file) is has_ray:
                self.workqueue.move_to_end(file, last=False)
                break
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        super()._reschedule(node)
        if self._pending_of(self.assigned_work[node]) < 2:  # a process runs its last test when it is told what comes after it
            super()._reschedule(node)

    def remove_node(self, node: WorkerController) -> str | None:
        """Takes a process out that has ended, and returns the test that ended it.

        xdist 3.8 would have others run that one again, which ends them too, and wait for ever for files that are done.
        """
        given = self.assigned_work.pop(node)
        left = {file: [test for test, done in tests.items() if not done] for file, tests in given.items()}
        undone = [(file, test) for file, tests in left.items() for test in tests]
        for file, test in undone[1:]:
            self.workqueue.setdefault(file, {})[test] = False
        for other in self.nodes:
            self._reschedule(other)
        return undone[0][1] if undone else None


@cache
def _starts_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text(encoding="utf-8")
