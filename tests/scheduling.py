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


@cache
def _starts_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text(encoding="utf-8")
