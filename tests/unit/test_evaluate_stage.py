"""The evaluate stage on a small world: its files, its figures against the definitions, its page, and bad input."""

import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from components.artifacts import Manifest, Store
from components.cllmr.linear.newcomers import CrossFits
from components.errors import ArtifactError, ConfigError, DataError
from components.evaluate import baselines, metrics, report, stage, summary
from components.evaluate import figures as drawings
from components.evaluate.build import _activity, _collapse_report, _new_items, _new_users
from components.evaluate.config import LABELS, EvaluateConfig
from components.ids import TEST, TRAIN
from components.ingest.dataset import Dataset
from components.stages import Stage, run_stage
from components.train.config import TrainConfig
from pipelines.summary import result_table
from serving.bundle import EVALUATED_DIRECTORY
from serving.scorer import Scorer
from tests.evaluate_parents import NUM_ITEMS, NUM_USERS, Settings, ingest, sideinfo, train, world, write_profiles

# the cheap ones: the others have their own tests
CONFIG = {"baselines": ["popularity", "random", "text_cosine", "ease"], "ease_l2": [1.0, 10.0], "bootstrap_samples": 200}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def parents(root) -> dict[str, Manifest]:
    data = ingest(root, world())
    return {"ingest": data, "sideinfo": sideinfo(root, data), "train": train(root, data)}


@pytest.fixture(scope="module")
def done(root, parents) -> Manifest:
    return stage.run(CONFIG, root, **parents)


@pytest.fixture(scope="module")
def figures(done) -> dict:
    return json.loads((done.path() / "metrics.json").read_text())


@pytest.fixture(scope="module")
def page(done) -> str:
    return (done.path() / "report.html").read_text(encoding="utf-8")


def test_the_stage_writes_figures_page_and_the_metrics_of_each_user(done, figures):
    assert set(done.files) == {"metrics.json", "report.html", "per_user.safetensors"}
    assert set(figures) >= {
        "dataset",
        "protocol",
        "results",
        "validation",
        "baselines_grid",
        "effective_rank",
        "singular_values",
        "bias",
        "lambda_curve",
        "users_evaluated",
        "debias_strength",
    }
    assert set(figures["results"]) == {"popularity", "random", "text_cosine", "ease", "factual", "debiased"}
    assert figures["users_evaluated"] == NUM_USERS
    per_user = load_file(done.path() / "per_user.safetensors")
    for model, results in figures["results"].items():
        for metric in metrics.METRICS:
            assert results[metric]["mean"] == pytest.approx(per_user[f"{model}.{metric}"].mean(), abs=1e-6)
            low, high = results[metric]["ci95"]
            assert low <= results[metric]["mean"] <= high


def test_scores_of_the_bundle_are_ranked_by_their_definitions(done, figures, parents):
    dataset = Dataset.load(parents["ingest"].path())
    model = load_file(parents["train"].path() / "bundle" / "model.safetensors")
    factual, indirect = (model["factual.users"] @ model[f"{name}.items"].T for name in ("factual", "counterfactual"))
    scores = {"factual": factual, "debiased": (factual + indirect) / 2}
    for name, table in scores.items():
        ranking = metrics.rank(lambda users, table=table: table[users], dataset.matrix(TRAIN), dataset.matrix(TEST))
        expected = {metric: round(value, 6) for metric, value in ranking.mean().items()}
        assert {metric: entry["mean"] for metric, entry in figures["results"][name].items()} == pytest.approx(
            expected, abs=2e-6
        )
    assert figures["results"]["factual"]["ndcg@10"]["mean"] > 1.5 * figures["results"]["random"]["ndcg@10"]["mean"]


def test_the_debias_curve_starts_at_the_factual_score_and_shows_the_strength_in_use(figures):
    curve = {row["debias"]: row for row in figures["lambda_curve"]}
    assert list(curve) == pytest.approx([step / 10 for step in range(11)])
    assert curve[0.0]["ndcg@10"] == figures["validation"]["factual"]["ndcg@10"]
    assert curve[0.5]["ndcg@10"] == figures["validation"]["debiased"]["ndcg@10"]


def test_debiasing_takes_exposure_from_items_with_a_large_propensity(figures):
    by_decile = figures["bias"]["propensity"]["exposure_by_decile"]
    assert sum(by_decile["debiased"][5:]) < sum(by_decile["factual"][5:])
    assert figures["bias"]["rank_shift"]["top10"] > 0


def test_what_the_profiles_favour_is_measured_and_shown(figures, page):
    found = figures["bias"]["profiles"]
    assert found["items"] == NUM_ITEMS
    assert found["sentiment"]["profile"] == pytest.approx(1 / 3, abs=1e-6)  # one of three words
    assert set(found["genericness"]) == {"text", "side"}
    assert found["groups"][0]["exposure_debiased"] == 1.0
    assert "What the profiles favour" in page
    assert "no LLM's propensity" in page.replace("&#39;", "'")


def test_without_profiles_the_page_has_no_such_part(root, parents):
    bare = sideinfo(root, parents["ingest"], profile=None)
    found = stage.run(CONFIG | {"baselines": ["popularity"]}, root, **{**parents, "sideinfo": bare})
    assert json.loads((found.path() / "metrics.json").read_text())["bias"]["profiles"] is None
    assert "What the profiles favour" not in (found.path() / "report.html").read_text()


def test_baselines_are_tuned_on_validation_and_not_on_the_test(figures):
    best = max(entry["ndcg@10"] for entry in figures["baselines_grid"]["ease"]["tried"])
    assert figures["validation"]["ease"]["ndcg@10"] == best != figures["results"]["ease"]["ndcg@10"]["mean"]


def test_users_are_grouped_by_their_training_interactions_the_least_active_first():
    groups = _activity(np.array([0, 1, 3, 9]), np.arange(3))
    assert [np.flatnonzero(chosen).tolist() for chosen in groups.values()] == [[0], [1], [2]]
    assert list(groups) == ["least active third", "middle third", "most active third"]


def test_slices_hold_every_evaluated_user_once_and_average_to_the_whole(figures):
    slices = figures["slices"].values()
    assert sum(entry["users"] for entry in slices) == NUM_USERS
    mean = sum(entry["users"] * entry["debiased"] for entry in slices) / NUM_USERS
    assert mean == pytest.approx(figures["results"]["debiased"]["ndcg@10"]["mean"], abs=1e-5)


def test_new_users_are_measured_beside_what_else_could_answer_them(figures):
    assert set(figures["new_users"]) == {"popularity", "text_cosine"}  # this bundle folds nobody in
    for name, mean in figures["new_users"].items():
        assert mean == pytest.approx({metric: entry["mean"] for metric, entry in figures["results"][name].items()}, abs=1e-6)


def test_items_are_measured_as_if_they_were_new_where_the_model_scores_new_ones(figures, page):
    assert figures["new_items"] is None
    assert "Items that are new" not in page


def test_new_items_are_ranked_by_the_texts_of_the_other_items_alone(root, parents):
    """The texts say to which block an item belongs: the kernel finds it, popularity does not."""
    dataset = Dataset.load(parents["ingest"].path())
    scorer = Scorer.load(parents["train"].path() / "bundle")
    scorer.bundle["text"] = {"encoder": "MiniLM", "power": 2.0}
    blocks = np.arange(NUM_ITEMS)[:, None] % 2 == np.arange(2)
    text = {"items": blocks.astype(np.float32), "users": np.ones((NUM_USERS, 2), dtype=np.float32)}
    seen, test = dataset.matrix(TRAIN), dataset.matrix(TEST)
    found = _new_items(EvaluateConfig(), scorer, text, seen, test)
    assert (found["items"], set(found["results"])) == (8, {"text_kernel", "text_cosine", "popularity"})
    ndcg = {name: mean["ndcg@10"] for name, mean in found["results"].items()}
    assert ndcg["text_kernel"] > ndcg["popularity"] + 0.1, ndcg
    assert ndcg["text_cosine"] > ndcg["popularity"] + 0.1, ndcg
    told = seen @ text["items"] + 100 * test @ text["items"]  # profiles of users tell more than their histories
    assert _new_items(EvaluateConfig(), scorer, {**text, "users": told}, seen, test) == found
    own = {**text, "items": np.eye(NUM_ITEMS, dtype=np.float32)}  # each is like itself alone: in a history it would be first
    nobody = 0 * seen
    by_own, by_nobody = (_new_items(EvaluateConfig(), scorer, own, one, test)["results"] for one in (seen, nobody))
    assert by_own["text_kernel"] == by_nobody["text_kernel"]
    told_apart = {**text, "items": np.ones_like(text["items"]) + 0.01 * np.random.default_rng(0).normal(size=blocks.shape)}
    scorer.profiles = [f"Brand{row % 2} thing" for row in range(NUM_ITEMS)]
    by_words = []
    for share in (0.0, 0.5):  # 0, or nothing about words in the bundle
        scorer.bundle["text"]["words"] = share
        by_words.append(_new_items(EvaluateConfig(), scorer, told_apart, seen, test)["results"]["text_kernel"]["ndcg@10"])
    assert by_words[1] > by_words[0] + 0.1
    silent = _new_items(EvaluateConfig(), scorer, {**text, "items": np.zeros_like(text["items"])}, seen, test)
    assert silent is None


def test_new_items_are_left_out_where_an_llm_wrote_and_the_page_says_why(root, parents):
    described = train(root, parents["ingest"], encoder="MiniLM")
    config = {**CONFIG, "baselines": ["popularity"]}
    pages, figures = [], []
    for llm in (False, True):
        done = stage.run(config, root, parents["ingest"], sideinfo(root, parents["ingest"], llm), described)
        pages.append((done.path() / "report.html").read_text(encoding="utf-8"))
        figures.append(json.loads((done.path() / "metrics.json").read_text())["new_items"])
    assert figures[0]["items"] == 8
    assert figures[1] is None
    assert ["<h3>Items that are new</h3>" in page for page in pages] == [True, False]
    assert ["Items that are new were left out: an LLM wrote the profiles" in page for page in pages] == [False, True]


def test_the_page_shows_what_the_score_is_made_of(page):
    row = re.search(r"<th scope=\"row\">ease</th>(.*?)</tr>", page)
    assert row is not None
    assert "0.4321" in row.group(1)
    assert "+0.75" in row.group(1)
    assert "l2 100" in row.group(1)


def test_facts_carry_the_main_figures_flat(done, figures):
    assert done.facts["debiased.ndcg@10"] == figures["results"]["debiased"]["ndcg@10"]["mean"]
    assert done.facts["effective_rank.side_items"] == figures["effective_rank"]["side_items"]["effective_rank"]
    assert done.facts["strongest_baseline"] == "ease"


def test_two_runs_write_the_same_bytes(done, root, parents):
    before = {name: (done.path() / name).read_bytes() for name in done.files}
    Store(root).discard("evaluate", done.fingerprint)
    again = stage.run(CONFIG, root, **parents)
    assert {name: (again.path() / name).read_bytes() for name in again.files} == before


def test_block_size_changes_no_figure_and_asks_for_no_other_output(done, tmp_path, parents, figures):
    again = stage.run({**CONFIG, "block_size": 7}, str(tmp_path), **parents)
    assert again.fingerprint == done.fingerprint
    assert json.loads((again.path() / "metrics.json").read_text())["results"] == figures["results"]


def test_a_bundle_that_has_learned_from_all_is_not_the_one_that_is_evaluated(root, parents, figures, page):
    again = train(root, parents["ingest"], directory=EVALUATED_DIRECTORY)  # the one that is served is not even there
    judged = stage.run(CONFIG, root, **{**parents, "train": again})
    assert json.loads((judged.path() / "metrics.json").read_text()) == figures
    said = "The one that is served has been fitted once more, with all that was chosen here, to all 12,345."
    assert said in (judged.path() / "report.html").read_text(encoding="utf-8")
    assert "fitted once more" not in page


def test_without_baselines_the_bundle_is_still_evaluated(root, parents):
    alone = stage.run({**CONFIG, "baselines": []}, root, **parents)
    figures = json.loads((alone.path() / "metrics.json").read_text())
    assert set(figures["results"]) == {"factual", "debiased"}
    assert figures["summary"][0] == "No baseline was evaluated: the figures below stand alone."
    assert alone.facts["strongest_baseline"] is None


def test_a_catalogue_too_large_for_ease_leaves_it_out_and_the_page_says_so(root, parents):
    small = stage.run({**CONFIG, "ease_max_items": 10}, root, **parents)
    figures = json.loads((small.path() / "metrics.json").read_text())
    assert "ease" not in figures["results"]
    assert "EASE was left out: 40 items are more than ease_max_items = 10." in (small.path() / "report.html").read_text()


def test_without_any_text_what_needs_it_is_left_out_and_the_page_is_whole(root, parents):
    def build(built: Path) -> dict:
        save_file(
            {name: np.zeros((count, 8), np.float32) for name, count in (("users", NUM_USERS), ("items", NUM_ITEMS))},
            built / "embeddings.safetensors",
        )
        write_profiles(built, None)
        return {"backend": "metadata", "llm": False, "encoder": "MiniLM", "model": ""}

    silent = run_stage(Stage("sideinfo", 1), Settings(backend="silent"), root, {"ingest": parents["ingest"]}, build)
    done = stage.run(
        {**CONFIG, "baselines": ["popularity", "text_cosine", "ease_text", "alpharec"]}, root, **{**parents, "sideinfo": silent}
    )
    figures = json.loads((done.path() / "metrics.json").read_text())
    assert set(figures["results"]) == {"popularity", "factual", "debiased"}
    assert figures["baselines_skipped"] == dict.fromkeys(("text_cosine", "ease_text", "alpharec"), "no item has text")
    assert figures["effective_rank"] == {}
    page = (done.path() / "report.html").read_text()
    assert "EASE + text was left out: no item has text." in page
    assert "No user and no item has text." in page


def test_rows_without_text_are_no_representations_that_could_collapse():
    rng = np.random.default_rng(0)
    text = {name: rng.normal(size=(count, 8)) + 3 for name, count in (("users", 50), ("items", 40))}
    side = {name: rng.normal(size=(len(rows), 4)) for name, rows in text.items()}
    expected = _collapse_report(*({name: rows[len(rows) // 5 :] for name, rows in kind.items()} for kind in (side, text)))
    for name, rows in text.items():
        rows[: len(rows) // 5] = 0
        side[name][: len(rows) // 5] = 5  # what stands for no text
    assert _collapse_report(side, text) == expected


def test_the_bare_backbone_has_the_name_of_the_one_that_was_trained(root, parents):
    settings = {"model": {"backbone": "simgcl", "embedding_dim": 4, "num_negatives": 8}, "max_epochs": 1}
    trained = train(root, parents["ingest"], settings=TrainConfig.parse(settings, "train"))
    done = stage.run({**CONFIG, "baselines": ["lightgcn"]}, root, **{**parents, "train": trained})
    page, figures = ((done.path() / name).read_text(encoding="utf-8") for name in ("report.html", "metrics.json"))
    table = result_table(json.loads(figures))
    label = "SimGCL (no side information)"
    assert label in list(table.columns[0].cells)
    assert f'<th scope="row">{label}</th>' in page
    assert f">{label}</text>" in page, "in the figure"
    assert label in json.loads(figures)["summary"][0]
    assert "LightGCN" not in page


def test_singular_values_that_are_all_zero_have_no_figure():
    labels = {"text_items": "Text embedding, items"}
    assert drawings.singular_values({"text_items": [0.0, 0.0]}, labels) is None
    assert drawings.singular_values({"text_items": [1.0, 0.5]}, labels) is not None


def test_a_bundle_of_other_items_is_refused(root, parents):
    other = train(root, parents["ingest"], num_items=NUM_ITEMS - 1)
    with pytest.raises(ArtifactError, match=r"\(60, 39\) are not those of data set 'blocks' \(60, 40\)"):
        stage.run(CONFIG, root, parents["ingest"], parents["sideinfo"], other)


def test_data_without_test_interactions_are_refused(root):
    table = world()
    data = ingest(root, table[table["split"] != TEST], name="no test")
    with pytest.raises(DataError, match="data set 'no test' has no test interactions: 720 are in the training split"):
        stage.run(CONFIG, root, data, sideinfo(root, data), train(root, data))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"baseline": []}, "unknown setting 'evaluate.baseline'. Did you mean 'baselines'"),
        ({"baselines": ["slim"]}, r"'evaluate.baselines.0' = 'slim'"),
        ({"ease_l2": []}, r"'evaluate.ease_l2' = \[\]"),
    ],
)
def test_settings_are_checked(root, parents, config, message):
    with pytest.raises(ConfigError, match=message):
        stage.run(config, root, **parents)


def test_every_baseline_of_the_default_settings_has_a_label_and_a_grid():
    config = EvaluateConfig()
    for name in config.baselines:
        assert LABELS[name]
        assert baselines.grid(name, config)


# -- the page -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Ids, links to them, and tags that are opened and not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        self.links += [value[1:] for name, value in attrs if name in ("href", "xlink:href") and value.startswith("#")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_page_needs_nothing_but_itself(page):
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|src=", page)


def test_the_page_is_well_formed_and_its_links_and_ids_fit(page):
    parsed = Page(page)
    assert not parsed.open
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(parsed.links) <= set(parsed.ids)
    assert {"verdict", "results", "data", "training", "debiasing", "bias", "collapse", "baselines", "settings"} <= set(
        parsed.ids
    )


def test_the_page_shows_figures_dates_of_the_data_and_says_that_no_llm_was_used(page, figures):
    assert page.count("<svg") == 6
    assert "Interactions from 1997-11-20 to 1998-04-22." in page
    assert "No LLM was used." in page
    assert f"{figures['results']['debiased']['ndcg@10']['mean']:.4f}" in page
    assert 'class="best"' in page


@pytest.mark.parametrize("shares", [np.arange(10, 0, -1) / 55, np.arange(1, 11) / 55, np.full(10, 0.1), np.eye(10)[0]])
def test_the_legend_of_the_exposure_figure_lies_on_no_bar_whatever_the_data(shares, monkeypatch):
    """Asked of the figure as it is drawn, in pixels."""
    drawn = []
    save = Figure.savefig

    def saved(figure, *arguments, **options):
        save(figure, *arguments, **options)
        axes = [one.get_tightbbox() for one in figure.axes]
        legends = [*figure.legends, *(one.get_legend() for one in figure.axes if one.get_legend())]
        drawn.append([(legend.get_window_extent(), box) for legend in legends for box in axes])

    monkeypatch.setattr(Figure, "savefig", saved)
    by_decile = {"factual": shares, "debiased": shares[::-1]}
    svg = drawings.exposure(by_decile, by_decile)
    (pairs,) = drawn
    assert len(pairs) == 2, "one legend, two axes"
    assert not [pair for pair in pairs if pair[0].overlaps(pair[1])]
    assert svg.count(">CLLMR debiased<") == 1


def test_the_page_names_the_llm_when_there_is_one(root, parents):
    banner = report.backend_banner(sideinfo(root, parents["ingest"], llm=True))
    assert banner == {
        "uses_llm": True,
        "text": "The profiles were written by an LLM (backend “vllm”, model a-model). The texts are embedded with MiniLM.",
    }


def test_names_from_the_data_are_text_and_not_markup(root):
    data = ingest(root, world(), name="<script>alert(1)</script>")
    done = stage.run({**CONFIG, "baselines": ["popularity"]}, root, data, sideinfo(root, data), train(root, data))
    page = (done.path() / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_does_not_depend_on_the_order_of_keys_in_the_figures(done, figures, parents, page):
    bundle = parents["train"].path() / "bundle"
    read = {name: json.loads((parents["train"].path() / f"{name}.json").read_text()) for name in ("curve", "training")}
    facts = report.Facts(
        metrics=figures,  # as read from the file, keys sorted
        data_card=json.loads((parents["ingest"].path() / "data_card.json").read_text()),
        popularity=Scorer.load(bundle).popularity,
        bundle=json.loads((bundle / "bundle.json").read_text()),
        manifests=parents,
        settings=EvaluateConfig.parse(CONFIG, "evaluate").identity(),
        **read,
    )
    assert report.render(facts) == page


def compared(ours: float, theirs: float, ci95: list[float], strength: float = 0.5) -> dict:
    """Figures of an evaluation against EASE alone."""
    exposure = {"coverage": 0.25, "average_popularity": 12.0}
    level = {"ndcg@10": {"mean": 0.0, "ci95": [-0.01, 0.01]}}
    return {
        "labels": LABELS,
        "results": {
            "ease": {"ndcg@10": {"mean": theirs}},
            "debiased": {"ndcg@10": {"mean": ours}},
            "factual": {"ndcg@10": {"mean": ours}},
        },
        "comparison": {
            "strongest_baseline": "ease",
            "debiased_minus": {"ease": {"ndcg@10": {"mean": ours - theirs, "ci95": ci95}}, "factual": level},
        },
        "bias": {"exposure": {"factual": exposure, "debiased": exposure}, "rank_shift": {"top10": 0.5}},
        "debias_strength": strength,
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "ci95", "sentence"),
    [
        (
            0.2,
            0.25,
            [-0.06, -0.04],
            "EASE, the strongest baseline, is ahead of CLLMR debiased by 25.0 % "
            "(NDCG@10 0.2500 against 0.2000, difference +0.0400 to +0.0600 with 95 % confidence).",
        ),
        (
            0.25,
            0.2,
            [0.04, 0.06],
            "CLLMR debiased is ahead of EASE, the strongest baseline, by 25.0 % "
            "(NDCG@10 0.2500 against 0.2000, difference +0.0400 to +0.0600 with 95 % confidence).",
        ),
        (
            0.21,
            0.2,
            [-0.01, 0.03],
            "CLLMR debiased and EASE, the strongest baseline, are level within the noise "
            "(NDCG@10 0.2100 against 0.2000, difference −0.0100 to +0.0300 with 95 % confidence).",
        ),
    ],
)
def test_the_verdict_says_who_is_ahead_also_when_it_is_the_baseline(ours, theirs, ci95, sentence):
    assert summary.sentences(compared(ours, theirs, ci95))[0] == sentence


def test_the_verdict_says_when_nothing_is_debiased():
    told = summary.sentences(compared(0.2, 0.25, [-0.06, -0.04], strength=0.0))
    assert told[1].startswith("The debias strength is 0, as no propensity was found or validation chose so")


def test_users_of_whom_little_is_known_are_ranked_at_the_strength_that_they_are_answered_with(tmp_path: Path) -> None:
    data = ingest(str(tmp_path), world())
    dataset, scorer = Dataset.load(data.path()), Scorer.load(train(str(tmp_path), data).path() / "bundle")
    texts = np.random.default_rng(3).standard_normal((NUM_USERS, 4)).astype(np.float32)
    scorer.bundle["newcomers"] = {"l2": 1.0, "popularity_weight": 0.5}
    popular = scorer.popularity_scores["factual"]
    scorer.popularity_scores = {"factual": popular, "counterfactual": popular[::-1].copy()}
    rank, found = partial(metrics.rank, seen=dataset.matrix(TRAIN)), []
    for strength, model, popularity in ((0.0, scorer.factual, popular), (1.0, scorer.counterfactual, popular[::-1])):
        scorer.debias_strength = strength
        config = EvaluateConfig()
        answered = _new_users(config, dataset, {"introductions": texts}, scorer, rank, dataset.matrix(TEST), {})
        alone = CrossFits(texts, config.seed, model).fit(popularity, 1.0, 0.5)
        assert answered["side_information"] == rank(alone.score, held_out=dataset.matrix(TEST)).mean()
        for_all = baselines.Factors(np.ones((NUM_USERS, 1), np.float32), popularity[:, None])
        assert answered["popularity"] == rank(for_all.score, held_out=dataset.matrix(TEST)).mean()
        found.append(answered["side_information"])
    assert found[0] != found[1]
