"""What commands are asked: the options that several of them have, and the settings and requests these stand for.

What is heavy is imported when it is needed, so that the command line's help comes at once.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from components.errors import ConfigError
from pipelines.names import PipelineName
from pipelines.terminal import check_writable, told_to_the_user

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pipelines.config import PlatformConfig
    from serving.schemas import Range

M = TypeVar("M", bound="BaseModel")

_NUMBER = r"(-?\d+(?:\.\d+)?)?"
_RANGE = re.compile(rf"{_NUMBER}\s*\.\.\s*{_NUMBER}")

Preset = Annotated[
    str,
    typer.Option(
        "--preset",
        "-p",
        help="Settings to begin with: local, gpu, cluster, spot, incremental, paper, smollm2; cluster,spot: one over another.",
    ),
]
Files = Annotated[
    list[Path] | None, typer.Option("--config", "-c", help="Your own settings (YAML); may be repeated, later ones win.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="One setting, for example train.max_epochs=5; may be repeated.")
]
Storage = Annotated[str | None, typer.Option("--storage", help="Where artifacts live: a directory or an s3://, gs:// URI.")]
Interactions = Annotated[str | None, typer.Option("--interactions", help="Your interactions: CSV, TSV or Parquet.")]
Items = Annotated[str | None, typer.Option("--items", help="Your items: id, title and any text columns (optional).")]
Users = Annotated[
    str | None, typer.Option("--users", help="Your users: id and texts, which ingest.user_text_columns names (optional).")
]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="A column's name in your files: user_id=uid; may be repeated.")
]


def _writable(path: Path | None) -> Path | None:
    """Refuses a file that cannot be written before the command acts: told at its end, what was done would be done twice."""
    if path is not None:
        with told_to_the_user():
            check_writable("--json", path)
    return path


JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file as JSON.", callback=_writable)
]
Url = Annotated[
    str | None,
    typer.Option("--url", help="A running endpoint (token: CLLMR_TOKEN); without it the champion's bundle is read."),
]
Deployed = Annotated[
    list[Path] | None, typer.Option("--deployed", help="A serve.yaml that is in use: its model counts too; may be repeated.")
]
Host = Annotated[str | None, typer.Option("--host", help="URL of the Kubeflow Pipelines API; default: KF_PIPELINES_ENDPOINT.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Your namespace on a multi-user Kubeflow.")]
Which = Annotated[
    PipelineName,
    typer.Option("--pipeline", help="From data to a served model, or the champion's rankings for all."),
]
Until = Annotated[str | None, typer.Option("--until", help="End after this stage.")]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        help="Let KFP skip tasks it has seen with the same inputs; finished stages are reused from storage either way.",
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Name of the code's state; default: CLLMR_REVISION, else git's HEAD.")
]
Deadline = Annotated[float, typer.Option("--deadline", min=0, help="Seconds to wait at most; exit code 124 after them.")]
Terminate = Annotated[
    bool, typer.Option("--terminate/--keep", help="On Ctrl-C (or SIGTERM): end the run too, or let it go on.")
]


def load_config(
    preset: str,
    files: list[Path] | None,
    sets: list[str] | None,
    storage: str | None,
    interactions: str | None = None,
    items: str | None = None,
    users: str | None = None,
    columns: list[str] | None = None,
    host: str | None = None,
    namespace: str | None = None,
) -> "PlatformConfig":
    """The settings that the command line describes; options of their own win over ``--set``."""
    from pipelines import config

    overrides = [*(sets or []), *own_data(interactions, items, users, columns)]
    given = {"storage_root": storage, "cluster.host": host, "cluster.namespace": namespace}
    overrides += [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    return config.load(preset, files or [], overrides)


def own_data(interactions: str | None, items: str | None, users: str | None, columns: list[str] | None) -> Iterator[str]:
    """Settings that the options for a user's own data stand for; raises ConfigError when they do not fit together."""
    if interactions is None and (items or users or columns):
        raise ConfigError("--items, --users and --column describe your own data.", "Give --interactions FILE as well.")
    if interactions is None:
        return
    yield "ingest.source=files"
    for name, path in (("interactions", interactions), ("items", items), ("users", users)):
        if path is not None:
            yield f"ingest.{name}={json.dumps(path if '://' in path else str(Path(path).expanduser().absolute()))}"
    for column in columns or []:
        name, equals, theirs = column.partition("=")
        if not equals or not name.strip() or not theirs.strip():
            raise ConfigError(
                f"--column {column}: not a column.", "Write --column ours=yours, for example --column user_id=uid"
            )
        yield f"ingest.columns.{name.strip()}={json.dumps(theirs.strip())}"


def filters_of(texts: list[str] | None) -> "dict[str, list[str] | Range]":
    """What ``--filter`` asks for, as the API takes it: a range, or values, with commas between as in a line of CSV.

    Raises ConfigError for what is neither. Whether items have such a column and such values, the model knows.
    """
    from pydantic import ValidationError

    from serving.schemas import Range

    found: dict[str, list[str] | Range] = {}
    hint = "Write --filter genres=Comedy,Drama, or --filter year=1990..1999 (either side may be left out)."
    for text in texts or []:
        column, _, wanted = (part.strip() for part in text.partition("="))
        values = [value.strip() for value in next(csv.reader([wanted], skipinitialspace=True), []) if value.strip()]
        if not column or not values:
            raise ConfigError(f"--filter {text}: expected column=value.", hint)
        span, before = _RANGE.fullmatch(wanted), found.get(column)
        if before is not None and (span or isinstance(before, Range)):
            raise ConfigError(f"--filter {text}: there is another filter on '{column}'.", "Give one range, or values alone.")
        if span is None:
            found[column] = [*(before or []), *values]
            continue
        least, most = (None if number is None else float(number) for number in span.groups())
        try:
            found[column] = Range(min=least, max=most)
        except ValidationError as error:
            raise ConfigError(f"--filter {text}: {error.errors()[0]['msg'].removeprefix('Value error, ')}.", hint) from None
    return found


def validated(model: type[M], values: dict[str, Any]) -> M:
    """A request built from the command line; raises ConfigError for a value the API does not allow."""
    from pydantic import ValidationError

    from components.settings import config_error

    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = config_error(model, error)
        raise ConfigError(problem.message, "See --help.") from None
