"""What several of the unit tests want."""

from pathlib import Path

import pytest

from components import tracking


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow to copy: it takes seconds to create its tables, and once is enough."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking._connect(f"sqlite:///{path}").search_registered_models()
    return path
