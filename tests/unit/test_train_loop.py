"""The training loop in one process: resuming, stopping, choosing, and what it must refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from components.cllmr.model import CLLMR, SideInformation
from components.errors import ArtifactError, ConfigError
from components.evaluate.metrics import rank
from components.train.checkpoint import TrainState, check_checkpoint, load_checkpoint
from components.train.config import TrainConfig
from components.train.graph import as_arrays
from components.train.loop import SingleProcess, TrainData, _step_seed, build_model, fit, fit_base, make_optimizer, make_sampler
from components.train.stage import _room_for_workers
from components.train.strength import choose_strength, strength_curve
from components.train.validation import validation_sums
from tests.behaviour.training import SMALL, Interrupted, Saving, small_config, small_data
from tests.bundles import graph_alone

FILES = ("model.safetensors", "best.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def data() -> TrainData:
    return small_data()


@pytest.fixture
def checkpoint(data: TrainData, tmp_path: Path) -> Path:
    """Of a run that died after two epochs."""
    with pytest.raises(Interrupted):
        fit(data, small_config(), Saving(tmp_path, die_after=2))
    return tmp_path / "2"


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("loss", ["softmax", "bpr"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(data: TrainData, loss: str) -> None:
    config = small_config(max_epochs=2, model={"loss": loss})
    (first, state), (again, state_again) = (fit(data, config, SingleProcess()) for _ in range(2))
    assert_same(first.state_dict(), again.state_dict())
    assert state == state_again
    other, _ = fit(data, config.model_copy(update={"seed": 4}), SingleProcess())
    assert not torch.equal(other.backbone.embedding, first.backbone.embedding)


def test_the_result_does_not_depend_on_torchs_generator_before_the_run(data: TrainData) -> None:
    first, _ = fit(data, small_config(max_epochs=1), SingleProcess())
    torch.rand(17)
    again, _ = fit(data, small_config(max_epochs=1), SingleProcess())
    assert_same(first.state_dict(), again.state_dict())


@pytest.mark.parametrize("died_after", [1, 2, 3])
def test_an_interrupted_run_ends_with_the_weights_of_the_unbroken_one(data: TrainData, tmp_path: Path, died_after: int) -> None:
    unbroken_hooks, hooks = Saving(tmp_path / "unbroken"), Saving(tmp_path / "broken", died_after)
    unbroken, expected = fit(data, small_config(), unbroken_hooks)
    with pytest.raises(Interrupted):
        fit(data, small_config(), hooks)
    hooks.die_after = None
    resumed, state = fit(data, small_config(), hooks)
    assert hooks.restored_epoch == died_after
    assert state == expected
    assert_same(resumed.state_dict(), unbroken.state_dict())
    for name in FILES:  # the last epoch's weights and the optimiser's moments too, bit for bit
        assert (tmp_path / "broken/4" / name).read_bytes() == (tmp_path / "unbroken/4" / name).read_bytes()


def test_a_checkpoint_restores_weights_moments_and_step_counts(data: TrainData, checkpoint: Path) -> None:
    torch.manual_seed(99)
    model = build_model(data, small_config())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, fused=True)
    state, best = load_checkpoint(checkpoint, model, optimizer)
    assert state.epoch == 2
    assert [point["epoch"] for point in state.curve] == [1, 2]
    assert best.keys() == model.state_dict().keys()
    moments = optimizer.state_dict()["state"]
    assert len(moments) == len(list(model.parameters()))
    # 45 x 12 x 0.5 interactions in steps of 128, twice
    assert {int(values["step"]) for values in moments.values()} == {2 * -(-int(data.train.nnz) // 128)}
    assert all(values["exp_avg"].abs().max() > 0 for values in moments.values())


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_noticed_and_nothing_is_restored(data: TrainData, checkpoint: Path, name: str) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[-3] ^= 1
    (checkpoint / name).write_bytes(content)
    model = build_model(data, small_config())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=rf"checkpoint .*2: {name} is damaged\. An older one is used"):
        load_checkpoint(checkpoint, model, torch.optim.Adam(model.parameters()))
    assert_same(model.state_dict(), before)


def test_a_truncated_file_is_noticed(checkpoint: Path) -> None:
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["state.json", *FILES])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(ArtifactError, match=rf"checkpoint .* cannot be read: .*No such file.*{name}"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("content", ["", '{"state": {"epo', '{"state": {}}', "[]", "null"])
def test_a_state_file_that_is_no_state_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "state.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"checkpoint .* cannot be read"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("given", "num_interactions", "found"),
    [(None, 100, 4096), (None, 64 * 4096, 4096), (None, 64 * 4096 + 1, 4097), (None, 64 * 10**6, 10**6), (16, 10**6, 16)],
)
def test_an_epoch_has_no_more_steps_for_more_interactions(given: int | None, num_interactions: int, found: int) -> None:
    assert TrainConfig(batch_size=given).batch_size_of(num_interactions) == found


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(data: TrainData) -> None:
    assert data.side is not None
    poisoned = SideInformation(data.side.text.clone(), data.side.spectrum)
    poisoned.text[0, 0] = torch.nan
    seen: list[CLLMR] = []

    class Watching(SingleProcess):
        def wrap(self, model: CLLMR) -> CLLMR:
            seen.append(model)
            return model

    config = small_config(batch_size=1024)  # one step: it contains the poisoned user
    with pytest.raises(FloatingPointError, match=r"not finite in epoch 0, step 0 \(learning rate 0\.01, batch size 1024\)"):
        fit(replace(data, side=poisoned), config, Watching())
    torch.manual_seed(config.seed)
    assert_same(seen[0].state_dict(), build_model(data, config).state_dict())


def test_training_stops_when_the_validation_recall_no_longer_rises_and_keeps_the_best(data: TrainData) -> None:
    model, state = fit(data, small_config(max_epochs=60, patience=2), SingleProcess())
    recalls = [point["recall@20"] for point in state.curve]
    assert state.epoch < 60
    assert state.epoch == state.best_epoch + 2
    assert state.best_recall == max(recalls) == recalls[state.best_epoch - 1]
    sums = validation_sums(model, data.train, data.held_out, 0, 1).tolist()
    assert sums[0] / sums[2] == state.best_recall, "the returned weights are not the best ones"


def test_the_weights_that_are_returned_are_those_of_the_best_epoch_and_not_the_last(data: TrainData) -> None:
    class Keeping(SingleProcess):
        def save(self, state: TrainState, model: CLLMR, *rest: Any) -> None:
            seen[state.epoch] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    seen: dict[int, dict[str, Tensor]] = {}
    model, state = fit(data, small_config(max_epochs=60, patience=2), Keeping())
    assert state.best_epoch < state.epoch
    assert_same(model.state_dict(), seen[state.best_epoch])
    assert not torch.equal(model.backbone.embedding, seen[state.epoch]["backbone.embedding"])


def test_no_two_steps_nor_workers_draw_the_same_noise(data: TrainData) -> None:
    class Listening(SingleProcess):
        def wrap(self, model: CLLMR) -> nn.Module:
            model.register_forward_pre_hook(lambda model, given: seeds.append(given[1].initial_seed()))
            return model

    seeds: list[int] = []
    config = small_config(max_epochs=2, batch_size=64)
    fit(data, config, Listening())
    steps = make_sampler(data.train, config).steps_per_epoch
    places = [(epoch, step) for epoch in range(2) for step in range(steps)]
    assert seeds == [_step_seed(config.seed, *place, rank=0) for place in places]
    assert len({_step_seed(config.seed, *place, rank=rank) for place in places for rank in range(2)}) == 4 * steps


def test_the_last_epoch_is_validated_even_between_two_validations(data: TrainData) -> None:
    _, state = fit(data, small_config(max_epochs=5, evaluate_every=3), SingleProcess())
    assert [point["epoch"] for point in state.curve] == [3, 5]


def test_where_nothing_is_held_out_all_epochs_are_trained_and_the_last_is_the_best(data: TrainData) -> None:
    judged, told = fit(data, small_config(max_epochs=60, patience=2), SingleProcess())
    nothing = replace(data, held_out=sp.csr_array(data.train.shape, dtype=np.float32))
    as_long, state = fit(nothing, small_config(max_epochs=told.best_epoch, patience=1), SingleProcess())
    assert (state.epoch, state.best_epoch) == (told.best_epoch, told.best_epoch)
    assert_same(as_long.state_dict(), judged.state_dict())
    assert not any({"recall@20", "ndcg@10"} & point.keys() for point in state.curve), "nothing was measured"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_sums_of_all_ranks_add_up_to_the_metrics(data: TrainData, world_size: int) -> None:
    model, _ = fit(data, small_config(max_epochs=1), SingleProcess())
    held_out = sp.csr_array(data.held_out)
    parts = [validation_sums(model, data.train, held_out, index, world_size) for index in range(world_size)]
    recall, ndcg, count = torch.stack(parts).sum(dim=0).tolist()
    found = model.representations()
    users, items = (factor.numpy() for factor in found.mediator)
    ranking = rank(lambda rows: users[rows] @ (items * found.item_gate.numpy()[:, None]).T, data.train, held_out)
    assert count == len(ranking.users)
    assert recall / count == pytest.approx(ranking.mean()["recall@20"], abs=1e-9)
    assert ndcg / count == pytest.approx(ranking.mean()["ndcg@10"], abs=1e-9)
    assert 0.1 < ranking.mean()["ndcg@10"] < 1.0


@pytest.mark.parametrize(
    ("metrics", "tolerance", "expected"),
    [
        ((0.50, 0.49, 0.48, 0.30), 0.02, 0.25),  # 0.49 is 2 % below the best and within it
        ((0.50, 0.49, 0.48, 0.30), 0.0, 0.0),
        ((0.50, 0.49, 0.48, 0.30), 0.05, 0.5),
        ((0.30, 0.40, 0.50, 0.45), 0.02, 0.5),  # debiasing may help on validation
        ((0.50, 0.10, 0.495, 0.30), 0.02, 0.5),  # the largest within it, whatever lies between
        ((0.0, 0.0, 0.0, 0.0), 0.02, 1.0),
    ],
)
def test_the_largest_strength_within_the_tolerance_is_chosen(
    metrics: tuple[float, ...], tolerance: float, expected: float
) -> None:
    curve = [{"debias": debias, "ndcg@10": value} for debias, value in zip((0.0, 0.25, 0.5, 1.0), metrics, strict=True)]
    assert choose_strength(curve, tolerance) == expected
    assert choose_strength(curve[::-1], tolerance) == expected


def test_the_strength_curve_is_the_served_scores_ndcg(data: TrainData) -> None:
    model, state = fit(data, small_config(max_epochs=2), SingleProcess())
    found = model.representations()
    fitted = graph_alone(as_arrays(model, state))
    curve = strength_curve(fitted.factual, fitted.counterfactual, data.train, data.held_out, (0.0, 1.0))
    assert [point["debias"] for point in curve] == [0.0, 1.0]
    users, factors = (factor.numpy() for factor in found.mediator)
    gate = found.item_gate.numpy()[:, None]
    for point in curve:
        served = gate * (factors - point["debias"] * factors.mean(axis=0))
        expected = rank(lambda rows, served=served: users[rows] @ served.T, data.train, data.held_out).mean()["ndcg@10"]
        assert point["ndcg@10"] == pytest.approx(expected, abs=2e-3)  # sums of another order may exchange near ties


def test_the_base_model_is_trained_without_side_information(data: TrainData) -> None:
    told: list[dict[str, float]] = []
    settings = TrainConfig.parse({**SMALL, "max_epochs": 8}, "train").model_dump(mode="json")
    users, items = fit_base(data.train, data.held_out, settings, lambda **figures: told.append(figures))
    assert users.shape == (45, 9)
    assert items.shape == (36, 9)
    assert users.dtype == items.dtype == np.float32
    assert [point["epoch"] for point in told] == list(range(1, 9))
    assert "elbo.loss" not in told[0]
    recall = rank(lambda rows: users[rows] @ items.T, data.train, data.held_out).mean()["recall@20"]
    assert recall == pytest.approx(max(point["recall@20"] for point in told), abs=1e-6)
    assert recall > 0.9
    again = fit_base(data.train, data.held_out, settings, lambda **figures: None)
    np.testing.assert_array_equal(users, again[0])


def test_the_l2_weight_is_the_penalty_on_all_parameters(data: TrainData) -> None:
    """One step by the optimiser equals one step on the loss with λ_reg ‖Θ‖² written out (E18)."""
    config, plain = small_config(model={"l2_weight": 0.03}), small_config()
    stepped = []
    for settings, penalty in ((config, 0.0), (plain, 0.03)):
        torch.manual_seed(0)
        model = build_model(data, settings)
        optimizer = make_optimizer(model, settings)
        for step in range(2):
            loss, _ = model(make_sampler(data.train, settings).batch(0, step), torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (loss + penalty * sum((parameter**2).sum() for parameter in model.parameters())).backward()
            optimizer.step()
        stepped.append(model.state_dict())
    for name, value in stepped[0].items():
        torch.testing.assert_close(value, stepped[1][name], atol=1e-5, rtol=1e-4)


def test_an_encoder_without_side_information_is_refused_and_none_leaves_it_aside(data: TrainData) -> None:
    with pytest.raises(ConfigError, match=r"side_encoder = 'sse' needs side information, and there is none"):
        build_model(replace(data, side=None), small_config())
    bare = small_config(max_epochs=1, model={"side_encoder": "none"})
    found, expected = (fit(one, bare, SingleProcess())[0] for one in (data, replace(data, side=None)))
    assert_same(found.state_dict(), expected.state_dict())
    assert list(found.state_dict()) == ["backbone.embedding"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchsize": 1}, r"unknown setting 'train\.batchsize'\. Did you mean 'batch_size'\?"),
        ({"model": {"num_layer": 1}}, r"unknown setting 'train\.model\.num_layer'\. Did you mean 'num_layers'\?"),
        ({"model": {"loss": "hinge"}}, r"setting 'train\.model\.loss' = 'hinge': .*'softmax' or 'bpr'"),
        ({"effect": "gates"}, r"setting 'train\.effect' = 'gates': model\.counterfactual is False; it is true with the effect"),
        (
            {"model": {"counterfactual": True}},
            r"setting 'train\.effect' = 'counterfactual_log': model\.counterfactual is True",
        ),
        ({"learning_rate": 0}, r"setting 'train\.learning_rate' = 0: .*greater than 0"),
    ],
)
def test_a_wrong_setting_is_one_line_with_what_is_allowed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.parse(change, "train")


@pytest.mark.parametrize(("cpus", "room"), [(1, 3), (2, 6), (0.5, 2)])
def test_a_ray_of_this_machine_has_room_for_all_workers(cpus: float, room: int) -> None:
    config = TrainConfig(num_workers=3, cpus_per_worker=cpus)
    assert _room_for_workers(config) == {"num_cpus": room, "num_gpus": 0}
    assert _room_for_workers(config.model_copy(update={"use_gpu": True})) == {"num_cpus": room, "num_gpus": 3}


def test_where_a_run_takes_place_is_no_part_of_its_identity() -> None:
    here, there = TrainConfig(), TrainConfig(use_gpu=True, cpus_per_worker=8, max_failures=0)
    assert here.identity() == there.identity()
    assert here.identity() != TrainConfig(num_workers=3).identity()
    assert here.identity() != TrainConfig(seed=1).identity()
