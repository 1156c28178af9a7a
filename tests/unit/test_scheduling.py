"""How processes share the tests: pytest itself, on a few files."""

import subprocess
import sys
from pathlib import Path

from tests import REPOSITORY

CONFTEST = """
from tests.scheduling import RayApart

def pytest_xdist_make_scheduler(config, log):
    return RayApart(config, log)
"""


def shared_by_two(folder: Path) -> str:
    """What pytest says of the tests in a folder."""
    (folder / "conftest.py").write_text(CONFTEST)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--no-loadscope-reorder", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def test_a_test_that_ends_its_process_fails_alone_and_all_others_are_run_once(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"test_{number}.py").write_text("def test_one(): pass\n\ndef test_two(): pass\n\ndef test_three(): pass\n")
    (tmp_path / "test_4.py").write_text(
        "import os\n\ndef test_one(): pass\n\ndef test_two(): os._exit(1)\n\ndef test_three(): pass\n"
    )
    told = shared_by_two(tmp_path)
    assert "1 failed, 23 passed" in told, told
    assert "test_4.py::test_two" in told


def test_files_that_start_ray_are_one_process_and_the_others_the_other_one(tmp_path: Path) -> None:
    """The first file of each is given before any test has run."""
    for number in range(4):
        ray = "pytestmark = pytest.mark.ray\n" if number > 1 else ""
        body = (
            f"import os, pytest\n{ray}\ndef test_one():\n    open(os.environ['PYTEST_XDIST_WORKER'], 'a').write('{number}')\n"
        )
        (tmp_path / f"test_{number}.py").write_text(body + "\ndef test_two(): pass\n\ndef test_three(): pass\n")
    told = shared_by_two(tmp_path)
    assert "12 passed" in told, told
    first = {path.read_text()[0] for path in tmp_path.glob("gw*")}
    assert first == {"0", "2"}, "in the order of their names they would be 0 and 1"
