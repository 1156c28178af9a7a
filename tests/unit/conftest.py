"""What several of the unit tests want."""

import shutil
from pathlib import Path

import pytest

from components.mlflow_client import connect


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow to copy: it takes seconds to create its tables, and once is enough."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    """Address of such a copy."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"
