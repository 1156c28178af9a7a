"""The settings tree: precedence, errors, fingerprints."""

import re
from pathlib import Path
from typing import Any

import pytest

from components.errors import ConfigError
from components.settings import StageConfig
from pipelines.config import PlatformConfig, load, merge, parse_override, preset_names


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_local_preset_is_the_defaults() -> None:
    assert load("local") == PlatformConfig()


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_valid_and_a_small_difference(preset: str) -> None:
    differences = _leaves(_difference(PlatformConfig().model_dump(), load(preset).model_dump()))
    assert len(differences) <= 32


def test_the_presets_are_those_that_the_help_names() -> None:
    assert preset_names() == ["cluster", "gpu", "incremental", "local", "paper", "smollm2", "spot"]


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        ("postgresql://mlflow:S3CRET@db/mlflow", "PGPASSWORD or a pgpass file"),
        ("postgresql+psycopg://mlflow:S3C/RET#1@db/mlflow", "PGPASSWORD or a pgpass file"),
        ("postgresql://mlflow@db/mlflow?sslmode=require&password=S3CRET", "PGPASSWORD or a pgpass file"),
        ("https://me:S3CRET@mlflow.example", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("http://S3CRET@mlflow:5000", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("s3://AKIA:S3CRET@bucket/cllmr", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("s3://S3CRET@bucket/cllmr", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("abfs://:S3CRET@account.blob.core.windows.net/x", "the environment of what reads it"),
    ],
)
@pytest.mark.parametrize(
    "setting",
    [
        "storage_root",
        "promote.tracking_uri",
        "batch.tracking_uri",
        "train.registry.tracking_uri",
        "sideinfo.answers",
        "ingest.items",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_shown(setting: str, value: str, instead: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"setting '{re.escape(setting)}' = \(not shown\): .*: use {instead} instead"
    ) as error:
        load(overrides=["ingest.source=files", "ingest.interactions=a.csv", f"{setting}='{value}'"])
    assert not re.search("S3C|RET", str(error.value).replace("SECRET", ""))


@pytest.mark.parametrize(
    "value",
    [
        "http://mlflow:5000",
        "https://mlflow.example/team",
        "postgresql://mlflow@db:5432/mlflow?sslmode=require",
        "sqlite:////home/me@work/a:b@c/mlflow.db",
        "s3://bucket/a:b@c?region=eu-central-1&endpoint_override=localhost:9000",
        "gs://anonymous@bucket/x",
        "file:///data/a:b@c",
        "/data/a:b@c?token=1",
        "C:/data",
    ],
)
def test_an_address_without_a_secret_is_taken_as_it_is(value: str) -> None:
    config = load(overrides=[f"promote.tracking_uri='{value}'", f"storage_root='{value}'"])
    assert (config.promote.tracking_uri, config.storage_root) == (value, value)


def test_own_file_wins_over_the_preset_and_set_over_both_and_later_over_earlier(tmp_path: Path) -> None:
    preset = load("cluster").placement.train.retries
    assert preset > 0
    first = write(tmp_path / "first.yaml", "placement: {train: {retries: 7}}\ntrain: {max_epochs: 3, seed: 1}")
    second = write(tmp_path / "second.yaml", "train: {seed: 2}")
    config = load("cluster", [first, second], ["train.max_epochs=4", "train.max_epochs=5"])
    assert config.placement.train.retries == 7
    assert (config.train.max_epochs, config.train.seed) == (5, 2)
    assert config.placement.train.cpu == load("cluster").placement.train.cpu


def test_values_of_set_are_read_as_yaml() -> None:
    config = load(
        overrides=[
            "evaluate.baselines=[popularity, ease]",
            "ingest.min_rating=null",
            "storage_root='7'",
            "serve.trial.mode=off",
        ]
    )
    assert config.serve.trial.mode == "off"
    assert config.evaluate.baselines == ("popularity", "ease")
    assert config.ingest.min_rating is None
    assert config.storage_root == "7"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_epoch=5"], r"unknown setting 'train\.max_epoch'\. Did you mean 'max_epochs'\? Allowed: .*batch_size"),
        (["trian.max_epochs=5"], r"unknown setting 'trian'\. Did you mean 'train'\? Allowed: batch, cluster, evaluate"),
        (["train.model.embeding_dim=8"], r"unknown setting 'train\.model\.embeding_dim'\. Did you mean 'embedding_dim'\?"),
        (["placement.train.cpus=8"], r"unknown setting 'placement\.train\.cpus'\. Did you mean 'cpu'\? Allowed: cpu, gpu"),
        (["train.max_epochs=many"], r"setting 'train\.max_epochs' = 'many': Input should be a valid integer"),
        (["train.max_epochs=0"], r"setting 'train\.max_epochs' = 0: Input should be greater than 0\."),
        (["features.online_store=mysql"], r"setting 'features\.online_store' = 'mysql': Input should be 'sqlite' or 'redis'"),
        (["train=5"], r"setting 'train' = 5: Input should be a valid dictionary"),
        (
            ["serve.trial={mode: canary, share: 0.1}", "serve.poll_interval_s=0"],
            r"setting 'serve\.poll_interval_s' = 0: the registry is never asked for the challenger that serve\.trial\.mode",
        ),
        (["serve.port=70000"], r"setting 'serve\.port' = 70000: Input should be less than or equal to 65535"),
        (["train.debias_grid=[0, 1.5]"], r"setting 'train\.debias_grid\.1' = 1\.5: Input should be less than or equal to 1"),
        (["train.debias_grid=[]"], r"setting 'train\.debias_grid' = \[\]: Tuple should have at least 1 item"),
        (["train.recipe.side_mix=[2]"], r"setting 'train\.recipe\.side_mix\.0' = 2: Input should be less than or equal to 1"),
        (["train.recipe.ease_user_power=[2]"], r"setting 'train\.recipe\.ease_user_power\.0' = 2: Input should be less than"),
        (["train.model.temperature=.inf"], r"setting 'train\.model\.temperature' = inf: Input should be a finite number"),
        (["evaluate.bm25_b=[0.5, 2]"], r"setting 'evaluate\.bm25_b\.1' = 2: Input should be less than or equal to 1"),
        (["placement.train.cpu=.inf"], r"setting 'placement\.train\.cpu' = inf: Input should be a finite number"),
        (["placement.train.launch.timeout_s=.inf"], r"'placement\.train\.launch\.timeout_s' = inf: Input should be a finite"),
        (["cluster.request_timeout_s=.inf"], r"setting 'cluster\.request_timeout_s' = inf: Input should be a finite number"),
        (
            ["placement.train.launch.backend=jobs"],
            r"setting 'placement\.train\.launch\.address' = None: the backend 'jobs' needs the URL of a Ray dashboard, for",
        ),
        (["evaluate.ease_l2=[.inf]"], r"setting 'evaluate\.ease_l2\.0' = inf: Input should be a finite number"),
        (
            ["train.effect=reference_texts"],
            r"'train\.effect' = 'reference_texts' needs texts of an LLM, and 'sideinfo\.backend' = 'metadata' asks none\. Set",
        ),
        (["train.max_epochs"], r"'train\.max_epochs' is not a setting\. Write --set name=value"),
        (["=5"], r"'=5' is not a setting\."),
        (["train..x=5"], r"'train\.\.x=5' is not a setting\."),
        (["train.seed=[1"], r"the value of 'train\.seed=\[1' is not YAML\. Quote it"),
        (["train.seed=2024-02-30"], r"the value of 'train\.seed=2024-02-30' is not YAML\. Quote it"),
        (["storage_root=''"], r"setting 'storage_root' = '': a blank one would be the current directory; write '\.' where"),
        (["storage_root=' '"], r"setting 'storage_root' = ' ': a blank one"),
        (
            ["storage_root=s3:/x"],
            r"setting 'storage_root' = 's3:/x': it would be a directory named 's3:'; 's3://' was probably",
        ),
        (
            ["storage_root=/data/50%"],
            r"storage root '/data/50%': the address of the SQLite file '/data/50%/mlflow\.db' may not",
        ),
    ],
)
def test_a_wrong_override_is_named_with_what_is_allowed(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(overrides=overrides)


def test_an_unknown_preset_is_named_with_the_closest_one() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown preset 'clutser'\. Did you mean 'cluster'\? Allowed: cluster, gpu, incremental, local, "
    ):
        load("clutser")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  max_epochs: [", r"is not valid YAML in line 2"),
        ("train: {seed: 2024-02-30}", r"is not valid YAML: day is out of range for month\. Settings are nested"),
        ("- train", r"holds a list, not settings\. Begin with a line like 'train:'"),
        ("train: {epoch: 1}", r"unknown setting 'train\.epoch'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(files=[write(tmp_path / "mine.yaml", text)])


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(files=[write(tmp_path / "mine.yaml", "# nothing yet\n")]) == PlatformConfig()


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config file 'nowhere\.yaml' cannot be read: No such file or directory\."):
        load(files=["nowhere.yaml"])


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("storage_root: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml' is not UTF-8 text"):
        load(files=[tmp_path / "latin.yaml"])


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PlatformConfig().storage_root = "elsewhere"  # type: ignore[misc]  # what the test is about


def test_the_fingerprint_is_a_function_of_every_setting() -> None:
    changes = ["train.seed=7", "placement.train.cpu=3", "storage_root=x", "serve.port=1"]
    prints = {PlatformConfig().fingerprint(), *(load(overrides=[change]).fingerprint() for change in changes)}
    assert len(prints) == 5
    assert load("local").fingerprint() == PlatformConfig().fingerprint()


def test_mappings_are_merged_and_other_values_replaced() -> None:
    assert merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}, "d": 4}) == {"a": {"b": 1, "c": [3]}, "d": 4}
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}
    assert parse_override("a.b=c=d") == {"a": {"b": "c=d"}}


@pytest.mark.parametrize("stage", sorted(PlatformConfig().stages()))
def test_a_stage_config_survives_kfp_where_every_int_becomes_a_float(stage: str) -> None:
    config = load("local").stages()[stage]
    arrived = type(config).parse(_as_kfp_hands_it_on(config.as_parameter()), stage)
    assert arrived == config
    assert repr(arrived) == repr(config)  # 3 == 3.0, but their fingerprints differ


@pytest.mark.parametrize("stage", sorted(PlatformConfig().stages()))
def test_every_setting_says_what_it_is(stage: str) -> None:
    import ast
    import inspect

    config: type[StageConfig] = type(PlatformConfig().stages()[stage])
    (body,) = (node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef))
    for field, after in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if isinstance(field, ast.AnnAssign):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
            assert said, f"{config.__name__}.{ast.unparse(field.target)} has no docstring"


def test_a_setting_that_is_none_survives_kfp_which_has_no_null() -> None:
    config = load(overrides=["ingest.min_rating=null", "ingest.columns.rating=null"]).ingest
    parameter = config.as_parameter()
    assert parameter["min_rating"] == "null"
    assert type(config).parse(parameter, "ingest") == config


def _as_kfp_hands_it_on(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_kfp_hands_it_on(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_kfp_hands_it_on(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _difference(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _difference(one.get(key), value) for key, value in other.items() if one.get(key) != value}
    return other


def _leaves(tree: Any) -> list[Any]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


def test_several_presets_are_laid_over_each_other_in_order() -> None:
    both = load("cluster,spot")
    assert both.placement.run_as_user == load("cluster").placement.run_as_user
    assert (both.placement.ingest.cpu, both.placement.ingest.spot) == (load("cluster").placement.ingest.cpu, True)
    assert both.placement.train.launch.backend == "rayjob"
    with pytest.raises(ConfigError, match=r"unknown preset 'spto'\. Did you mean 'spot'\?"):
        load("cluster,spto")


def test_placement_presets_change_no_output() -> None:
    def outputs(config: PlatformConfig) -> dict[str, Any]:
        return {name: stage.identity() for name, stage in config.stages().items() if name not in ("ingest", "sideinfo")}

    assert outputs(load("cluster,spot")) == outputs(load("cluster"))


def test_a_task_on_a_spot_node_must_be_tried_again() -> None:
    with pytest.raises(ConfigError, match=r"spot is true and retries is 0: a task on a node that may be taken away must be"):
        load(overrides=["placement.ingest.spot=true"])


def test_train_looks_for_the_champion_where_promote_puts_it() -> None:
    settings = load("incremental", overrides=["promote.tracking_uri=http://mlflow:5000", "promote.model_name=books"])
    train: Any = settings.stages()["train"]
    assert (train.registry.tracking_uri, train.registry.model_name) == ("http://mlflow:5000", "books")
    cold: Any = load().stages()["train"]
    assert cold.registry is None
