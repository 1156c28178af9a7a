"""The gate between challenger and champion, against a real registry: what is promoted, kept, refused, and why."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from components import tracking
from components.artifacts import Manifest, Store, write_json
from components.errors import ConfigError
from components.mlflow_client import connect
from components.promote import gate, stage
from components.registry import Registry, RegistryError
from components.settings import StageConfig
from components.stages import Stage, run_stage
from pipelines.config import load
from serving.bundle import EVALUATED_DIRECTORY, models_of
from tests.bundles import TINY_MODEL, stored_bundle, write_bundle

METRIC = "debiased.ndcg@10"


class Any(StageConfig):
    """Settings of the stand-ins for the stages before."""

    name: str = ""


@pytest.fixture
def root(empty_database, tmp_path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return str(tmp_path)


@pytest.fixture
def registry(root) -> Registry:
    return Registry(f"sqlite:///{root}/mlflow.db", "cllmr")


def train(
    root: str, name: str, header: dict | None = None, model: dict | None = None, golden: bool = True, evaluated=False, **ids
) -> Manifest:
    """The artifact of a train stage; `name` makes it another model. With `evaluated`, the model has no part in its figures."""

    def write(bundle: Path) -> None:
        write_bundle(bundle, header=header, model=model, golden=golden, **ids)
        if evaluated:
            write_bundle(bundle.parent / EVALUATED_DIRECTORY)
        write_json(bundle.parent / "curve.json", [{"epoch": 1, "ranking": 2.0, "ndcg@10": 0.1}, {"epoch": 2, "ranking": 1.0}])

    return stored_bundle(root, write, name)


def evaluate(
    root: str, trained: Manifest, ndcg: float | list[float], data: Manifest | None = None, popularity: float = 0.1, **exposure
) -> Manifest:
    """The artifact of an evaluate stage with given figures: one value for all of 100 users, or one for each."""
    values = np.full(100, ndcg) if isinstance(ndcg, float) else np.asarray(ndcg, dtype=np.float64)
    mean = round(float(values.mean()), 6)
    shown = {"head_share": 0.8, "coverage": 0.5, **exposure}

    def build(built: Path) -> dict:
        results = {"debiased": {"ndcg@10": {"mean": mean}}, "popularity": {"ndcg@10": {"mean": popularity}}}
        write_json(built / "metrics.json", {"results": results, "bias": {"exposure": {"debiased": shown}}})
        save_file({"users": np.arange(len(values)), METRIC: values}, built / "per_user.safetensors")
        return {METRIC: mean, "users_evaluated": len(values)}

    data = data or run_stage(Stage("ingest", 1), Any(), root, {}, lambda built: {})
    return run_stage(Stage("evaluate", 1), Any(), root, {"ingest": data, "train": trained}, build)


def promote(root: str, name: str, ndcg: float | list[float], config: dict | None = None, **more) -> dict:
    """Runs the stage for one challenger; its verdict.json."""
    trained = train(root, name)
    return verdict(stage.run(config or {}, root, trained, evaluate(root, trained, ndcg, **more)))


def verdict(manifest: Manifest) -> dict:
    return json.loads((manifest.path() / "verdict.json").read_text())


def reason(outcome: dict, check: str) -> dict:
    return next(entry for entry in outcome["reasons"] if entry["check"] == check)


def test_the_first_model_that_passes_becomes_the_champion(root, registry):
    trained = train(root, "first")
    outcome = verdict(stage.run({}, root, trained, evaluate(root, trained, 0.2)))
    assert outcome["verdict"] == "promoted"
    assert outcome["challenger"] == trained.fingerprint
    assert outcome["champion"] == {
        "version": "1",
        "fingerprint": trained.fingerprint,
        "storage_root": root,
        "bundle": f"train/{trained.fingerprint}/bundle",
        "bundle_uri": f"{root}/train/{trained.fingerprint}/bundle",
        "metrics": {METRIC: 0.2},
    }
    assert all(entry["passed"] for entry in outcome["reasons"])
    assert [entry["check"] for entry in outcome["reasons"]] == [
        "bundle",
        "not withdrawn",
        "better than popularity",
        "head exposure",
        "coverage",
    ]
    assert reason(outcome, "bundle")["text"].endswith("answers its 3 golden requests as recorded.")
    assert registry.champion().fingerprint == trained.fingerprint


def test_the_same_run_again_is_reused_although_the_champion_is_now_the_challenger(root):
    trained = train(root, "first")
    evaluated = evaluate(root, trained, 0.2)
    first = stage.run({}, root, trained, evaluated)
    again = stage.run({}, root, trained, evaluated)
    assert again == first  # the very manifest, with its time of creation
    assert len(Store(root).outputs("promote")) == 1


def test_judged_again_the_champion_stands_against_itself_and_its_promotion_is_still_found(root, monkeypatch):
    trained = train(root, "first")
    evaluated = evaluate(root, trained, 0.2)
    first = stage.run({}, root, trained, evaluated)
    with monkeypatch.context() as patch:
        patch.setenv("CLLMR_AGAIN", "evaluate,promote,serve")
        assert verdict(stage.run({}, root, trained, evaluated))["verdict"] == "unchanged"
    assert stage.run({}, root, trained, evaluated) == first


def test_a_model_that_is_no_better_than_popularity_is_kept_out_and_nothing_is_served(root, registry):
    outcome = promote(root, "poor", 0.1, popularity=0.1)
    assert outcome["verdict"] == "kept"
    assert outcome["champion"] is None
    failed = reason(outcome, "better than popularity")
    assert failed["text"] == "ndcg@10 is 0.1000; it must be above 0.1000 (popularity has 0.1000)."
    assert (failed["challenger"], failed["champion"], failed["threshold"]) == pytest.approx((0.1, 0.1, 0.1))
    assert registry.champion() is None
    assert registry.versions()[0].aliases == ("challenger",)  # a person may still promote it


def test_a_better_challenger_replaces_the_champion_which_stays_within_reach(root, registry):
    promote(root, "old", 0.2)
    outcome = promote(root, "new", 0.3)
    assert outcome["verdict"] == "promoted"
    entry = reason(outcome, "not worse than the champion")
    assert entry["champion"] == pytest.approx(0.2)
    assert entry["text"] == (
        "ndcg@10 is 0.3000, champion version 1 has 0.2000 (+50.0%); at least 0.1960 is needed. "
        "The difference lies in +0.1000 to +0.1000 (95 %)."
    )
    assert [version.aliases for version in registry.versions()] == [("challenger", "champion"), ("previous",)]
    assert registry.rollback().version == "1"


@pytest.mark.parametrize(("ndcg", "expected"), [(0.2, "promoted"), (0.1961, "promoted"), (0.1959, "kept"), (0.11, "kept")])
def test_a_challenger_may_lose_two_per_cent_of_the_champions_metric_and_no_more(root, registry, ndcg, expected):
    old = promote(root, "old", 0.2)["challenger"]
    outcome = promote(root, "new", ndcg)
    assert outcome["verdict"] == expected
    served = outcome["challenger"] if expected == "promoted" else old
    assert outcome["champion"]["fingerprint"] == served == registry.champion().fingerprint
    assert reason(outcome, "not worse than the champion")["threshold"] == pytest.approx(0.196)


def test_the_difference_to_the_champion_has_an_interval_over_the_same_users(root):
    values = np.linspace(0.0, 0.6, 100)
    promote(root, "old", values.tolist())
    outcome = promote(root, "new", np.clip(values + np.where(np.arange(100) % 2, 0.05, -0.03), 0, 1).tolist())
    text = reason(outcome, "not worse than the champion")["text"]
    assert "The difference lies in +0.00" in text  # mean +0.01 over users that differ by +0.05 or -0.03: clear, because paired


@pytest.mark.parametrize(
    ("exposure", "check", "text"),
    [
        ({"head_share": 0.99}, "head exposure", "hold 99.0% of the top-10 places; at most 98.0% are allowed"),
        ({"coverage": 0.001}, "coverage", "0.1% of the items appear in some top 10; at least 1.0% must"),
    ],
)
def test_a_model_that_shows_too_little_of_the_catalogue_is_kept_out(root, exposure, check, text):
    outcome = promote(root, "narrow", 0.3, **exposure)
    assert outcome["verdict"] == "kept"
    assert text in reason(outcome, check)["text"]


def test_checks_can_be_switched_off(root):
    off = {"min_over_popularity": -1, "max_head_exposure": 1, "min_coverage": 0}
    outcome = promote(root, "anything", 0.01, config=off, head_share=1.0, coverage=0.0)
    assert outcome["verdict"] == "promoted"
    assert all(entry["check"] != "better than popularity" for entry in outcome["reasons"])


def test_a_damaged_bundle_is_refused_with_a_verdict_and_never_registered(root, registry):
    champion = promote(root, "good", 0.2)["champion"]
    trained = train(root, "broken")
    evaluated = evaluate(root, trained, 0.9)
    weights = Path(trained.uri) / "bundle" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    outcome = verdict(stage.run({}, root, trained, evaluated))
    assert outcome["verdict"] == "kept"
    assert outcome["champion"] == champion
    assert "cannot be served" in reason(outcome, "bundle")["text"]
    assert "is not what its manifest says" in reason(outcome, "bundle")["text"]
    assert registry.find(trained.fingerprint) is None


def test_a_bundle_that_answers_its_golden_requests_differently_is_refused(root):
    trained = train(root, "skewed", golden=False)
    golden = [{"request": {"user_id": "ann", "k": 1, "debias": 0.0}, "items": ["i0"], "scores": [123.0]}]

    def build(built: Path) -> dict:
        shutil.copytree(trained.path(), built, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        write_json(built / "bundle" / "golden.json", golden)
        return {}

    skewed = run_stage(Stage("train", 2), Any(name="skewed"), root, {}, build)
    outcome = verdict(stage.run({}, root, skewed, evaluate(root, skewed, 0.9)))
    assert outcome["verdict"] == "kept"
    assert "golden request 0" in reason(outcome, "bundle")["text"]


def test_the_champion_judged_with_other_settings_stays_the_champion(root, registry):
    trained = train(root, "first")
    evaluated = evaluate(root, trained, 0.2)
    stage.run({}, root, trained, evaluated)
    outcome = verdict(stage.run({"min_over_popularity": 5.0}, root, trained, evaluated))
    assert outcome["verdict"] == "unchanged"
    assert not reason(outcome, "better than popularity")["passed"]
    assert outcome["champion"]["fingerprint"] == trained.fingerprint == registry.champion().fingerprint


def test_what_was_rolled_back_is_not_promoted_again_by_running_the_pipeline_but_by_hand(root, registry):
    old = promote(root, "old", 0.2)["challenger"]
    trained = train(root, "new")
    evaluated = evaluate(root, trained, 0.3)
    promoted = stage.run({}, root, trained, evaluated)
    registry.rollback()
    kept = stage.run({}, root, trained, evaluated)
    assert verdict(kept)["verdict"] == "kept"
    assert "A rollback took it out of service" in reason(verdict(kept), "not withdrawn")["text"]
    assert verdict(kept)["champion"]["fingerprint"] == old == registry.champion().fingerprint
    registry.promote(trained.fingerprint)
    assert stage.run({}, root, trained, evaluated) == promoted


def test_a_verdict_whose_champion_is_no_longer_served_is_made_again(root, registry):
    first, second = train(root, "first"), train(root, "second")
    evaluated = evaluate(root, first, 0.3)
    stage.run({}, root, second, evaluate(root, second, 0.2))
    stage.run({}, root, first, evaluated)
    registry.promote(second.fingerprint)  # by hand, not a rollback
    again = stage.run({}, root, first, evaluated)
    assert verdict(again)["verdict"] == "promoted"
    assert registry.champion().fingerprint == first.fingerprint


def during_each_judgement(monkeypatch, act) -> None:
    """Has `act(number)` happen while the checks of a judgement run, as another run would; not in the judgements it makes."""
    run_checks, numbers, busy = gate.run_checks, itertools.count(1), []

    def slow(*args):
        if not busy:
            busy.append(True)
            act(next(numbers))
            busy.pop()
        return run_checks(*args)

    monkeypatch.setattr(gate, "run_checks", slow)


def test_a_challenger_is_judged_again_where_another_run_promoted_a_better_model_meanwhile(root, registry, monkeypatch):
    promote(root, "old", 0.2)
    during_each_judgement(monkeypatch, lambda number: number == 1 and promote(root, "better", 0.3))
    outcome = promote(root, "between", 0.21)  # better than the old one, which is all that it was compared with at first
    assert outcome["verdict"] == "kept"
    better = registry.champion()
    assert better.metrics == {METRIC: 0.3}
    assert outcome["champion"]["fingerprint"] == better.fingerprint
    assert reason(outcome, "not worse than the champion")["champion"] == pytest.approx(0.3)
    assert len(Store(root).outputs("promote")) == 3  # none of the judgement that did not count


def test_a_challenger_that_also_beats_the_new_champion_is_promoted_over_it(root, registry, monkeypatch):
    during_each_judgement(monkeypatch, lambda number: number == 1 and promote(root, "first", 0.2))
    outcome = promote(root, "best", 0.3)  # at first it is judged against none
    assert outcome["verdict"] == "promoted"
    assert registry.champion().promoted_over == registry.previous().fingerprint
    assert reason(outcome, "not worse than the champion")["champion"] == pytest.approx(0.2)


def test_a_challenger_that_was_promoted_and_rolled_back_meanwhile_stays_out_of_service(root, registry, monkeypatch):
    old = promote(root, "old", 0.2)["challenger"]
    trained = train(root, "new")
    evaluated = evaluate(root, trained, 0.3)

    def promote_and_regret(number):
        if number == 1:
            stage.run({}, root, trained, evaluated)
            registry.rollback()

    during_each_judgement(monkeypatch, promote_and_regret)
    outcome = verdict(stage.run({}, root, trained, evaluated))
    assert outcome["verdict"] == "kept"
    assert not reason(outcome, "not withdrawn")["passed"]
    assert registry.champion().fingerprint == old


def test_a_champion_that_never_stays_ends_the_stage_and_leaves_the_registry_as_it_is(root, registry, monkeypatch):
    others = [promote(root, name, 0.2)["challenger"] for name in ("one", "two")]
    judged = []

    def swap(number):
        judged.append(number)
        registry.promote(others[number % 2 - 1])  # one, two, one, ...

    during_each_judgement(monkeypatch, swap)
    trained = train(root, "new")
    evaluated = evaluate(root, trained, 0.3)
    with pytest.raises(RegistryError, match=r"'cllmr' got another champion all 5 times .* Run the stage again"):
        stage.run({}, root, trained, evaluated)
    assert judged == [1, 2, 3, 4, 5]
    assert registry.champion().fingerprint == others[0]
    assert len(Store(root).outputs("promote")) == 2


def test_a_registry_that_lost_everything_gets_its_champion_back(root, registry, empty_database):
    trained = train(root, "first")
    evaluated = evaluate(root, trained, 0.2)
    stage.run({}, root, trained, evaluated)
    shutil.copy(empty_database, Path(root) / "mlflow.db")
    assert registry.champion() is None
    assert verdict(stage.run({}, root, trained, evaluated))["verdict"] == "promoted"
    assert registry.champion().fingerprint == trained.fingerprint


def test_a_champion_whose_storage_root_was_renamed_is_where_it_lies_now(root, tmp_path):
    promote(f"{root}/old", "poor", 0.2)
    trained = train(f"{root}/old", "first")
    promoted = stage.run({}, f"{root}/old", trained, evaluate(f"{root}/old", trained, 0.3))

    def at(name: str) -> Manifest:
        """The same run where the store lies now."""
        place = f"{root}/{name}"
        return stage.run({}, place, again := train(place, "first"), evaluate(place, again, 0.3))

    def aliases(name: str) -> list:
        return [version.aliases for version in Registry(f"sqlite:///{root}/{name}/mlflow.db", "cllmr").versions()]

    before = aliases("old")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = at("new")
    assert (verdict(moved)["verdict"], verdict(moved)["champion"]["storage_root"]) == ("unchanged", f"{root}/new")
    champion = Registry(f"sqlite:///{root}/new/mlflow.db", "cllmr").champion()
    assert Store(champion.storage_root).find("train", champion.fingerprint) is not None
    assert aliases("new") == before, "none moved"
    assert at("new") == moved
    (tmp_path / "new").rename(tmp_path / "old")
    assert verdict(at("old"))["champion"]["storage_root"] == f"{root}/old"
    assert at("old") == promoted


def test_a_champion_that_was_built_again_in_an_object_store_is_told_where_its_bundle_lies_now(root, tmp_path, monkeypatch):
    remote, settings = (tmp_path / "bucket").as_uri(), {"tracking_uri": f"sqlite:///{root}/mlflow.db"}
    (tmp_path / "bucket").mkdir()
    monkeypatch.setenv("CLLMR_CACHE", str(tmp_path / "cache"))
    first = train(remote, "first")
    stage.run(settings, remote, first, evaluate(remote, first, 0.3))
    monkeypatch.setenv("CLLMR_AGAIN", "train")
    again = train(remote, "first")
    monkeypatch.delenv("CLLMR_AGAIN")
    assert again.place != first.place
    unchanged = stage.run(settings, remote, again, evaluate(remote, again, 0.3))
    assert verdict(unchanged)["champion"]["bundle_uri"] == f"{again.uri}/bundle"
    assert Registry(settings["tracking_uri"], "cllmr").champion().bundle_uri == f"{again.uri}/bundle"


USERS, ITEMS = ["ann", "bob", "cat"], ["i0", "i1", "i2", "i3"]


def ingest(root: str, users: list[str], items: list[str], interactions: list[tuple[str, str, str]]) -> Manifest:
    """A data set: (user_id, item_id, split) triples."""

    def build(built: Path) -> dict:
        rows = pd.DataFrame(interactions, columns=["user_id", "item_id", "split"])
        rows["user"] = rows["user_id"].map(users.index).astype("int32")
        rows["item"] = rows["item_id"].map(items.index).astype("int32")
        rows["rating"], rows["timestamp"] = np.float32("nan"), np.int64(0)
        rows.to_parquet(built / "interactions.parquet")
        for kind, ids in (("user", users), ("item", items)):
            table = pd.DataFrame({kind: np.arange(len(ids), dtype="int32"), f"{kind}_id": ids, "title": ids})
            table.to_parquet(built / f"{kind}s.parquet")
        write_json(built / "data_card.json", {"name": "tiny"})
        return {}

    return run_stage(Stage("ingest", 1), Any(name=f"{users}{items}{interactions}"), root, {}, build)


EVERYTHING = {"seen_indptr": np.array([0, 4, 8, 12]), "seen_items": np.tile(np.arange(4, dtype=np.int32), 3)}


@pytest.mark.parametrize("served", [{}, {"model": EVERYTHING, "evaluated": True}], ids=["one bundle", "fitted again to all"])
def test_a_champion_of_other_data_is_scored_again_on_these_over_the_users_both_know(root, registry, served):
    # The tiny bundle ranks for ann at λ = 0.5: m = (4, 3, 2, 1), m* = 2.5, gates (.5, .25, .75, 1):
    # (4 - 1.25) * .5 = 1.375, .4375, .5625, -.25 -> i0 i2 i1 i3. For bob: m = (2, 3, 4, 1): .375, .4375, 2.0625, -.25.
    old_data = ingest(root, USERS, ITEMS, [("ann", "i0", "train")])
    champion = train(root, "champion", **served)
    stage.run({}, root, champion, evaluate(root, champion, 0.9, data=old_data))
    # ann: i0 is masked, her test item i2 comes first: NDCG 1. bob: the champion was trained on i1, so he says nothing of it.
    # cat: m = (4, 4, 4, 0), m* = 3: i2 comes first: NDCG 1. dan is new.
    # The new item i9 comes before all others by row; the champion does not know it and cannot recommend it.
    triples = [
        ("ann", "i0", "train"),
        ("ann", "i2", "test"),
        ("bob", "i2", "train"),
        ("bob", "i1", "test"),
        ("cat", "i2", "test"),
        ("dan", "i9", "test"),
    ]
    new_data = ingest(root, ["ann", "bob", "cat", "dan"], ["i9", *ITEMS], triples)
    challenger = train(root, "challenger")
    outcome = verdict(stage.run({}, root, challenger, evaluate(root, challenger, [0.8, 0.1, 0.6, 1.0], data=new_data)))
    assert outcome["verdict"] == "kept"
    entry = reason(outcome, "not worse than the champion")
    assert entry["champion"] == pytest.approx(1.0)
    assert entry["challenger"] == pytest.approx(0.7)  # of ann and cat
    assert "is scored again on these, over the 2 users (50%) whom it knows and of whose test interactions" in entry["text"]


@pytest.mark.parametrize("ndcg", [0.1999, 0.15])
def test_under_the_incremental_preset_no_challenger_that_ranks_worse_replaces_the_champion(root, registry, ndcg):
    settings = load("incremental").promote.model_dump()
    assert settings["needs_comparison"]
    first = promote(root, "old", 0.2, settings)["challenger"]
    outcome = promote(root, "new", ndcg, settings)
    assert (outcome["verdict"], registry.champion().fingerprint) == ("kept", first)
    assert promote(root, "equal", 0.2, settings)["verdict"] == "promoted"


@pytest.mark.parametrize(("settings", "expected"), [({}, "promoted"), ({"needs_comparison": True}, "kept")])
def test_data_with_too_few_known_users_are_not_compared_and_the_verdict_says_so(root, registry, settings, expected):
    champion = train(root, "champion")
    stage.run({}, root, champion, evaluate(root, champion, 0.9, data=ingest(root, USERS, ITEMS, [])))
    triples = [(user, "i1", "test") for user in ("ann", "dan", "eve")]
    new_data = ingest(root, ["ann", "dan", "eve"], ITEMS, triples)
    challenger = train(root, "challenger")
    outcome = verdict(stage.run(settings, root, challenger, evaluate(root, challenger, [0.2, 0.2, 0.2], data=new_data)))
    assert outcome["verdict"] == expected
    assert registry.champion().fingerprint == (challenger if expected == "promoted" else champion).fingerprint
    text = reason(outcome, "not worse than the champion")["text"]
    assert text.startswith(
        "Not compared with champion version 1: it was evaluated on other data and can be judged for 33% of these users (the "
        "others it does not know, or it has learned from what tests them), 50% are needed."
    )
    assert ("cllmr promote" in text) == (expected == "kept")


def test_a_champion_whose_bundle_is_gone_is_not_compared_on_other_data(root):
    champion = train(root, "champion")
    stage.run({}, root, champion, evaluate(root, champion, 0.9, data=ingest(root, USERS, ITEMS, [])))
    shutil.rmtree(champion.uri)
    new_data = ingest(root, USERS, ITEMS, [("ann", "i1", "test")])
    challenger = train(root, "challenger")
    outcome = verdict(stage.run({}, root, challenger, evaluate(root, challenger, [0.2], data=new_data)))
    assert "its bundle is no longer in the store" in reason(outcome, "not worse than the champion")["text"]


def test_without_the_champions_evaluation_its_recorded_mean_is_used(root):
    champion = train(root, "champion")
    evaluated = evaluate(root, champion, 0.3)
    stage.run({}, root, champion, evaluated)
    shutil.rmtree(evaluated.uri)
    outcome = promote(root, "challenger", 0.2)
    entry = reason(outcome, "not worse than the champion")
    assert (outcome["verdict"], entry["champion"]) == ("kept", pytest.approx(0.3))
    assert "The difference" not in entry["text"]


def test_the_challenger_is_tracked_with_settings_figures_and_learning_curve(root, registry):
    trained = train(root, "first")
    stage.run({}, root, trained, evaluate(root, trained, 0.2))
    client = connect(registry.tracking_uri)
    run = client.get_run(client.get_model_version("cllmr", "1").run_id)
    assert run.data.tags["cllmr.key"] == trained.fingerprint
    assert run.data.params["train.name"] == "first"
    assert run.data.metrics["debiased.ndcg_at_10"] == pytest.approx(0.2)
    assert [point.value for point in client.get_metric_history(run.info.run_id, "ranking")] == [2.0, 1.0]


def test_a_tracker_that_is_down_does_not_keep_a_good_model_out(root, registry, monkeypatch):
    def down(*args, **kwargs):
        raise ConnectionError("tracker is down")

    monkeypatch.setattr(tracking, "_start_run", down)
    assert promote(root, "first", 0.2)["verdict"] == "promoted"
    assert registry.champion().version == "1"


def test_a_registry_that_is_down_stops_the_stage_and_leaves_nothing_behind(root, monkeypatch):
    trained = train(root, "first")
    evaluated = evaluate(root, trained, 0.2)
    monkeypatch.setattr(Registry, "promote", lambda *args, **more: (_ for _ in ()).throw(RegistryError("registry is down.")))
    with pytest.raises(RegistryError, match="registry is down"):
        stage.run({}, root, trained, evaluated)
    assert Store(root).outputs("promote") == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_relative_los": 0.1}, r"unknown setting 'promote.max_relative_los'. Did you mean 'max_relative_loss'"),
        ({"primary_metric": "ndcg@7"}, r"'promote.primary_metric' = 'ndcg@7'"),
        ({"champion": "abcd"}, r"unknown setting 'promote.champion'"),
    ],
)
def test_settings_are_checked_and_the_registrys_state_is_no_setting(root, config, message):
    trained = train(root, "first")
    with pytest.raises(ConfigError, match=message):
        stage.run(config, root, trained, evaluate(root, trained, 0.2))


def test_the_tiny_bundle_has_the_scores_the_comments_above_rely_on():
    factual, counterfactual = models_of(TINY_MODEL)
    everybody = np.arange(3)
    scores = (factual.score(everybody) + counterfactual.score(everybody)) / 2  # λ = 0.5
    assert scores[0] == pytest.approx([0.6875, 0.21875, 0.28125, -0.125])
    assert scores[1] == pytest.approx([0.375, 0.4375, 2.0625, -0.25])
