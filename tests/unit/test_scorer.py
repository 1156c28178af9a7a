"""The scorer against numbers computed by hand on the tiny bundle (3 users, 4 items, 2 dimensions and the offset)."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from components.cllmr.linear.scores import LinearScores
from components.errors import ArtifactError, ConfigError
from components.ids import UNKNOWN
from serving.bundle import find_bundle
from serving.ranking import Candidates, rank_of, top_k
from serving.scorer import Effect, Scorer, make_golden
from tests.bundles import TINY_ITEMS, TINY_USERS, stored_bundle, write_bundle, write_random_bundle

EVERYBODY = np.arange(3)

# m_ui = a_u . b_i, with a = [1 0 1], [0 1 1], [1 1 1] and b = [2 0 2], [1 1 2], [0 2 2], [-1 -1 2]:
# [4 3 2 1], [2 3 4 1], [4 4 4 0], and m*_u = a_u . [0.5 0.5 2]: 2.5, 2.5, 3;
# times g_i = 0.5, 0.25, 0.75, 1 and g_u = 0.5, 1, 0.25
FACTUAL = np.array([[1.0, 0.375, 0.75, 0.5], [1.0, 0.75, 3.0, 1.0], [0.5, 0.25, 0.75, 0.0]])
DIRECT = np.array([[0.625, 0.3125, 0.9375, 1.25], [1.25, 0.625, 1.875, 2.5], [0.375, 0.1875, 0.5625, 0.75]])
DEBIASED_HALF = np.array(
    [[0.6875, 0.21875, 0.28125, -0.125], [0.375, 0.4375, 2.0625, -0.25], [0.3125, 0.15625, 0.46875, -0.375]]
)
INDIRECT = np.array([[0.375, 0.0625, -0.1875, -0.75], [-0.25, 0.125, 1.125, -1.5], [0.125, 0.0625, 0.1875, -0.75]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer.load(write_bundle(tmp_path_factory.mktemp("tiny") / "bundle"))


@pytest.fixture(scope="module")
def random_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_bundle(tmp_path_factory.mktemp("random") / "bundle", num_users=40, num_items=300, embedding_dim=16)


@pytest.mark.parametrize(
    ("effect", "debias", "expected"),
    [
        ("factual", None, FACTUAL),
        ("direct", None, DIRECT),
        ("debiased", None, DEBIASED_HALF),  # the bundle's own strength is 0.5
        ("debiased", 0.5, DEBIASED_HALF),
        ("debiased", 0.0, FACTUAL),
        ("debiased", 1.0, INDIRECT),
        ("debiased", 0.2, FACTUAL - 0.2 * DIRECT),
    ],
)
def test_scores_equal_the_hand_computed_tables(
    tiny: Scorer, effect: Effect, debias: float | None, expected: np.ndarray
) -> None:
    scores = tiny.score_all(EVERYBODY, debias, effect)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_effects_equal_the_hand_computed_tables(tiny: Scorer) -> None:
    for user in range(3):
        effects = tiny.effects(user, np.arange(4))
        np.testing.assert_allclose(effects.total, FACTUAL[user], atol=1e-12)
        np.testing.assert_allclose(effects.direct, DIRECT[user], atol=1e-12)
        np.testing.assert_allclose(effects.indirect, INDIRECT[user], atol=1e-12)
        np.testing.assert_allclose(effects.debiased, DEBIASED_HALF[user], atol=1e-12)


def test_the_total_effect_is_the_direct_plus_the_indirect_effect(random_dir: Path) -> None:
    scorer = Scorer.load(random_dir)
    for user in range(scorer.num_users):
        effects = scorer.effects(user, np.arange(scorer.num_items))
        np.testing.assert_allclose(effects.total, effects.direct + effects.indirect, atol=1e-6)


@pytest.mark.parametrize("debias", [None, 0.0, 0.3, 1.0])
def test_the_served_inner_product_equals_the_definition(random_dir: Path, debias: float | None) -> None:
    scorer = Scorer.load(random_dir)
    model = {name: tensor.astype(np.float64) for name, tensor in load_file(random_dir / "model.safetensors").items()}
    strength = scorer.debias_strength if debias is None else debias

    def dense(name: str) -> np.ndarray:
        table = model[f"{name}.users"] @ model[f"{name}.items"].T
        for user in range(scorer.num_users):
            mine = slice(*model[f"{name}.history.indptr"][user : user + 2].astype(int))
            for place, value in zip(model[f"{name}.history.indices"][mine], model[f"{name}.history.data"][mine], strict=True):
                row = slice(*model[f"{name}.weights.indptr"][int(place) : int(place) + 2].astype(int))
                table[user, model[f"{name}.weights.indices"][row].astype(int)] += value * model[f"{name}.weights.data"][row]
        return table

    defined = (1 - strength) * dense("factual") + strength * dense("counterfactual")
    np.testing.assert_allclose(scorer.score_all(np.arange(scorer.num_users), debias), defined, atol=1e-5)
    by_pair = scorer.effects(7, np.arange(scorer.num_items), debias).debiased
    np.testing.assert_allclose(scorer.score_all(np.array([7]), debias)[0], by_pair, atol=1e-5)


def test_a_ranking_is_the_brute_force_ranking(random_dir: Path) -> None:
    scorer = Scorer.load(random_dir)
    for user in range(scorer.num_users):
        scores = scorer.score_all(np.array([user]))[0]
        brute = sorted(range(scorer.num_items), key=lambda row: (-scores[row], row))[:20]
        assert scorer.recommend(user, 20).rows.tolist() == brute


def test_rankings_leave_out_what_is_excluded_denied_or_not_allowed(tiny: Scorer) -> None:
    assert tiny.recommend(1, 4).rows.tolist() == [2, 1, 0, 3]
    assert tiny.recommend(1, 4, exclude=[2]).rows.tolist() == [1, 0, 3]
    assert tiny.recommend(1, 4, exclude=[2], deny=[0]).rows.tolist() == [1, 3]
    assert tiny.recommend(1, 4, allow=[0, 3, UNKNOWN]).rows.tolist() == [0, 3]
    assert tiny.recommend(1, 4, allow=[0, 3], deny=[0, 3]).rows.tolist() == []
    assert tiny.recommend(1, 4, exclude=[UNKNOWN]).rows.tolist() == [2, 1, 0, 3]
    assert tiny.recommend(1, 2, debias=0.0).rows.tolist() == [2, 0]  # items 0 and 3 tie at 1.0: the lower row comes first


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_equal_scores_rank_by_item_row_also_at_the_last_place() -> None:
    scores = np.array([1, 3, 2, 3, 2, 2], dtype=np.float32)
    everything = Candidates(6, rows())
    assert top_k(scores, 3, everything).rows.tolist() == [1, 3, 2]
    assert top_k(scores, 4, everything).rows.tolist() == [1, 3, 2, 4]
    assert top_k(scores, 99, everything).rows.tolist() == [1, 3, 2, 4, 5, 0]
    assert top_k(scores, 0, everything).rows.tolist() == []
    assert top_k(scores, 2, Candidates(6, rows(), rows())).rows.tolist() == []
    assert rank_of(scores, np.array([4, 1, 0]), everything).tolist() == [4, 1, 6]
    assert rank_of(scores, np.array([4]), Candidates(6, rows(1, 3))).tolist() == [2]


@pytest.mark.parametrize("num_items", [1, 127, 128, 129, 5_000])
@pytest.mark.parametrize("values", [2, 50, None])
def test_the_best_of_many_are_those_of_a_full_sort_ties_and_filters_included(num_items: int, values: int | None) -> None:
    rng = np.random.default_rng(num_items)
    for k in (0, 1, 7, 20, num_items, num_items + 1):
        scores = (rng.standard_normal(num_items) if values is None else rng.integers(-values, values, num_items)).astype(
            np.float32
        )
        for share in (0.0, 0.002, 0.5, 1.0):
            wanted = rng.random(num_items) < share
            rest, given = np.flatnonzero(~wanted), scores.copy()
            expected = sorted(np.flatnonzero(wanted).tolist(), key=lambda row: (-scores[row], row))[:k]
            some = np.concatenate((np.flatnonzero(wanted), rest[::2]))
            for candidates in (Candidates(num_items, rest), Candidates(num_items, rest[::2], some)):
                assert len(candidates) == wanted.sum()
                np.testing.assert_array_equal(candidates.contains(np.arange(num_items)), wanted)
                found = top_k(scores, k, candidates)
                assert found.rows.tolist() == expected
                np.testing.assert_array_equal(found.scores, scores[expected])
            np.testing.assert_array_equal(scores, given)


@pytest.mark.parametrize("k", [1, 20])
def test_the_last_of_many_are_looked_at_too(k: int) -> None:
    scores = np.arange(5_000, dtype=np.float32)  # no whole number of groups: a few at the end are in none
    assert top_k(scores, k).rows.tolist() == list(range(4_999, 4_999 - k, -1))


@pytest.mark.parametrize("values", [2, 50, None])
def test_ranks_are_those_of_a_full_sort_ties_and_filters_included(values: int | None) -> None:
    rng = np.random.default_rng(3)
    scores = (rng.standard_normal(300) if values is None else rng.integers(-values, values, 300)).astype(np.float32)
    scores[::7] *= np.float32(-0.0)  # equal to 0
    for share in (0.0, 0.002, 0.5, 1.0):
        wanted = rng.random(300) < share
        ordered = sorted(np.flatnonzero(wanted).tolist(), key=lambda row: (-scores[row], row))
        expected = [ordered.index(row) + 1 if row in ordered else 0 for row in range(300)]
        assert rank_of(scores, np.arange(300), Candidates(300, np.flatnonzero(~wanted))).tolist() == expected


def test_a_history_is_scored_by_the_members_that_need_nothing_else(random_dir: Path) -> None:
    """One such member of weight 1: the standardised sum of its rows, for the factual and the counterfactual model."""
    scorer = Scorer.load(random_dir)
    items = np.array([3, 17, 200])

    def standardised_sum(model: LinearScores) -> np.ndarray:
        total = model.weights.toarray()[items].sum(axis=0)
        return (total - total.mean()) / total.std()

    factual, counterfactual = (standardised_sum(model) for model in (scorer.factual, scorer.counterfactual))
    for debias in (0.0, 0.3, 1.0):
        expected = (1 - debias) * factual + debias * counterfactual
        np.testing.assert_allclose(scorer.fold_in([*items, UNKNOWN], debias), expected, atol=1e-5)
    assert scorer.folds_in
    np.testing.assert_array_equal(scorer.fold_in([]), 0.0)


def test_without_a_history_the_most_popular_come_first_with_the_weight_and_the_log_that_each_model_has(tmp_path: Path) -> None:
    weights = {"members": {"popularity": 0.3}, "counterfactual_members": {"popularity": 0.7}}
    scorer = Scorer.load(directory := write_random_bundle(tmp_path / "bundle", **weights))
    logarithms = np.log1p(scorer.popularity)
    factual = 0.3 * (logarithms - logarithms.mean()) / logarithms.std()
    counterfactual = 0.7 * load_file(directory / "model.safetensors")["counterfactual_popularity"]
    assert np.abs(factual - counterfactual).max() > 0.1
    for debias in (0.0, 0.4, 1.0):
        expected = (1 - debias) * factual + debias * counterfactual
        np.testing.assert_allclose(scorer.fold_in([], debias), expected, atol=1e-6)


def test_a_model_of_factors_alone_folds_nobody_in(tiny: Scorer) -> None:
    assert not tiny.folds_in


def test_recent_items_are_more_history_with_the_users_own_scale(random_dir: Path) -> None:
    scorer = Scorer.load(random_dir)
    user, debias = 5, 0.4
    seen = scorer.seen(user)
    recent = np.setdiff1d([1, 30, 77], seen)
    expected = scorer.score_all(np.array([user]), debias)[0].astype(np.float64)
    for model, share in ((scorer.factual, 1 - debias), (scorer.counterfactual, debias)):
        scale = model.history[[user]].data
        assert np.ptp(scale) < 1e-6
        expected += share * scale[0] * model.weights.toarray()[recent].sum(axis=0)
    np.testing.assert_allclose(scorer.score_user(user, debias, [*recent, seen[0], UNKNOWN]), expected, atol=1e-5)
    np.testing.assert_array_equal(scorer.score_user(user, debias), scorer.score_all(np.array([user]), debias)[0])


def test_seen_items_are_the_training_interactions(tiny: Scorer) -> None:
    assert [tiny.seen(user).tolist() for user in range(3)] == [[0], [1, 2], []]


def test_similar_items_are_the_nearest_by_cosine_of_their_vectors(tiny: Scorer) -> None:
    # directions [2 0], [1 1], [0 2], [-1 -1]: cosines to item 0 are 1, 0.7071, 0, -0.7071
    nearest = tiny.similar_items(0, 3)
    assert nearest.rows.tolist() == [1, 2, 3]
    np.testing.assert_allclose(nearest.scores, [np.sqrt(0.5), 0, -np.sqrt(0.5)], atol=1e-6)
    assert tiny.similar_items(0, 3, among=[0, 3]).rows.tolist() == [3]


@pytest.mark.parametrize("debias", [-0.1, 1.1, float("nan")])
def test_a_debias_strength_outside_zero_to_one_is_refused(tiny: Scorer, debias: float) -> None:
    with pytest.raises(ConfigError, match=r"debias = .* is not allowed.*0 \(factual\) to 1"):
        tiny.score_all(EVERYBODY, debias)


def test_an_unknown_effect_is_refused_with_the_nearest_one(tiny: Scorer) -> None:
    with pytest.raises(ConfigError, match=r"unknown effect 'directt'\. Did you mean 'direct'"):
        tiny.score_all(EVERYBODY, effect="directt")  # type: ignore[arg-type]  # what a caller without types may write


def test_the_attributes_describe_the_bundle(tiny: Scorer) -> None:
    assert (tiny.num_users, tiny.num_items, tiny.name, tiny.fingerprint) == (3, 4, "tiny", "0123456789abcdef")
    assert tiny.user_vocabulary.ids == TINY_USERS
    assert tiny.item_vocabulary.row("i2") == 2
    assert tiny.titles[3] == "Dumbo (1941)"
    assert tiny.profiles[1] == "A dark comedy."


# -- golden requests --------------------------------------------------------------------------------------------------


def test_golden_requests_are_what_the_bundle_answers(tiny: Scorer) -> None:
    golden = make_golden(tiny, num_users=3, k=2, seed=0)
    assert golden == [
        {"request": {"user_id": "ann", "k": 2, "debias": 0.5}, "items": ["i2", "i1"], "scores": [0.28125, 0.21875]},
        {"request": {"user_id": "bob", "k": 2, "debias": 0.0}, "items": ["i0", "i3"], "scores": [1.0, 1.0]},
        {"request": {"user_id": "cat", "k": 2, "debias": 1.0}, "items": ["i2", "i0"], "scores": [0.1875, 0.125]},
    ]


def test_golden_requests_are_replayed_and_counted(random_dir: Path) -> None:
    assert Scorer.load(random_dir).replay_golden() == 8


def test_a_golden_request_may_swap_items_of_equal_score(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "bundle")
    golden = json.loads((directory / "golden.json").read_text())
    golden[1]["items"].reverse()  # i0 and i3 both score 1.0
    (directory / "golden.json").write_text(json.dumps(golden))
    assert Scorer.load(directory).replay_golden() == 3


def _shift_score(golden: list[dict[str, Any]]) -> None:
    golden[0]["scores"][1] += 1e-3


def _swap_items(golden: list[dict[str, Any]]) -> None:
    golden[0]["items"].reverse()


def _pass_over_item(golden: list[dict[str, Any]]) -> None:
    golden[0]["items"][1], golden[0]["scores"][1] = "i3", float(DEBIASED_HALF[0, 3])  # its own score, but third


def _drop_item(golden: list[dict[str, Any]]) -> None:
    golden[0]["items"].pop()


def _unknown_item(golden: list[dict[str, Any]]) -> None:
    golden[0]["items"][0] = "nope"


def _no_request(golden: list[dict[str, Any]]) -> None:
    del golden[0]["request"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_shift_score, "scores differ at place 2"),
        (_swap_items, "scores differ at place"),
        (_pass_over_item, "ranking differ at place 2"),
        (_drop_item, "3 items ranked, 2 recorded"),
        (_unknown_item, "not in the bundle"),
        (_no_request, "cannot be read: KeyError"),
    ],
)
def test_a_golden_request_with_another_answer_is_refused(tmp_path: Path, damage: Any, told: str) -> None:
    directory = write_bundle(tmp_path / "bundle")
    golden = json.loads((directory / "golden.json").read_text())
    damage(golden)
    (directory / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(ArtifactError, match=f"golden request 0 of bundle 0123456789abcdef: .*{told}.*cllmr run --from train"):
        Scorer.load(directory).replay_golden()


def test_a_bundle_without_golden_requests_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no golden requests \(golden.json\)"):
        Scorer.load(write_bundle(tmp_path / "bundle", golden=False)).replay_golden()


# -- damaged bundles --------------------------------------------------------------------------------------------------


def _with(name: str, row: Any, value: float) -> dict[str, np.ndarray]:
    from tests.bundles import TINY_MODEL

    tensor = TINY_MODEL[name].copy()
    tensor[row] = value
    return {name: tensor}


def _sparse(**changes: Any) -> dict[str, np.ndarray]:
    """Weights of one history entry to items 0 and 1."""
    kinds = {"data": np.float32, "indices": np.int32, "indptr": np.int64}
    parts = {"data": [1.0, 2.0], "indices": [0, 1], "indptr": [0, 2], **changes}
    return {f"factual.weights.{name}": np.array(values, dtype=kinds[name]) for name, values in parts.items()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": _with("factual.items", (1, 2), np.nan)}, r"factual\.items has 1 values that are not finite"),
        ({"model": _with("counterfactual.items", (0, 0), np.inf)}, r"counterfactual\.items has 1 values that are not finite"),
        ({"model": _with("item_vectors", (0, 0), np.inf)}, "1 values in item_vectors that are not finite"),
        ({"model": _with("propensity", 0, -0.5)}, r"propensities from -0.5, allowed are 0 and more"),
        ({"model": _with("popularity", 0, -1)}, r"negative popularity \(-1\)"),
        ({"model": {"counterfactual_popularity": np.ones(3, np.float32)}}, r"counterfactual_popularity of shape \(3,\)"),
        ({"model": _with("seen_items", 0, 4)}, "names items that do not exist"),
        ({"model": _with("seen_indptr", 1, 4)}, "not in order"),
        ({"model": {"factual.items": np.ones((4, 2), np.float32)}}, r"factual\.items have shapes \(3, 3\) and \(4, 2\)"),
        (
            {"model": {"counterfactual.items": np.ones((5, 3), np.float32)}},
            r"counterfactual\.weights is no sparse matrix|5 items",
        ),
        ({"model": {"propensity": np.ones(4, np.float64)}}, "type float64, expected .* float32"),
        ({"model": {"factual.users": np.ones((3, 3), np.float64)}}, r"factual\.users has shape \(3, 3\) and type float64"),
        ({"model": _sparse(indices=[0, 4])}, r"factual\.weights is no sparse matrix of shape \(1, 4\)"),
        ({"model": _sparse(indptr=[0, 3])}, r"factual\.weights is no sparse matrix of shape \(1, 4\)"),
        ({"model": _sparse(data=[1.0])}, r"factual\.weights is no sparse matrix of shape \(1, 4\)"),
        ({"users": ["ann", "bob"]}, r"users.json holds 2 ids, the model has 3 rows"),
        ({"users": ["ann", "bob", "bob"]}, "holds 1 ids twice"),
        ({"users": ["ann", "bob", 7]}, "holds an id that is no string"),
        ({"items": TINY_ITEMS[:3]}, r"items.json holds 3 ids, the model has 4 rows"),
        ({"items": [*TINY_ITEMS[:3], {"item_id": "i3"}]}, "row 3 is no object with item_id and title"),
        ({"header": {"schema_version": 1}}, "schema_version is 1, this version of the platform reads 2"),
        ({"header": {"embedding_dim": "2"}}, "embedding_dim = '2'"),
        ({"header": {"debias_strength": 1.5}}, "debias_strength = 1.5, allowed are 0 to 1"),
        ({"header": {"effect": 1}}, "effect = 1"),
        ({"header": {"history_blocks": {"factual": []}}}, "history_blocks = {'factual': \\[\\]}"),
        (
            {"header": {"history_blocks": {"factual": [["ease", 1.0]], "counterfactual": []}}},
            "1 factual history_blocks of 4 items",
        ),
    ],
)
def test_a_bundle_that_does_not_fit_together_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        Scorer.load(write_bundle(tmp_path / "bundle", golden=False, **changes))


@pytest.mark.parametrize("name", ["model.safetensors", "bundle.json", "users.json", "items.json"])
def test_a_bundle_that_lacks_a_file_or_has_half_of_it_is_refused(tmp_path: Path, name: str) -> None:
    directory = write_bundle(tmp_path / "bundle")
    file = directory / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=rf"{name} cannot be read"):
        Scorer.load(directory)
    file.unlink()
    with pytest.raises(ArtifactError, match=rf"{name} cannot be read"):
        Scorer.load(directory)


def test_a_bundle_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "bundle")
    model = load_file(directory / "model.safetensors")
    for name, told in (("seen_items", "lacks seen_items"), ("factual.items", r"factual\.items is missing")):
        del model[name]
        save_file(model, str(directory / "model.safetensors"))
        with pytest.raises(ArtifactError, match=told):
            Scorer.load(directory)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[str, str]:
    root = str(tmp_path / "store")
    return root, stored_bundle(root, write_random_bundle).fingerprint


def test_a_bundle_is_found_in_the_store_by_its_fingerprint(stored: tuple[str, str]) -> None:
    assert Scorer.load(find_bundle(*stored)).replay_golden() == 8


def test_a_single_flipped_bit_in_a_stored_bundle_is_refused(stored: tuple[str, str]) -> None:
    root, fingerprint = stored
    file = Path(root) / "train" / fingerprint / "bundle" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.safetensors is not what its manifest says"):
        find_bundle(root, fingerprint)


def test_a_bundle_that_is_not_in_the_store_is_named(stored: tuple[str, str]) -> None:
    root, fingerprint = stored
    shutil.rmtree(Path(root) / "train" / fingerprint)
    with pytest.raises(ArtifactError, match=f"train artifact {fingerprint} is not below '{root}'.*cllmr run --from train"):
        find_bundle(root, fingerprint)
