"""Small stages with the platform's real contract: what the local runner is tested with (the pipeline: ``fake_pipeline``)."""

import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from components.artifacts import Manifest, write_json
from components.errors import DataError
from components.progress import progress
from components.settings import StageConfig
from components.stages import Stage, run_stage

STAGES = {name: Stage(name, version=1) for name in ("ingest", "sideinfo", "spectrum", "train", "promote")}


class FakeConfig(StageConfig):
    """Settings of a fake stage."""

    text: str = "hello"
    number: int = 3
    behaviour: Literal["work", "refuse", "crash", "full disk", "wait", "die once"] = "work"
    flag: str = ""
    """A file: while it exists, ``die once`` has died already."""


class FakePlatform(BaseModel):
    """Settings of the fake pipeline; what the command line needs of the real ones."""

    storage_root: str = "nowhere"
    ingest: FakeConfig = FakeConfig()
    sideinfo: FakeConfig = FakeConfig()
    spectrum: FakeConfig = FakeConfig()
    train: FakeConfig = FakeConfig()
    promote: FakeConfig = FakeConfig()

    def stages(self) -> dict[str, StageConfig]:
        """Every stage's settings by name."""
        return {name: getattr(self, name) for name in STAGES}

    def fingerprint(self) -> str:
        """A name for the settings."""
        return "fake"


def run(stage: str, config: dict[str, Any], storage_root: str, **parents: str) -> Manifest:
    """Runs one fake stage; parents are paths of manifests."""
    settings = FakeConfig.parse(config, stage)

    def build(directory: Path) -> dict[str, Any]:
        behave(settings)
        with progress(stage, settings.number, "steps") as bar:
            for step in range(settings.number):
                bar.advance(loss=1.0 / (step + 1))
        write_json(directory / "out.json", {"stage": stage, "text": settings.text, "parents": sorted(parents)})
        if stage == "promote":
            champion = {"version": "1", "fingerprint": "f"}
            write_json(directory / "verdict.json", {"verdict": "promoted", "reasons": [], "champion": champion})
        return {"steps": settings.number}

    read = {name: Manifest.read(path) for name, path in parents.items()}
    return run_stage(STAGES[stage], settings, storage_root, read, build)


def behave(settings: FakeConfig) -> None:
    """Does what the settings ask."""
    match settings.behaviour:
        case "refuse":
            raise DataError("column 'rating' is missing; seen: user, item.", "Name it with --column rating=stars")
        case "crash":
            raise RuntimeError("the matrix fell over")
        case "full disk":
            raise OSError(28, "No space left on device")
        case "wait":
            Path(settings.flag).write_text(str(os.getpid()))
            time.sleep(600)
        case "die once" if not Path(settings.flag).exists():
            Path(settings.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
