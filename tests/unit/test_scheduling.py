"""How processes share the tests: pytest itself, on a few files."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CONFTEST = """
from tests.scheduling import RayApart

def pytest_xdist_make_scheduler(config, log):
    return RayApart(config, log)
"""


def test_a_test_that_ends_its_process_fails_alone_and_all_others_are_run_once(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for number in range(8):
        (tmp_path / f"test_{number}.py").write_text("def test_one(): pass\n\ndef test_two(): pass\n\ndef test_three(): pass\n")
    (tmp_path / "test_4.py").write_text(
        "import os\n\ndef test_one(): pass\n\ndef test_two(): os._exit(1)\n\ndef test_three(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--no-loadscope-reorder", "-p", "no:cacheprovider", "."]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120
    )
    assert "1 failed, 23 passed" in done.stdout, done.stdout + done.stderr
    assert "test_4.py::test_two" in done.stdout
