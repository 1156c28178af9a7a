"""The memory that a piece of work took, measured on this process and a child."""

import subprocess
import sys
import threading

import numpy as np

from components.memory import peak_memory


def test_peak_memory_sees_what_was_allocated_for_a_while_and_by_children() -> None:
    with peak_memory(every=0.02) as peak:
        before = peak()
        block = np.ones(100 * 2**17)  # 100 MiB of float64
        with_block = peak()
        del block
        assert 80 < with_block - before < 200
        assert peak() == with_block, "a peak does not fall"
        child = subprocess.Popen(
            [sys.executable, "-c", "x = bytearray(b'x') * (250 * 2**20); print(flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        with_child = peak()
        child.communicate(b"\n")
    assert with_child - before > 200
    assert not [thread for thread in threading.enumerate() if thread.name == "peak-memory"]
