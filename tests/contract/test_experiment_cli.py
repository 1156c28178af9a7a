"""``cllmr experiment``: help, exit codes, one-line errors, the files it leaves, and the quick suite as CI runs it."""

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from components.experiment import suites
from components.experiment.config import StudyConfig
from components.experiment.planted import write_blocks
from components.experiment.run import PROTOCOL, Runner
from pipelines.cli import app
from pipelines.experiment import run, settings

SMALL = ["--set", 'model={"name": "cllmr", "kind": "graph", "settings": {"max_epochs": 1, "model.embedding_dim": 8}}']


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["experiment", *arguments], env={"COLUMNS": "200"})


def fails_in_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.output
    for part in parts:
        assert part in line


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    return write_blocks(tmp_path / "blocks", users_per_block=8, items_per_block=8)


def test_help_shows_examples() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for part in ("cllmr experiment --dataset", "--suite quick", "--rival", "--parallel"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no data set is given. Give --dataset DIR, or --suite quick"]),
        (["--dataset", "nowhere"], ["'nowhere' is not a directory. Give a folder with trn.npz, val.npz, tst.npz"]),
        (["--dataset", "DATA", "--backbone", "lightgnc"], ["--backbone lightgnc: unknown. Did you mean 'lightgcn'?"]),
        (["--dataset", "DATA", "--encoder", "vae"], ["--encoder vae: unknown.", "Allowed: attention"]),
        (["--dataset", "DATA", "--effect", "nie"], ["--effect nie: unknown. Did you mean 'tnie'?"]),
        (["--dataset", "DATA", "--suite", "papr"], ["--suite papr: unknown. Did you mean 'paper'?"]),
        (["--dataset", "DATA", "--suite", "noise", "--encoder", "mlp"], ["--encoder has no effect on a suite"]),
        (["--dataset", "DATA", "--suite", "rank", "--rival", "sgl"], ["--rival has no effect on a suite, which has models of"]),
        (["--dataset", "DATA", "--suite", "rank", "--baseline", "ease"], ["--baseline has no effect on a suite,"]),
        (
            ["--dataset", "DATA", "--suite", "rank", "--set", "rival=sgl"],
            ["setting 'rival' has no effect on a suite, which has"],
        ),
        (
            ["--dataset", "DATA", "--suite", "rank", "--config", "RIVALS"],
            ["setting 'baselines' has no effect on a suite,", "Leave out setting 'baselines' or --suite."],
        ),
        (
            ["--dataset", "DATA", "--backbone", "sgl", "--effect", "counterfactual_log"],
            ["A graph model has none, factual, tnie"],
        ),
        (["--dataset", "DATA", "--backbone", "ials", "--effect", "tnie"], ["--backbone ials has counterfactual_clicks,"]),
        (["--dataset", "DATA", "--backbone", "ials", "--dim", "8"], ["--dim has no effect on --backbone ials"]),
        (["--dataset", "DATA", "--backbone", "ease", "--suite", "rank"], ["--backbone ease is no graph"]),
        (
            ["--dataset", "DATA", *SMALL, "--dim", "48", "--loss", "bpr"],
            ["--loss, --dim: flags make our model anew"],
        ),
        (["--dataset", "DATA", "--rival", "rlmrec"], ["unknown model 'rlmrec'. Did you mean 'rlmrec-"]),
        (["--dataset", "DATA", "--set", "seds=3"], ["unknown setting 'seds'. Did you mean 'seeds'?"]),
        (["--dataset", "DATA", "--set", "study.base={model.dim: 3}"], ["unknown setting 'model.settings.model.dim'."]),
        (["--dataset", "DATA", "--set", "study.base={seed: 7}"], ["'model.settings.seed' = 7:", "Set first_seed and seeds"]),
        (["--dataset", "DATA", "--set", "study.base={spectrum_rank: 2.9}"], ["'model.settings.spectrum_rank' = 2.9: Input"]),
        (
            ["--dataset", "DATA", "--suite", "rank", "--set", "study.ranks=[]"],
            ["'study.ranks' = []: Tuple should have at least"],
        ),
        (
            ["--dataset", "DATA", "--set", "study.noises=[0.1, -1]"],
            ["'study.noises.1' = -1: Input should be greater than or eq"],
        ),
        (
            ["--dataset", "DATA", "--set", "study.encoders=[mlp, mlp]"],
            ["'study.encoders' = ['mlp', 'mlp']: 'mlp' is there twice"],
        ),
        (["--dataset", "DATA", "--set", "study.backbones=[sgll]"], ["'study.backbones.0' = 'sgll': Did you mean 'sgl'?"]),
        (
            ["--dataset", "DATA", "--set", "study.formulations=[liftt]"],
            ["'study.formulations.0' = 'liftt': Did you mean 'lift'?"],
        ),
        (
            ["--dataset", "DATA", "--set", "study.bias_ease={l2: 0}"],
            ["'study.bias_ease' = {'l2': 0}: l2 should be greater than 0"],
        ),
        (["--dataset", "DATA", "--set", "study.bias_ease={item_power: 5}"], ["item_power = 5 should be less than or equal"]),
        (["--dataset", "DATA", "--set", "study.bias_ease={l3: 3}"], ["'study.bias_ease' = {'l3': 3}: 'l3' is none of l2, "]),
        (["--dataset", "DATA", "--config", "nowhere.yaml"], ["config file 'nowhere.yaml' cannot be read"]),
        (["--dataset", "DATA", "--dataset", "DATA", *SMALL], ["two data sets have the same name: blocks, blocks."]),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy_and_exit_code_2(
    arguments: list[str], parts: list[str], blocks: Path, tmp_path: Path
) -> None:
    rivals = tmp_path / "rivals.yaml"
    rivals.write_text("baselines: [ease]\n")
    files = {"DATA": str(blocks), "RIVALS": str(rivals)}
    named = [files.get(argument, argument) for argument in arguments]
    fails_in_one_line(call(*named, "--work", str(tmp_path / "work")), *parts)
    assert not (tmp_path / "work" / "units").exists()


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--dim", "x"], ["--parallel", "-1"]])
def test_a_value_that_is_no_such_number_is_a_usage_error(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_overlapping_splits_are_refused(blocks: Path, tmp_path: Path) -> None:
    with np.load(blocks / "trn.npz") as train:
        np.savez(blocks / "tst.npz", **{name: train[name] for name in train.files})
    fails_in_one_line(call("--dataset", str(blocks), "--work", str(tmp_path)), "interactions are in train and in test")


def test_a_comparison_prints_a_table_writes_its_result_and_goes_on_where_it_was(blocks: Path, tmp_path: Path) -> None:
    file, report = tmp_path / "out" / "result.json", tmp_path / "report"
    asked = ["--dataset", str(blocks), "--work", str(tmp_path / "work"), "--seeds", "2", *SMALL, "--baseline", "popularity"]
    result = call(*asked, "--baseline", "bm25", "--json", str(file), "--report", str(report))
    assert result.exit_code == 0, result.output
    assert "Popularity" in result.stdout
    assert "4 units of work were done" in result.stderr
    found = json.loads(file.read_text())
    assert found["dataset"] == "blocks"
    assert set(found["baselines"]) == {"popularity", "bm25"}
    assert len(found["test"]["ndcg@10"]["per_seed"]) == 2
    assert {"mean", "std"} <= set(found["test"]["ndcg@10"])
    assert {"versions", "hardware"} <= set(found)
    assert {path.name for path in report.iterdir()} == {"report.html", "results.json", "results.md"}
    again = call(*asked, "--baseline", "bm25", "--json", str(file))
    assert "0 units of work were done" in again.stderr
    assert json.loads(file.read_text()) == found


def test_flags_make_a_single_model_of_ours_and_two_data_sets_make_a_list(blocks: Path, tmp_path: Path) -> None:
    other = write_blocks(tmp_path / "others", users_per_block=8, items_per_block=8, seed=1)
    config = tmp_path / "mine.yaml"
    config.write_text("baselines: [popularity]\nseeds: 1\n")
    result = call(
        *["--dataset", str(blocks), "--dataset", str(other), "--config", str(config), "--work", str(tmp_path / "work")],
        *["--backbone", "mf", "--loss", "bpr", "--dim", "4", "--encoder", "none", "--json", str(tmp_path / "two.json")],
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "two.json").read_text())
    assert [one["dataset"] for one in found] == ["blocks", "others"]
    assert found[0]["recipe"]["settings"]["model.backbone"] == "mf"
    assert found[0]["dim"] == 4


@pytest.mark.parametrize("suite", ["all", "quick"])
def test_a_given_dimension_or_backbone_is_the_only_one_of_a_study_that_varies_it(
    suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[StudyConfig] = []
    for name in suites.ALL:
        monkeypatch.setitem(suites.STUDIES, name, lambda setup: seen.append(setup.study))  # type: ignore[arg-type]  # a dict
    for flags in ({"dim": 16, "backbone": "sgl"}, {}):
        config = settings([], [], flags, seeds=None, rival=None, baselines=[], suite=suite)
        suites.run_suite(suite, suites.Setup([], config, cast(Runner, None)))
    given, default = seen[0], seen[-1]
    assert (given.dims, given.backbones) == ((16,), ("sgl",))
    assert (given.base["model.embedding_dim"], given.base["model.backbone"]) == (16, "sgl")
    assert min(len(default.dims), len(default.backbones)) > 1


def test_the_quick_suite_fits_two_seeds_at_most_and_tells_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = settings([], [], {}, seeds=None, rival=None, baselines=[], suite="quick")
    assert config.all_seeds() == [2023, 2024]
    fitted = []

    def study(setup: suites.Setup) -> suites.Study:
        fitted.append(setup.config.all_seeds())
        return suites.Study("paper", "", "", "", {})

    for name in suites.ALL:
        monkeypatch.setitem(suites.STUDIES, name, study)  # type: ignore[arg-type]  # a dict
    folder = write_blocks(tmp_path / "bare")
    (folder / "items.jsonl.gz").unlink()  # nothing is embedded
    finished = run(config, [folder], "quick", tmp_path, 1, lambda event: None)
    assert fitted == [finished.facts["seeds"]] * 7


@pytest.mark.parametrize(
    ("flags", "members", "effect"),
    [
        (["--backbone", "ease"], ["ease"], "counterfactual_log"),
        (["--backbone", "ials", "--effect", "none"], ["factors"], "none"),
        (["--backbone", "ease", "--encoder", "mlp", "--dim", "4"], ["ease", "graph"], "counterfactual_log"),
        (
            ["--backbone", "ensemble", "--dim", "4", "--effect", "gates"],
            ["ease", "factors", "graph", "popularity", "text"],
            "gates",
        ),
        (["--effect", "counterfactual_clicks"], ["ease", "factors", "graph", "popularity", "text"], "counterfactual_clicks"),
    ],
)
def test_linear_backbones_and_the_ensemble_are_chosen_by_flags_as_well(
    flags: list[str], members: list[str], effect: str, blocks: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    asked = ["--dataset", str(blocks), "--seeds", "1", "--baseline", "popularity", "--work", str(tmp_path / "work")]
    result = call(*asked, *flags, "--json", str(file))
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["recipe"]["kind"] == "recipe"
    (weights,) = found["weights_per_seed"]
    assert sorted(weights) == members
    assert "ease" not in flags or weights.get("graph", 0) == 0
    assert found["effect"] == effect
    assert found["test"]["ndcg@10"]["mean"] > found["baselines"]["popularity"]["test"]["ndcg@10"]["mean"]


def test_a_folder_that_cannot_be_written_is_one_line(blocks: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = call("--dataset", str(blocks), "--work", str(tmp_path / "file"), *SMALL, "--baseline", "popularity")
    fails_in_one_line(result, "cannot be written", "--work")


@pytest.mark.ray
def test_a_whole_grid_is_searched_on_workers_and_its_best_place_is_tested_on_them_as_it_is_here(
    blocks: Path, tmp_path: Path
) -> None:
    model = {"name": "cllmr", "kind": "graph", "settings": {"max_epochs": 2, "batch_size": 256, "model.side_encoder": "none"}}
    grid = {"model.temperature": [0.1, 0.3], "model.embedding_dim": [4, 8]}

    def asked(place: str, model: dict[str, object], *arguments: str) -> list[str]:
        for_all = ["--dataset", str(blocks), "--seeds", "2", "--baseline", "popularity", "--set", f"model={json.dumps(model)}"]
        return [*for_all, "--work", str(tmp_path / place), "--json", str(tmp_path / f"{place}.json"), *arguments]

    searched = asked("workers", {**model, "grid": grid}, "--set", "search=grid", "--parallel", "2")
    result = call(*searched)
    assert result.exit_code == 0, result.output
    assert "4 units of work were done" in result.stderr  # the search, the model with both seeds, and popularity
    assert "0 units of work were done" in call(*searched).stderr
    found = json.loads((tmp_path / "workers.json").read_text())
    tried = found["recipe"]["tried"]
    assert [(one["model.temperature"], one["model.embedding_dim"]) for one in tried] == [(0.1, 4), (0.1, 8), (0.3, 4), (0.3, 8)]
    best = max(tried, key=lambda one: one["value"])
    settings = found["recipe"]["settings"]
    assert {name: settings[name] for name in grid} == {name: best[name] for name in grid}
    result = call(*asked("here", {**model, "settings": settings}))
    assert result.exit_code == 0, result.output
    here = json.loads((tmp_path / "here.json").read_text())
    assert (here["val"], here["test"]) == (found["val"], found["test"])
    assert here["val"]["ndcg@10"]["per_seed"][0] == pytest.approx(best["value"], abs=1e-6)


def test_the_bias_study_measures_the_recipe_itself_with_what_it_was_tuned_to_on_clean_data(
    blocks: Path, tmp_path: Path
) -> None:
    powers = ("ease_user_power", "ease_item_power", "ease_popularity_power")
    recipe = {"members": ["ease"], "ease_l2": [10, 100], "ease_side_weight": [3], **{power: [0.2] for power in powers}}
    result = call(
        *["--suite", "bias", "--dataset", str(blocks), "--seeds", "2", "--work", str(tmp_path)],
        *["--set", "study.formulations=[cllmr]", "--set", "study.propensity_strengths=[1.0]"],
        *["--set", f"model={json.dumps({'name': 'cllmr', 'kind': 'recipe', 'settings': {'recipe': recipe}})}"],
    )
    assert result.exit_code == 0, result.output
    (study,) = json.loads((tmp_path / "bias/results.json").read_text())["studies"]
    inflated, generic = study["datasets"]["blocks"]["propensity"]
    assert (inflated["formulation"], inflated["kind"], generic["kind"]) == ("cllmr", "inflated", "generic")
    assert inflated["exposure_inflated"]["mean"] > inflated["exposure_clean"]["mean"]
    assert inflated["exposure_clean"] == generic["exposure_clean"]
    assert inflated["exposure_debiased"]["mean"] < inflated["exposure_inflated"]["mean"]
    assert "5 units of work were done" in result.stderr  # tuned once, then two kinds and two seeds


def test_the_quick_suite_runs_all_studies_and_draws_them(tmp_path: Path) -> None:
    result = call("--suite", "quick", "--seeds", "1", "--work", str(tmp_path))
    assert result.exit_code == 0, result.output
    folder = tmp_path / "quick"
    found = json.loads((folder / "results.json").read_text())
    studies = {study["study"]: study for study in found["studies"]}
    assert list(studies) == ["paper", "rank", "noise", "coldstart", "coldusers", "collapse", "bias"]
    cold = studies["coldstart"]["datasets"]["planted-blocks"]["models"]
    assert cold["ridge"]["test"]["ndcg@10"]["mean"] > cold["random"]["test"]["ndcg@10"]["mean"]
    users = studies["coldusers"]["datasets"]["planted-blocks"]["models"]
    assert users["text_cosine"]["test"]["ndcg@10"]["mean"] > users["popularity"]["test"]["ndcg@10"]["mean"]
    paper = studies["paper"]["datasets"]["planted-blocks"]["models"]
    assert set(paper) == {"mf", "mf+mlp", "mf+sse", "lightgcn", "lightgcn+mlp", "lightgcn+sse"}
    assert "protocol" not in found
    assert all(PROTOCOL not in study["protocol"] for study in studies.values())
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 8
    assert "<script" not in page
    assert "## Known propensity" in (folder / "results.md").read_text()
