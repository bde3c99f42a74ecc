"""Compressed algorithms on 1, 2 and 4 real ranks: the same models, state and bytes, also after an interruption."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, gather_objects, loaders, outcome, silent_trainer
from ranks import run_ranks

from lightning_fed import EControlStrategy, GossipStrategy
from lightning_fed.compression import LowRank, Quantize, RandK, ScaledSign, TopK
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.proximal import L1Norm

STEP = {"local_steps": 1, "rounds_per_epoch": 4, "optimizer_state": "keep"}
SERVER_SGD = partial(torch.optim.SGD, lr=0.9, momentum=0.5)

# With four rounds in each of two epochs.
STRATEGIES: dict[str, tuple[type[FederatedStrategy], dict[str, Any]]] = {
    "econtrol-topk": (EControlStrategy, {"compressor": TopK(0.1), "rounds_per_epoch": 4}),
    "econtrol-randk": (EControlStrategy, {"compressor": RandK(0.1), "h0": "zero", "rounds_per_epoch": 4}),
    "econtrol-quantize": (EControlStrategy, {"compressor": Quantize(4), "rounds_per_epoch": 4}),
    "econtrol-lowrank": (EControlStrategy, {"compressor": LowRank(2), "h0": "compressed", "rounds_per_epoch": 4}),
    "econtrol-rounds": (
        EControlStrategy,
        {"compressor": TopK(0.1, "layer"), "local_steps": 2, "rounds_per_epoch": 4, "server_optimizer": SERVER_SGD},
    ),
    "ef21": (EControlStrategy, {"compressor": TopK(0.1), "error_feedback": "ef21", "rounds_per_epoch": 4}),
    "ef-rounds": (
        EControlStrategy,
        {"compressor": ScaledSign("layer"), "error_feedback": "ef", "local_steps": 2, "rounds_per_epoch": 4},
    ),
    "choco": (
        GossipStrategy,
        {"method": "choco", "compressor": TopK(0.2), "gamma": 0.3, "gossip_steps": 2, "rounds_per_epoch": 4},
    ),
    "choco-quantize": (
        GossipStrategy,
        {
            "method": "choco",
            "compressor": Quantize(4),
            "gamma": 0.3,
            "start": "model",
            "topology": "exponential",
            "rounds_per_epoch": 4,
        },
    ),
    "tracking": (GossipStrategy, {"method": "tracking", "proximal": L1Norm(1e-3), **STEP}),
    "compressed-tracking": (GossipStrategy, {"method": "tracking", "compressor": TopK(0.2), "gamma": 0.3, **STEP}),
    "beer": (GossipStrategy, {"method": "beer", "compressor": RandK(0.2), "gamma": 0.3, **STEP}),
    "beer-lowrank": (GossipStrategy, {"method": "beer", "compressor": LowRank(2), "gamma": 0.3, **STEP}),
}


class Invariants(pl.Callback):
    """The worst deviation, over all steps, of what should be equal: a collective call after every round."""

    def __init__(self) -> None:
        self.worst = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not batch.is_last_of_round:
            return
        strategy = trainer.strategy
        matrices = strategy.client_matrices()

        def mean(name: str) -> torch.Tensor:
            return strategy.exchange.mean(matrices[name].clone())

        if "estimate" in matrices:
            self._compare(strategy._mean.mean, mean("estimate"))
        if "tracker" in matrices:
            self._compare(mean("tracker"), mean("last gradient"))
        if "x pull" in matrices:  # so that mixing moves no mean
            self._compare(mean("x pull"), torch.zeros(()))

    def _compare(self, one: torch.Tensor, other: torch.Tensor) -> None:
        self.worst = max(self.worst, float((one - other).abs().max()))


def all_state(strategy: FederatedStrategy) -> dict[str, np.ndarray]:
    """What the algorithm keeps of all clients, and momentum; a collective call."""
    mine = {
        **{name: matrix.numpy() for name, matrix in strategy.client_matrices().items()},
        "momentum": np.stack(
            [
                np.concatenate([value["momentum_buffer"].ravel() for value in state["optimizers"][0].values()] or [[]])
                for state in map(strategy.bank.state_of, strategy.exchange.clients)
            ]
        ),
    }
    blocks = dict(gather_objects((strategy.exchange.clients.start, mine)))
    return {name: np.concatenate([blocks[start][name] for start in sorted(blocks)]) for name in mine}


def federation(names: list[str], world_size: int, num_clients: int) -> dict[str, dict[str, Any]]:
    return {name: train(name, world_size, num_clients) for name in names}


def train(name: str, world_size: int, num_clients: int, module: Any = Classifier, **trainer: Any) -> dict[str, Any]:
    pl.seed_everything(7, verbose=False)
    kind, settings = STRATEGIES[name]
    strategy, invariants = kind(num_clients=num_clients, **settings), Invariants()
    trainer_ = silent_trainer(
        strategy, devices=world_size, max_epochs=2, callbacks=[invariants, *trainer.pop("callbacks", [])], **trainer
    )
    trainer_.fit(module(momentum=0.5), *loaders(clients(num_clients)))
    return {
        **outcome(strategy, trainer_),
        "state": all_state(strategy),
        "measured": strategy.measure(strategy.exchange),
        "facts": strategy.round_facts(strategy.round - 1).numbers,
        "invariants": invariants.worst,
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """To the bit, but for metrics, which sum up samples in another order."""
    np.testing.assert_array_equal(one["rows"], other["rows"])
    assert set(one["state"]) == set(other["state"])
    for name in one["state"]:
        np.testing.assert_array_equal(one["state"][name], other["state"][name], err_msg=name)
    np.testing.assert_array_equal(one["bytes"], other["bytes"])
    for name in ("total_bytes", "global_step", "round", "facts"):
        assert one[name] == other[name]
    assert one["measured"] == pytest.approx(other["measured"], rel=1e-5)
    names = {name for name in one["metrics"] if name != "train/loss_step"}
    assert names == {name for name in other["metrics"] if name != "train/loss_step"}
    for name in names:
        assert one["metrics"][name] == pytest.approx(other["metrics"][name], abs=2e-6), name


def tolerance_of(result: dict[str, Any]) -> float:
    """Some dozens of float32 roundings of the largest number."""
    return 3e-6 * max(1.0, *(np.abs(matrix).max() for matrix in result["state"].values() if matrix.size))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return federation(list(STRATEGIES), 1, 6)


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(2, federation, list(STRATEGIES), 2, 6)


@pytest.fixture(scope="module")
def on_four_ranks() -> list[dict[str, dict[str, Any]]]:
    """Two ranks have two clients, two have one."""
    return run_ranks(4, federation, list(STRATEGIES), 4, 6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_equal_one(name: str, alone: dict[str, Any], on_two_ranks: list[dict[str, Any]]) -> None:
    assert np.isfinite(alone[name]["rows"]).all() and alone[name]["round"] == 8
    for results in on_two_ranks:
        assert_same(alone[name], results[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_four_ranks_equal_one(name: str, alone: dict[str, Any], on_four_ranks: list[dict[str, Any]]) -> None:
    for results in on_four_ranks:
        assert_same(alone[name], results[name])
        assert results[name]["invariants"] < tolerance_of(results[name])


@pytest.mark.parametrize("name", STRATEGIES)
def test_invariants_hold_on_one_and_two_ranks(
    name: str, alone: dict[str, Any], on_two_ranks: list[dict[str, Any]]
) -> None:
    for results in (alone, *on_two_ranks):
        assert results[name]["invariants"] < tolerance_of(results[name])
    if name != "ef-rounds":  # which has neither estimates nor copies
        assert alone[name]["invariants"] > 0 or "quantize" in name


def test_three_clients_on_two_ranks() -> None:
    names = ["econtrol-topk", "econtrol-lowrank", "choco", "beer"]
    expected = federation(names, 1, 3)
    for results in run_ranks(2, federation, names, 2, 3):
        for name in names:
            assert_same(expected[name], results[name])


class NotANumber(Classifier):
    """Client 4's features are not numbers in round 3."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        strategy, (features, labels) = self.trainer.strategy, batch
        if (strategy.round, strategy.bank.bound) == (3, 4):
            features = features * torch.nan
        return super().training_step((features, labels), batch_idx)


class Changes(pl.Callback):
    """Rounds that have changed nothing of this rank's algorithm, optimizers or models."""

    def __init__(self) -> None:
        self.unchanged: list[int] = []
        self._before: dict[str, np.ndarray] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not batch.is_last_of_round:
            return
        strategy = trainer.strategy
        consensus = strategy.consensus(strategy.bank.rows.matrix, strategy.exchange)
        state = {**all_state(strategy), "model": consensus.numpy().copy()}
        buffers = strategy.bank.buffers.matrix
        assert torch.isfinite(buffers).all()
        if self._before and all(np.array_equal(state[name], self._before[name]) for name in state):
            self.unchanged.append(batch.round)
        self._before = state


def with_a_bad_gradient(world_size: int) -> dict[str, Any]:
    results = {}
    for name in ("econtrol-topk", "econtrol-rounds", "compressed-tracking"):
        changes = Changes()
        results[name] = train(name, world_size, 6, NotANumber, callbacks=[changes])
        results[name]["metrics"] = {}  # which are not numbers either
        results[name]["unchanged"] = changes.unchanged
    return results


def test_all_ranks_leave_out_a_step_with_a_gradient_that_is_not_finite() -> None:
    expected = with_a_bad_gradient(1)
    for results in run_ranks(2, with_a_bad_gradient, 2):
        for name in expected:
            assert_same(expected[name], results[name])
            assert results[name]["facts"] == {"skipped_steps": 1}
            assert expected[name]["unchanged"] == results[name]["unchanged"] == [3]
            assert np.isfinite(results[name]["rows"]).all()


class TwoRanksAClient:
    """``ranks_per_client=2`` with batches of 4, or the same clients on one rank each with batches of 8."""

    def __init__(self, ranks_per_client: int) -> None:
        self.ranks_per_client = ranks_per_client

    def __call__(self) -> dict[str, Any]:
        results = {}
        for name in ("econtrol-topk", "econtrol-rounds", "choco", "beer"):
            pl.seed_everything(3, verbose=False)
            kind, settings = STRATEGIES[name]
            strategy = kind(num_clients=2, ranks_per_client=self.ranks_per_client, **settings)
            trainer = silent_trainer(strategy, devices=2 * self.ranks_per_client, max_epochs=2)
            # Neither dropout nor BatchNorm: both differ between two half batches and a whole one, by definition.
            module = Classifier(norm=False, dropout=0.0, momentum=0.5)
            trainer.fit(module, *loaders(clients(2, smallest=21, step=4), batch_size=8 // self.ranks_per_client))
            results[name] = all_rows(strategy), strategy.exchange.sent_bytes
        return results


@pytest.mark.slow
def test_two_ranks_a_client_equal_one_with_the_doubled_batch() -> None:
    whole = run_ranks(2, TwoRanksAClient(1))[0]
    for halves in run_ranks(4, TwoRanksAClient(2)):
        for name, (rows, sent_bytes) in halves.items():
            np.testing.assert_allclose(rows, whole[name][0], rtol=0, atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(sent_bytes, whole[name][1])


# ----------------------------------------------------------------------------------------------------- interruptions


class SaveIn(pl.Callback):
    """Saves a checkpoint after the first epoch, and in the middle of the second: of a round, if it has a middle."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        position = strategy.round - strategy.sampler.rounds_per_epoch, strategy.joint_index
        if position in ((0, 0), (1, 1 if strategy.sampler.joint_steps(0) > 1 else 0)):
            trainer.save_checkpoint(self.directory / ("middle.ckpt" if position[0] else "epoch.ckpt"))


def runs(
    names: list[str], world_size: int, directory: str, resume: str | None, precision: Any = "32-true"
) -> dict[str, dict[str, Any]]:
    """Whole runs, which leave checkpoints, or what is left after the checkpoint ``resume``."""
    results = {}
    for name in names:
        folder = f"{directory}/{name}"
        changed = {"callbacks": [SaveIn(folder)]} if resume is None else {}
        results[name] = run(name, world_size, f"{folder}/{resume}" if resume else None, precision, **changed)
    return results


def run(name: str, world_size: int, resume: str | None, precision: Any = "32-true", **changed: Any) -> dict[str, Any]:
    pl.seed_everything(11 if resume is None else 12345, verbose=False)  # the checkpoint knows better
    kind, settings = STRATEGIES[name]
    strategy = kind(num_clients=6, **settings)
    trainer = silent_trainer(strategy, world_size, precision=precision, max_epochs=2, **changed)
    trainer.fit(Classifier(momentum=0.5), *loaders(clients(6)), ckpt_path=resume)
    exported = torch.nn.utils.parameters_to_vector(trainer.lightning_module.parameters()).detach()
    result = {
        "rows": all_rows(strategy) if precision == "32-true" else strategy.bank.rows.matrix.float().numpy(),
        "exported": exported.float().numpy(),
        "position": (strategy.round, trainer.global_step, strategy.exchange.sent_bytes.tolist()),
        "facts": strategy.round_facts(strategy.round - 1).numbers,
    }
    if precision == "32-true":
        result["state"] = all_state(strategy)
    return result


def assert_goes_on(whole: dict[str, Any], resumed: dict[str, Any], tolerance: float) -> None:
    assert whole["position"] == resumed["position"] and whole["facts"] == resumed["facts"]
    for name in ("rows", "exported"):
        np.testing.assert_allclose(resumed[name], whole[name], rtol=0, atol=tolerance, err_msg=name)
    for name in whole.get("state", {}):
        np.testing.assert_allclose(resumed["state"][name], whole["state"][name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]]]:
    """Checkpoints of whole runs on one rank, and how the runs ended."""
    directory = str(tmp_path_factory.mktemp("saved"))
    return directory, runs(list(STRATEGIES), 1, directory, None)


@pytest.mark.parametrize("checkpoint", ["epoch.ckpt", "middle.ckpt"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_resuming_is_exact(name: str, checkpoint: str, saved: Any) -> None:
    directory, whole = saved
    resumed = run(name, 1, f"{directory}/{name}/{checkpoint}")
    assert_goes_on(whole[name], resumed, tolerance=0)
    assert "lowrank" not in name or any("compressor" in key for key in resumed["state"])


RESUMED = ["econtrol-topk", "econtrol-lowrank", "econtrol-rounds", "choco", "compressed-tracking", "beer-lowrank"]


def test_resuming_on_two_ranks_what_one_has_saved(saved: Any) -> None:
    directory, whole = saved
    for resumed in run_ranks(2, runs, RESUMED, 2, directory, "middle.ckpt"):
        for name in RESUMED:
            assert_goes_on(whole[name], resumed[name], tolerance=1e-6)


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, dict[str, Any]]]]:
    """The same of two ranks."""
    directory = str(tmp_path_factory.mktemp("saved_by_two"))
    return directory, run_ranks(2, runs, RESUMED, 2, directory, None)


def test_two_ranks_resume_exactly(saved_by_two: Any) -> None:
    directory, whole = saved_by_two
    for one, other in zip(whole, run_ranks(2, runs, RESUMED, 2, directory, "middle.ckpt")):
        for name in RESUMED:
            assert_goes_on(one[name], other[name], tolerance=0)


@pytest.mark.parametrize("checkpoint", ["epoch.ckpt", "middle.ckpt"])
def test_resuming_on_one_rank_what_two_have_saved(checkpoint: str, saved: Any, saved_by_two: Any) -> None:
    for name, resumed in runs(RESUMED, 1, saved_by_two[0], checkpoint).items():
        assert_goes_on(saved[1][name], resumed, tolerance=1e-6)


@pytest.mark.slow
def test_resuming_on_one_rank_what_four_have_saved(saved: Any, tmp_path: Path) -> None:
    names = RESUMED[:4]
    run_ranks(4, runs, names, 4, str(tmp_path), None)
    for name, resumed in runs(names, 1, str(tmp_path), "middle.ckpt").items():
        assert_goes_on(saved[1][name], resumed, tolerance=1e-6)


@pytest.mark.parametrize("name", ["econtrol-topk", "econtrol-rounds", "ef-rounds", "choco", "beer-lowrank"])
def test_resuming_in_half_precision_is_exact(name: str, tmp_path: Path) -> None:
    """What is kept in float32 beside rows of half precision is saved in float32."""
    whole = run(name, 1, None, "bf16-true", callbacks=[SaveIn(str(tmp_path))])
    assert_goes_on(whole, run(name, 1, str(tmp_path / "middle.ckpt"), "bf16-true"), tolerance=0)
