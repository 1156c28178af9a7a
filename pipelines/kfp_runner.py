"""KFP's local runner as a process: ``python -m pipelines.kfp_runner PIPELINE.yaml '{"argument": value}'``.

KFP's outputs are written beside the pipeline file. Exit code 1 when a task failed. The process leads a process group and ends
it when its standard input ends: whatever becomes of the parent that holds the other end, no task is left behind.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path


def end_group_with_parent() -> None:
    """Waits for the end of standard input, then ends the process group that this process leads."""
    os.read(sys.stdin.fileno(), 1)  # returns when the parent is gone, however it went
    os.killpg(os.getpid(), signal.SIGTERM)


def main(pipeline: Path, arguments: dict[str, str]) -> int:
    """Runs the compiled pipeline task by task; the exit code."""
    from kfp import components, local

    threading.Thread(target=end_group_with_parent, daemon=True, name="end-with-parent").start()
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(pipeline.parent / "kfp"),
        workspace_root=str(pipeline.parent / "workspace"),
    )
    try:
        components.load_component_from_file(str(pipeline))(**arguments)
    except RuntimeError as error:  # how kfp.local says that a task failed; the task's own traceback stands above
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
