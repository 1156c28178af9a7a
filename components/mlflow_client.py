"""The connection to MLflow that tracking and the model registry share: a quiet client, and what its failures are called.

MLflow is imported by the functions that need it: that takes seconds, and most of the platform never does.
"""

import logging
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.errors import first_line

_MAKING = ".cllmr-makes-mlflow-"
"""Begins the name of the folder beside a database in which it is made: nobody else's is removed, whatever lies there."""
_BROKEN_OFF_SECONDS = 3600.0
"""Since anything was written into such a folder: making a database takes seconds."""


def connect(tracking_uri: str) -> Any:
    """An MLflow client for tracking and registry that is quiet, sends no telemetry and fails within seconds.

    Raises the errors of `tracker_errors`, and ImportError where MLflow is not installed.
    """
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "GIT_PYTHON_REFRESH": "quiet",  # MLflow imports git, which warns where there is no git command
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own 7 take four minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    }
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    _probe(tracking_uri)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _probe(tracking_uri: str) -> None:
    """Asks a database once whether it answers: MLflow itself would ask ten times, for two minutes."""
    if tracking_uri.startswith(("http://", "https://", "databricks")):
        return
    if (path := sqlite_file(tracking_uri)) is not None:
        _remove_broken_off(path.parent)
        if not path.exists():
            _make_database(path)
    from sqlalchemy import create_engine, inspect

    engine = create_engine(tracking_uri)
    try:
        inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _make_database(path: Path) -> None:
    """Puts a database with all of MLflow's tables at `path`, in one step: it cannot go on with one whose making was broken off.

    Making it takes seconds. Of several processes that do so at once the first one's stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=_MAKING) as folder:
        made = Path(folder) / path.name
        _make_tables(f"sqlite:///{made}")
        try:
            os.link(made, path)  # a renamed one would take the place of another process's, and of what is registered there
        except FileExistsError:
            return
        except OSError:  # there are no links in this file system
            made.rename(path)


def _remove_broken_off(folder: Path) -> None:
    """Removes what processes have left that were killed while they made a database."""
    for left in folder.glob(f"{_MAKING}*"):
        with suppress(OSError):  # another process may be as quick; what is another user's stays
            if time.time() - left.stat().st_mtime > _BROKEN_OFF_SECONDS:
                shutil.rmtree(left)


def _make_tables(uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    client.search_registered_models(max_results=1)  # these have tables of their own


def is_broken_off(error: Exception) -> bool:
    """Whether a database is what an interruption has left in the middle of making or changing its tables."""
    return re.search(r"OperationalError\) .*(already exists|duplicate column)", first_line(error)) is not None


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file of an SQLite URI, None for any other."""
    file, _, _ = tracking_uri.removeprefix("sqlite:///").partition("?")
    return Path(file) if tracking_uri.startswith("sqlite:///") else None


def tracker_errors() -> tuple[type[Exception], ...]:
    """What goes wrong when MLflow or what lies behind it does; HTTP errors are OSErrors."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, CommandError, OSError)


def reason(error: Exception) -> str:
    """The first line of an error, fit to be shown."""
    return without_password(first_line(error))


def without_password(uri: str) -> str:
    """A URI fit to be shown."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def safe_name(name: str) -> str:
    """A name MLflow takes: '@' is written as '_at_'."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
