"""Units of work, resuming, results and their keys, cold start, on a planted data set that takes seconds."""

import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from markupsafe import escape

import components
from components.cllmr.linear.ensemble import Candidates, choose_weights
from components.errors import ConfigError, DataError
from components.evaluate.baselines import Factors, RandomScores
from components.evaluate.metrics import METRICS, rank
from components.experiment import coldstart, coldusers, run, statistics
from components.experiment.code import CODE, sources
from components.experiment.config import ExperimentConfig, ModelSpec, named
from components.experiment.dataset import ExperimentData, read, unit_rows
from components.experiment.models import Task, graph_settings, skip_reason, tune
from components.experiment.planted import write_blocks
from components.experiment.report import render
from components.experiment.run import Runner, Source, experiment
from components.experiment.store import Outcome, Results
from components.experiment.suites import Setup, comparison, run_suite
from components.experiment.tables import grids, markdown
from components.spectrum.decompose import spectrum

SMALL = {"model.embedding_dim": 8, "model.num_negatives": 32, "max_epochs": 2, "batch_size": 512, "evaluate_every": 1}
FACTS = {"seeds": [1], "text_encoder": "e", "versions": {"numpy": "2"}, "hardware": {"cores": 2}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("experiment")
    return Source.open(write_blocks(root / "blocks"), "all-MiniLM-L6-v2", root / "work")


def small_config(**changes: Any) -> ExperimentConfig:
    model = {"name": "cllmr", "kind": "graph", "settings": {**SMALL, "model.side_encoder": "sse", "effect": "tnie"}}
    return ExperimentConfig.parse({"model": model, "baselines": ["popularity", "ease"], "seeds": 2, **changes}, "")


def test_a_result_has_its_keys_and_its_figures_agree(source: Source, tmp_path: Path) -> None:
    config = small_config(rival="text_cosine")
    runner = Runner(Results(tmp_path))
    result = json.loads(json.dumps(experiment(source, config, runner), allow_nan=False))
    assert {"dataset", "recipe", "seeds", "val", "test", "baselines", "seconds", "cpu_seconds", "peak_memory_mb"} <= set(result)
    assert {"effective_rank", "bias", "dim", "protocol", "skipped", "data", "users_evaluated"} <= set(result)
    assert result["seeds"] == [2023, 2024]
    assert result["dim"] == 8
    assert set(result["baselines"]) == {"popularity", "ease", "text_cosine"}
    for model in (result, *result["baselines"].values()):
        for split in ("val", "test"):
            assert set(model[split]) == set(METRICS)
            for figures in model[split].values():
                assert len(figures["per_seed"]) == 2
                assert figures["mean"] == pytest.approx(np.mean(figures["per_seed"]), abs=1e-6)
                assert figures["std"] == pytest.approx(np.std(figures["per_seed"], ddof=1), abs=2e-6)
    assert result["test"]["ndcg@10"]["std"] > 0
    assert result["baselines"]["ease"]["test"]["ndcg@10"]["std"] == 0
    assert len(result["debias_per_seed"]) == 2
    popularity = result["baselines"]["popularity"]
    difference = popularity["ours_minus"]["ndcg@10"]["difference"]
    assert difference == pytest.approx(result["test"]["ndcg@10"]["mean"] - popularity["test"]["ndcg@10"]["mean"], abs=2e-6)
    study = comparison([result])
    assert [row[0] for row in grids(study)[0].rows] == ["CLLMR", "Popularity", "EASE", "Text cosine"]
    page = render([study], FACTS)
    assert page.count("<svg") == 1
    assert page.count(str(escape(run.PROTOCOL))) == 1
    assert "http" not in page.replace("http-equiv", "")
    assert "| EASE |" in markdown([study])


def test_what_is_tested_are_values_per_user_averaged_over_seeds(source: Source, tmp_path: Path) -> None:
    results = Results(tmp_path)
    config = small_config(baselines=["popularity"])
    result = experiment(source, config, Runner(results))
    outcomes = [outcome for path in (tmp_path / "units").iterdir() if (outcome := results.find(path.stem)) is not None]
    ours = [one for one in outcomes if "debias" in one.facts]
    (other,) = [one for one in outcomes if "debias" not in one.facts]
    assert len(ours) == 2
    mean = np.mean([one.arrays["test.recall@20"] for one in ours], axis=0)
    expected = statistics.paired(mean, other.arrays["test.recall@20"])
    assert result["baselines"]["popularity"]["ours_minus"]["recall@20"] == expected


def test_a_killed_run_goes_on_with_what_is_missing(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    real, calls = run.execute, []

    def dies(unit: run.Unit, tell: Callable[..., None]) -> Outcome:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(unit.label)
        return real(unit, tell)

    monkeypatch.setattr(run, "execute", dies)
    with pytest.raises(KeyboardInterrupt):
        experiment(source, config, Runner(Results(tmp_path)))
    monkeypatch.setattr(run, "execute", real)
    assert len(list((tmp_path / "units").iterdir())) == 2
    rest = Runner(Results(tmp_path))
    first = experiment(source, config, rest)
    assert len(rest.executed) == 2  # EASE, and the second seed of ours
    nothing = Runner(Results(tmp_path))
    assert experiment(source, config, nothing) == first
    assert nothing.executed == []
    more = Runner(Results(tmp_path))
    experiment(source, small_config(seeds=3), more)
    assert len(more.executed) == 1
    other = Runner(Results(tmp_path))
    renamed = config.model.model_copy(update={"settings": {**config.model.settings, "model.embedding_dim": 4}})
    experiment(source, config.model_copy(update={"model": renamed}), other)
    assert len(other.executed) == 2  # the baselines are what they were


def test_an_encoder_that_is_another_one_under_the_same_name_makes_other_units(tmp_path: Path) -> None:
    folder, encoder = write_blocks(tmp_path / "blocks"), tmp_path / "encoder"
    (folder / "items.jsonl.gz").unlink()  # nothing is embedded
    encoder.mkdir()
    keys = []
    for weights in ("one", "two", "one"):
        (encoder / "weights").write_text(weights)
        keys.append(run.Unit(Source.open(folder, str(encoder), tmp_path), "model", {}, 1, "").key)
    moved = encoder.rename(tmp_path / "moved")
    keys.append(run.Unit(Source.open(folder, str(moved), tmp_path), "model", {}, 1, "").key)
    assert keys[0] == keys[2] == keys[3] != keys[1]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the components."""
    folder = tmp_path_factory.mktemp("code") / "components"
    return shutil.copytree(Path(components.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.parametrize("edited", ["cllmr/backbones/sgl.py", "experiment/models.py"])
def test_what_figures_come_from_is_measured_anew_where_it_is_written_anew(
    edited: str, source: Source, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, keys = run.Unit(source, "model", {}, 1, ""), []
    for line in ("", "# another algorithm\n"):
        with (code / edited).open("a") as file:
            file.write(line)
        monkeypatch.setattr(run, "CODE", sources(code))
        keys.append(unit.key)
    assert keys[0] != keys[1]


def test_figures_come_from_models_baselines_metrics_and_training_and_not_from_reports_or_the_platform() -> None:
    measuring = {
        "cllmr": {"effects/lift", "linear/ease", "model"},
        "evaluate": {"alpharec", "baselines", "bias", "metrics"},
        "experiment": {"coldstart", "coldusers", "models", "propensity_study", "search", "tasks"},
        "spectrum": {"decompose"},
        "train": {"counterfactual", "graph", "loop", "members", "recipe", "strength"},
    }
    assert {f"{folder}/{name}.py" for folder, names in measuring.items() for name in names} <= set(CODE)
    others = {"errors", "sideinfo/prompts", "evaluate/report", "experiment/report", "experiment/statistics", "train/stage"}
    assert not {f"{name}.py" for name in others} & set(CODE)


@pytest.mark.parametrize("importer", ["cllmr/backbones/sgl", "experiment/models"])
def test_the_code_that_measures_is_followed_to_wherever_it_is_imported_from(importer: str, code: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(code, tmp_path / "components")
    (copy / "mine").mkdir()
    for name, text in {"__init__": "from .fit import fit\n", "fit": "import components.mine.parts\n", "parts": ""}.items():
        (copy / "mine" / f"{name}.py").write_text(text)
    with (copy / f"{importer}.py").open("a") as file:
        file.write("def _mine():\n    from components.mine import fit\n    return fit()\n")
    assert set(sources(copy)) == {*CODE, "mine/__init__.py", "mine/fit.py", "mine/parts.py"}


def test_a_fit_tells_its_figures_while_it_goes_on(source: Source, tmp_path: Path) -> None:
    events: list[Mapping[str, Any]] = []
    experiment(source, small_config(baselines=[], seeds=1), Runner(Results(tmp_path), tell=events.append))
    assert [(event["done"], event.get("epoch")) for event in events] == [(0, None), (0, 1), (0, 2), (1, None)]
    assert len({(event["data"], event["model"]) for event in events}) == 1


def test_a_setting_of_any_name_is_told_as_a_figure_and_takes_no_other_place() -> None:
    events: list[Mapping[str, Any]] = []
    run.Progress(events.append, 3, "units").advance("books", "CLLMR", 0, model={"embedding_dim": 8}, done=2, epoch=1)
    (event,) = events
    assert (event["data"], event["model"], event["done"], event["epoch"]) == ("books", "CLLMR", 0, 1)


def test_what_is_told_of_the_machine_is_that_which_measured_and_two_of_them_stand_beside_each_other(
    source: Source, tmp_path: Path
) -> None:
    def told(cores: int, models: list[str], **packages: str) -> dict[str, Any]:
        runner = Runner(Results(tmp_path), environment={"versions": packages, "hardware": {"cores": cores}})
        model = {"name": "cllmr", "kind": "popularity"}
        experiment(source, small_config(model=model, baselines=models), runner)
        return runner.measured_with()

    first = told(2, ["bm25"], numpy="1")
    assert first == {"versions": {"numpy": "1"}, "hardware": {"cores": 2}}
    assert told(8, ["bm25"], numpy="2", torch="3") == first
    assert told(8, ["bm25", "ease"], numpy="2", torch="3") == {
        "versions": {"numpy": "1 and 2", "torch": "3"},
        "hardware": {"cores": "2 and 8"},
    }


def test_fields_that_are_left_out_as_identifiers_are_told(tmp_path: Path) -> None:
    folder, events = write_blocks(tmp_path / "blocks"), list[Mapping[str, Any]]()
    (folder / "items.jsonl.gz").unlink()
    (folder / "items.jsonl").write_text('{"iid": 0, "title": "a rook", "price": 3, "brandID": "b"}\n', encoding="utf-8")
    (folder / "users.jsonl").write_text('{"uid": 0, "user_id": "u"}\n', encoding="utf-8")
    Source.open(folder, "all-MiniLM-L6-v2", tmp_path, events.append)
    assert [event["message"] for event in events if event["event"] == "warning"] == [
        "'blocks': no text has 'brandID', 'user_id', whose values look like identifiers"
    ]


def test_data_that_change_while_a_run_goes_on_are_refused(tmp_path: Path) -> None:
    folder = write_blocks(tmp_path / "blocks")
    (folder / "items.jsonl.gz").unlink()
    source = Source.open(folder, "all-MiniLM-L6-v2", tmp_path)
    assert run.load(source).fingerprint() == source.fingerprint
    write_blocks(folder, seed=1)
    (folder / "items.jsonl.gz").unlink()
    run.load.cache_clear()  # as with a third data set, or in another worker
    with pytest.raises(
        DataError, match=rf"blocks' changed since the run began: .* was {source.fingerprint} and is .*Start the"
    ):
        experiment(source, small_config(), Runner(Results(tmp_path)))


def test_a_damaged_unit_is_measured_again_and_no_half_file_is_left(tmp_path: Path) -> None:
    results = Results(tmp_path)
    outcome = Outcome({"a": 1}, {"x": np.arange(3)})
    results.keep("key", outcome)
    found = results.find("key")
    assert found is not None
    assert found.facts == {"a": 1}
    assert found.arrays["x"].tolist() == [0, 1, 2]
    whole = results.path("key").read_bytes()
    results.path("key").write_bytes(whole[: len(whole) // 2])
    assert results.find("key") is None
    assert results.find("other") is None
    with pytest.raises(ValueError, match="JSON"):
        results.keep("nan", Outcome({"a": float("nan")}, {}))
    assert [path.name for path in (tmp_path / "units").iterdir()] == ["key.npz"]


def test_a_unit_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    results = Results(tmp_path)
    before = os.umask(0o027)
    try:
        results.keep("key", Outcome({}, {}))
    finally:
        os.umask(before)
    assert stat.S_IMODE(results.path("key").stat().st_mode) == 0o640


def test_test_interactions_do_not_touch_what_is_chosen(source: Source) -> None:
    """Tuning and fitting with other test interactions gives the same settings and scores."""
    data = run.load(source)
    emptied = replace(data, test=data.validation)
    graph = ModelSpec(name="g", kind="graph", settings=SMALL, grid={"model.temperature": (0.1, 0.3)})
    debiased = ModelSpec(name="d", kind="graph", settings={**SMALL, "model.side_encoder": "sse", "effect": "tnie"})
    members = {"recipe.members": ["text", "ease"], "effect": "counterfactual_log"}
    recipe = ModelSpec(name="r", kind="recipe", settings={**SMALL, **members})
    for spec in (named("ease_text"), graph, debiased, recipe):
        one, other = (tune(spec, each, seed=1) for each in (data, emptied))
        assert one.settings == other.settings
        assert one.tried == other.tried
        assert one.fitted.facts.get("debias") == other.fitted.facts.get("debias")
        users = np.arange(5)
        assert (one.fitted.scores.score(users) == other.fitted.scores.score(users)).all()


def test_alpharec_beats_popularity_where_text_tells_taste(source: Source) -> None:
    from components.experiment.models import KINDS

    data = run.load(source)
    task = Task(data, {"max_epochs": 12, "batch_size": 256}, seed=0)
    values = [
        rank(KINDS[kind].fit(one).scores.score, data.train, data.test).mean()["ndcg@10"]
        for kind, one in (("alpharec", task), ("popularity", replace(task, settings={})))
    ]
    assert values[0] > 2 * values[1]


def test_the_weights_of_an_ensemble_favour_the_member_that_knows(source: Source) -> None:
    data = run.load(source)
    rng = np.random.default_rng(0)
    noise = Factors(
        rng.normal(size=(data.num_users, 4)).astype(np.float32), rng.normal(size=(data.num_items, 4)).astype(np.float32)
    )
    truth = Factors(np.eye(data.num_users, dtype=np.float32), (data.validation + data.test).T.toarray())
    weights, value = choose_weights(Candidates.collect([noise, truth], data.train, data.validation))
    assert abs(weights[0]) < 0.1
    assert weights[1] > 0.9
    assert value > 0.5


def test_cold_items_leave_no_trace_in_what_is_learned_from(source: Source) -> None:
    data = run.load(source)
    cold = coldstart.split(data, 0.1, seed=4)
    assert len(cold.test_items) == len(cold.validation_items) == 14
    assert not set(cold.test_items) & set(cold.validation_items)
    gone = np.concatenate([cold.test_items, cold.validation_items])
    for part in (cold.warm.train, cold.warm.validation, cold.warm.test):
        assert part[:, gone].nnz == 0
    everything = data.train + data.validation + data.test
    assert (cold.held_out[:, gone] != everything[:, gone]).nnz == 0
    assert cold.held_out.nnz == everything[:, gone].nnz
    assert cold.warm.train.nnz + cold.warm.validation.nnz + cold.warm.test.nnz + cold.held_out.nnz == everything.nnz
    # a user who chose cold items alone has no text: the mean of the items is over the warm ones
    only_cold = np.diff(cold.warm.train.indptr) == 0
    assert not cold.warm.user_text[only_cold].any()
    assert (coldstart.split(data, 0.1, seed=4).test_items == cold.test_items).all()
    assert set(coldstart.split(data, 0.1, seed=5).test_items) != set(cold.test_items)


def test_a_users_own_text_which_tells_of_all_training_items_does_not_find_the_cold_ones(source: Source) -> None:
    data = run.load(source)
    text = unit_rows(np.random.default_rng(0).normal(size=(data.num_items, 64)))  # says nothing about taste
    profiles = unit_rows(np.asarray(data.train @ text, dtype=np.float32))
    bare = replace(data, item_text=text, own_user_text=np.zeros_like(profiles))
    cold, without = (coldstart.split(one, 0.1, seed=1) for one in (replace(bare, own_user_text=profiles), bare))
    np.testing.assert_array_equal(cold.warm.user_text, without.warm.user_text)
    values = [
        cold.rank(scores, cold.test_items).mean()["ndcg@10"]
        for scores in (Factors(cold.warm.user_text, text), RandomScores(1, data.num_items))
    ]
    assert values[0] == pytest.approx(values[1], abs=0.1)


@pytest.mark.parametrize("study", [coldstart, coldusers])
def test_what_is_cold_in_the_test_chooses_nothing(study: Any, source: Source) -> None:
    data = run.load(source)
    settings = {"share": 0.2, "graph": {**SMALL, "model.side_encoder": "sse"}}
    cold = study.split(data, 0.2, seed=0)
    other = {}
    for name in ("train", "validation", "test"):
        matrix = getattr(data, name).toarray()
        if study is coldstart:
            matrix[:, cold.test_items] = matrix[::-1, cold.test_items]  # chosen by others
        elif name != "train":
            matrix[cold.test_users] = np.roll(matrix[cold.test_users], 70, axis=1)  # chose others
        other[name] = sp.csr_array(matrix)
    one, changed = (study.measure(each, settings, seed=0).facts for each in (data, replace(data, **other)))
    assert one["test"] != changed["test"]
    assert (one["settings"], one["val"]) == (changed["settings"], changed["val"])


def test_text_finds_cold_items_and_chance_does_not(source: Source) -> None:
    outcome = coldstart.measure(run.load(source), {"share": 0.2, "graph": {**SMALL, "model.side_encoder": "sse"}}, seed=0)
    test = {name: value["ndcg@10"] for name, value in outcome.facts["test"].items()}
    assert set(test) == set(coldstart.LABELS)
    assert min(test["text_cosine"], test["ridge"], test["analytic"], test["combined"]) > 1.3 * test["random"]
    assert outcome.facts["users_evaluated"] == len(outcome.arrays["random.ndcg@10"])


def test_a_catalogue_so_small_that_its_spectrum_has_empty_components_is_ranked() -> None:
    """12 items, four of which are taken out: 8 of the 11 singular values at most are not zero."""
    rng = np.random.default_rng(4)
    chosen, part = rng.random((30, 12)) < 0.35, rng.random((30, 12))
    splits = [sp.csr_array((chosen & at).astype(np.float32)) for at in (part < 0.6, (part >= 0.6) & (part < 0.8), part >= 0.8)]
    text = rng.normal(size=(12, 16)).astype(np.float32)
    data = ExperimentData("tiny", *splits, ["some text"] * 12, [None] * 30, unit_rows(text), np.zeros((30, 16), np.float32))
    values = spectrum(coldstart.split(data, 0.15, seed=4).warm.train, 11).singular_values
    assert values[-1] < 1e-12 * values[0], "no component is empty: nothing is tested"
    outcome = coldstart.measure(data, {"share": 0.15, "graph": {**SMALL, "model.side_encoder": "sse"}}, seed=4)
    assert np.isfinite(outcome.facts["test"]["analytic"]["ndcg@10"])


def test_cold_users_leave_no_trace_in_what_is_learned_from(source: Source) -> None:
    data = run.load(source)
    cold = coldusers.split(data, 0.1, seed=4)
    assert len(cold.test_users) == len(cold.validation_users) == 15
    assert not set(cold.test_users) & set(cold.validation_users)
    gone = np.concatenate([cold.test_users, cold.validation_users])
    for part in (cold.warm.train, cold.warm.validation, cold.warm.test):
        assert part[gone].nnz == 0
    assert (cold.shown[gone] != data.train[gone]).nnz == 0
    later = data.validation + data.test
    assert (cold.held_out[gone] != later[gone]).nnz == 0
    total = data.train.nnz + later.nnz
    assert cold.warm.train.nnz + cold.warm.validation.nnz + cold.warm.test.nnz + cold.shown.nnz + cold.held_out.nnz == total
    # they are known by the text that their items gave them, as they would have been
    np.testing.assert_allclose(cold.warm.user_text[gone], data.user_text[gone], atol=1e-6)
    assert (coldusers.split(data, 0.1, seed=4).test_users == cold.test_users).all()
    assert set(coldusers.split(data, 0.1, seed=5).test_users) != set(cold.test_users)


def test_text_finds_items_for_cold_users_and_popularity_does_not(source: Source) -> None:
    outcome = coldusers.measure(run.load(source), {"share": 0.2, "graph": {**SMALL, "model.side_encoder": "sse"}}, seed=0)
    test = {name: value["ndcg@10"] for name, value in outcome.facts["test"].items()}
    assert set(test) == set(coldusers.LABELS)
    assert test["popularity"] > test["random"]
    assert min(test["text_cosine"], test["kernel"], test["ridge"], test["combined"]) > 1.3 * test["popularity"]
    assert outcome.facts["cold_users"] == len(outcome.arrays["random.ndcg@10"]) == 30


def test_a_data_set_that_is_too_small_for_cold_start_is_told(source: Source) -> None:
    data = run.load(source)
    few = np.arange(data.num_users) < 3
    held = sp.csr_array(sp.diags_array(few.astype(np.float32)) @ data.test)
    with pytest.raises(
        DataError,
        match=r"'blocks' has 3 users with a text and interactions beyond training: too few for cold start. At least 4",
    ):
        coldusers.split(replace(data, test=held, validation=held), 0.1, seed=0)
    with pytest.raises(DataError, match=r"'blocks' has 3 items with training interactions and a text: too few"):
        coldstart.split(replace(data, item_texts=[*data.item_texts[:3], *[None] * (data.num_items - 3)]), 0.1, seed=0)


def test_a_data_set_without_text_leaves_out_what_needs_it(tmp_path: Path) -> None:
    folder = write_blocks(tmp_path / "bare")
    (folder / "items.jsonl.gz").unlink()
    source = Source.open(folder, "all-MiniLM-L6-v2", tmp_path)
    config = small_config(baselines=["text_cosine", "ease", "ease_text"], seeds=1)
    with pytest.raises(ConfigError, match=r"CLLMR cannot be fitted on 'bare': the items have no text"):
        experiment(source, config, Runner(Results(tmp_path)))
    with pytest.raises(DataError, match=r"no variant of the study can be fitted on 'bare': the items have no text\."):
        run_suite("rank", Setup([source], config, Runner(Results(tmp_path))))
    recipe = ModelSpec(name="cllmr", kind="recipe", settings={"model.side_encoder": "mlp"})
    assert skip_reason(recipe, run.load(source), 1) is None, "it leaves out what needs text itself"
    bare = ModelSpec(name="cllmr", kind="graph", settings={**SMALL, "model": {"side_encoder": "none"}})
    result = experiment(source, config.model_copy(update={"model": bare}), Runner(Results(tmp_path)))
    assert list(result["baselines"]) == ["ease"]
    assert result["skipped"] == dict.fromkeys(("text_cosine", "ease_text"), "the items have no text")


def test_a_catalogue_too_large_for_item_matrices_is_told(source: Source, tmp_path: Path) -> None:
    result = experiment(source, small_config(ease_max_items=100, seeds=1), Runner(Results(tmp_path)))
    assert result["skipped"] == {"ease": "144 items are more than ease_max_items = 100"}


def test_models_by_name() -> None:
    assert named("rlmrec-con").settings == {"model.backbone": "lightgcn", "model.side_encoder": "mlp"}
    assert named("sgl+sse").settings["model.backbone"] == "sgl"
    with pytest.raises(ConfigError, match=r"unknown model 'lightgnc'"):
        named("lightgnc")
    with pytest.raises(ConfigError, match=r"unknown setting 'model.settings.model.dimension'"):
        graph_settings({"model.dimension": 3}, 0)
    with pytest.raises(ConfigError, match=r"effect 'total' is unknown"):
        graph_settings({"effect": "total"}, 0)
    config, effect, spectrum_rank = graph_settings({"model.embedding_dim": 12, "max_epochs": 3}, 7)
    assert (config.model.embedding_dim, config.max_epochs, config.seed, effect, spectrum_rank) == (12, 3, 7, "none", 12)


def test_two_models_of_one_name_are_refused(source: Source, tmp_path: Path) -> None:
    assert [spec.name for spec in small_config(rival="ease").rivals()] == ["popularity", "ease"]
    mine = {"name": "ease", "kind": "ease", "settings": {"l2": 3.0}}
    for twice in ({"baselines": ["ease", mine]}, {"model": mine, "baselines": ["ease"]}, {"model": mine, "rival": "ease"}):
        with pytest.raises(ConfigError, match=r"two models are named 'ease'\. Give one of them another name, or leave it out"):
            experiment(source, small_config(**{"baselines": [], **twice}), Runner(Results(tmp_path)))
    setup = Setup([source], small_config(study={"ranks": [4], "noises": [0.1, 0.10000001]}), Runner(Results(tmp_path)))
    with pytest.raises(ConfigError, match=r"two models are named 'noise 0\.1, rank 4'"):
        run_suite("noise", setup)


def test_variants_of_a_study_differ_with_base_settings_as_a_tree_and_checking_them_changes_none(
    source: Source, tmp_path: Path
) -> None:
    class Noted(Runner):
        def run(self, units: Sequence[run.Unit]) -> list[Outcome]:
            assert [unit.settings["spec"] for unit in units] == planned
            raise KeyboardInterrupt

    config = small_config(study={"base": {"model": {"num_negatives": 32}, "max_epochs": 2}})
    setup = Setup([source], config, Noted(Results(tmp_path)))
    assert setup.study.base == {"model.embedding_dim": 32, "model.num_negatives": 32, "max_epochs": 2}
    changes: list[dict[str, Any]] = [{"model__side_encoder": "mlp"}, {"model__spectrum_noise": 0.0}, {"effect": "tnie"}, {}]
    specs = [setup.graph(f"variant {number}", **change) for number, change in enumerate(changes)]
    planned = [spec.identity() for spec in specs]
    with pytest.raises(KeyboardInterrupt):
        run.measure_models(source, specs, config, setup.runner)
    found = [graph_settings(spec.settings, 0) for spec in specs]
    assert [config.model.side_encoder for config, *_ in found] == ["mlp", "sse", "sse", "sse"]
    assert [config.model.spectrum_noise == 0 for config, *_ in found] == [False, True, False, False]
    assert [effect for _, effect, _ in found] == ["none", "none", "tnie", "none"]
    assert {(config.model.embedding_dim, config.model.num_negatives, rank) for config, _, rank in found} == {(32, 32, 32)}


def test_settings_as_a_tree_are_not_written_into_and_those_that_are_no_tree_are_told() -> None:
    given = {"model": {"embedding_dim": 8}, "model.side_encoder": "mlp", "effect": "tnie"}
    config, *_ = graph_settings(given, 0)
    assert (config.model.embedding_dim, config.model.side_encoder) == (8, "mlp")
    assert given["model"] == {"embedding_dim": 8}
    with pytest.raises(ConfigError, match=r"'model.settings.model' = 3: Input should be a valid dictionary"):
        graph_settings({"model": 3, "model.side_encoder": "mlp"}, 0)


def test_the_bias_study_leaves_out_seeds_of_which_there_is_no_percentage_and_says_so(source: Source, tmp_path: Path) -> None:
    class Told(Runner):
        def run(self, units: Sequence[run.Unit]) -> list[Outcome]:
            shares = dict.fromkeys(("lured_share", "exposure_clean", "exposure_inflated", "exposure_debiased"), 0.5)
            change = {("inflated", 2023): 3.0}
            return [
                Outcome(
                    {**shares, "removed_percent": None, "ndcg_change_percent": change.get((unit.settings["kind"], unit.seed))},
                    {},
                )
                for unit in units
            ]

    config = small_config(study={"formulations": ["lift"], "propensity_strengths": [1.0]})
    (found,) = run_suite("bias", Setup([source], config, Told(Results(tmp_path))))
    inflated, generic = found.datasets["blocks"]["propensity"]
    assert inflated["ndcg_change_percent"]["per_seed"] == [3.0]
    assert generic["ndcg_change_percent"] is None
    (table,) = grids(found)
    assert [row[-2:] for row in table.rows] == [["nothing to remove", "3.0 %"], ["nothing to remove", "N@10 was 0"]]
    assert "an N@10 of 0 before, are left out" in table.notes[0]
    assert "N@10 was 0" in render([found], FACTS)


def test_the_noise_study_analyses_its_grid(source: Source, tmp_path: Path) -> None:
    study = {"base": SMALL, "ranks": [4, 8], "noises": [0.0, 0.5]}
    config = small_config(study=study)
    (found,) = run_suite("noise", Setup([source], config, Runner(Results(tmp_path))))
    assert found.extra["anova"]["error"]["df"] == 4
    assert found.extra["anova"]["interaction"]["df"] == 1
    assert grids(found)[-1].notes == ["The error is between seeds: this speaks for blocks alone."]
    assert np.shape(found.extra["cells_percent"]) == (2, 2)
    page = render([found], FACTS)
    assert page.count("<svg") == 1
    assert str(escape(found.protocol)) in page
    assert found.as_json()["protocol"] == found.protocol
    assert "none is tuned" in page
    assert "tuned on validation" not in page
    assert len(found.datasets["blocks"]["models"]) == 4


def test_the_ablation_says_what_propensity_each_variant_leaves(source: Source, tmp_path: Path) -> None:
    study = {"base": {**SMALL, "max_epochs": 6}, "ablation_strength": 2.0}
    config = small_config(study=study, seeds=1)
    runner = Runner(Results(tmp_path))
    (found,) = run_suite("ablation", Setup([source], config, runner))
    models = found.datasets["blocks"]["models"]
    without = models["without gates"]["propensity"]
    assert without["induced"]["mean"] > 0.02, "praise and its clicks bring exposure"
    assert without["removed_percent"]["mean"] == 0
    for model in models.values():
        remains = model["propensity"]
        (clean,), (inflated,) = (remains[f"exposure_{world}"]["per_seed"] for world in ("clean", "inflated"))
        assert remains["induced"]["mean"] == pytest.approx(inflated - clean, abs=2e-6)
        expected = 100 * (1 - remains["induced"]["mean"] / without["induced"]["mean"])
        assert remains["removed_percent"]["mean"] == pytest.approx(expected, abs=0.1)
    _, table = grids(found)
    assert table.title == "blocks, propensity that remains"
    assert [row[0] for row in table.rows] == list(models)
    assert all(all(row) for row in table.rows)


def test_the_collapse_study_goes_through_dimensions_and_tests_each_against_the_mlp_of_its_size(
    source: Source, tmp_path: Path
) -> None:
    config = small_config(study={"base": {**SMALL, "max_epochs": 1}, "dims": [4, 8]}, seeds=2)
    (found,) = run_suite("collapse", Setup([source], config, Runner(Results(tmp_path))))
    models = found.datasets["blocks"]["models"]
    assert [name for name in models if name.endswith("d = 4")] == list(models)[:6]
    for name, model in models.items():
        encoder, dim = name.split(", d = ")
        assert model["dim"] == int(dim)
        assert 1 <= model["effective_rank"]["side_items"] <= int(dim)
        assert model.get("against") == (None if encoder == "mlp" else f"mlp, d = {dim}")
        assert ("t_p" in model.get("minus", {}).get("ndcg@10", {})) == (encoder != "mlp")
    assert len(found.datasets["blocks"]["singular_values"]["sse"]["side_items"]) == 8
    assert found.extra["anova"]["interaction"]["df"] == 5
    assert np.shape(found.extra["cells_percent"]) == (6, 2)
    page = render([found], FACTS)
    assert page.count("<svg") == 2
    assert "encoder x dim" in page


def test_planted_reading_is_what_units_see(source: Source) -> None:
    assert read(source.path).fingerprint() == source.fingerprint == run.load(source).fingerprint()
