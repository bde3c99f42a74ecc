"""MoDeST with numbers: trajectories against NumPy, bytes against the formula, churn, resuming, refusals.

The hash order, the seconds and the bytes are computed here once more, without the package. What the protocol does when
nodes come and go is the subject of tests/modest; here a plan is an input, as a cohort is elsewhere.

Shapes: N = clients, P = numbers in a row.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, outcome, silent_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from paper_problem import CLIENTS, ROUNDS, SEED, START_P, TOLERANCE, local_sgd, pass_over_shard, run
from ranks import run_ranks

from lightning_fed import MoDeSTStrategy
from lightning_fed.cli import FederatedCLI
from lightning_fed.data import DigitsDataModule
from lightning_fed.federation.availability import AvailabilityTrace, MembershipSchedule, RandomChurn
from lightning_fed.federation.virtual_clock import LogNormal, Uniform, VirtualClock
from lightning_fed.modest.simulation import RoundPlan
from lightning_fed.modules import ImageClassifier

SAMPLE, AGGREGATORS = 4, 2
SECONDS_PER_STEP = [1.0, 1.31, 1.73, 2.29, 2.93, 3.11, 3.79, 20.3]  # of each client

Modest = partial(MoDeSTStrategy, num_clients=CLIENTS, seed=SEED, sample_size=SAMPLE, num_aggregators=AGGREGATORS)


def hash_order(num_clients: int, round: int) -> list[int]:
    return sorted(range(num_clients), key=lambda client: hashlib.md5(f"{client}-{round}".encode()).hexdigest())


def sample(round: int) -> list[int]:
    return hash_order(CLIENTS, round)[:SAMPLE]


def uneven_clock(directory: Path) -> VirtualClock:
    """Computers that differ, and messages that take no time."""
    lines = [f"{client},{seconds},inf,inf" for client, seconds in enumerate(SECONDS_PER_STEP)]
    (directory / "devices.csv").write_text("\n".join(["client,seconds_per_step,upload,download", *lines]))
    return VirtualClock(devices_csv=str(directory / "devices.csv"), latency=0.0)


# --------------------------------------------------------------------------------------------------------- trajectories


def modest(**local: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Everybody in the sample trains from the mean of the sample before; all rows, and the new mean."""
    X, x = np.tile(START_P, (CLIENTS, 1)), START_P
    for round in range(1, ROUNDS + 1):
        for i in sample(round):
            X[i] = local_sgd(x, pass_over_shard(i), **local)
        x = X[sample(round)].mean(axis=0)
        yield X.copy(), x


def fastest_of(round: int) -> list[int]:
    """The sample, by the seconds that a pass over the shard takes."""
    return sorted(sample(round), key=seconds_of)


def seconds_of(client: int) -> float:
    return SECONDS_PER_STEP[client] * len(pass_over_shard(client))


def modest_without_the_slowest(enough: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A round ends with the ``enough``-th model. Who is slower trains on, until a newer sample needs it."""
    X, x, now = np.tile(START_P, (CLIENTS, 1)), START_P, 0.0
    begins = [now := 0.0] + [now := now + seconds_of(fastest_of(round)[enough - 1]) for round in range(1, ROUNDS + 60)]

    def is_interrupted(client: int, round: int) -> bool:
        ends = begins[round - 1] + seconds_of(client)
        return any(client in sample(k) and begins[k - 1] < ends for k in range(round + 1, ROUNDS + 60))

    for round in range(1, ROUNDS + 1):
        for i in sample(round):
            if not is_interrupted(i, round):
                X[i] = local_sgd(x, pass_over_shard(i))
        x = X[fastest_of(round)[:enough]].mean(axis=0)
        yield X.copy(), x


def assert_trajectory(found: tuple[np.ndarray, np.ndarray], paper: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    rows, model = map(np.stack, zip(*paper))
    assert np.ptp(rows[-1], axis=0).max() > 1e-3 and np.abs(model[-1] - START_P).max() > 1e-2
    np.testing.assert_allclose(found[0], rows, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found[1], model[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_aggregators", [1, 2, 4])
def test_the_trajectory_is_the_mean_of_each_sample_in_the_next(num_aggregators: int) -> None:
    assert_trajectory(run(Modest(num_aggregators=num_aggregators)), modest())


def test_the_trajectory_with_local_momentum() -> None:
    assert_trajectory(run(Modest(), momentum=0.9), modest(theta=0.9))


@pytest.mark.parametrize(
    ("success_fraction", "rounding", "enough"), [(0.75, "up", 3), (0.6, "up", 3), (0.6, "down", 2)]
)
def test_the_trajectory_of_the_fastest(success_fraction: float, rounding: Any, enough: int, tmp_path: Path) -> None:
    strategy = Modest(success_fraction=success_fraction, success_rounding=rounding, clock=uneven_clock(tmp_path))
    found = run(strategy)
    assert_trajectory(found, modest_without_the_slowest(enough))
    begins = [seconds_of(fastest_of(round)[enough - 1]) for round in range(1, ROUNDS + 1)]
    assert strategy.clock is not None and strategy.clock.elapsed == pytest.approx(sum(begins))


def follow(plans: list[RoundPlan]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers for a plan's symbols; a plan says from which model who has trained, and whose models were averaged."""
    X, models = np.tile(START_P, (CLIENTS, 1)), {(1, -1): START_P}
    for round, plan in enumerate(plans, start=1):
        before = X.copy()
        for client, start in plan.starts.items():
            x = before[start.client] if start.is_trained else models[start.round, start.client]
            X[client] = local_sgd(x, pass_over_shard(client))
        for aggregator, contributors in plan.averages.items():
            models[round + 1, aggregator] = X[list(contributors)].mean(axis=0)
        yield X.copy(), models[round + 1, next(iter(plan.averages))]


@pytest.mark.parametrize("seed", range(4))
def test_the_trajectory_under_churn_is_the_plans(seed: int) -> None:
    churn = RandomChurn(0.01, 0.03, leave_fraction=0.3, unit="seconds")
    clock = VirtualClock(seconds_per_step=LogNormal(1.0, 0.7), latency=Uniform(0.0, 0.5))
    strategy = Modest(seed=seed, success_fraction=0.5, num_aggregators=3, availability=churn, clock=clock)
    found = run(strategy)
    plans = strategy.replay(ROUNDS)
    assert any(len(set(plan.averages.values())) > 1 for plan in plans)  # aggregators met different models first
    assert any(len(set(plan.starts.values())) > 1 for plan in plans)
    assert_trajectory(found, follow(plans))


def test_a_round_may_begin_again_from_what_a_client_has_trained(tmp_path: Path) -> None:
    # Round 2's sample of 8 is 6 4 2 7, and all of it crashes while it trains.
    trace = "".join(f"{client},0,{9 if client in (6, 4, 2, 7) else 'inf'}\n" for client in range(CLIENTS))
    (tmp_path / "trace.csv").write_text(f"client,from,to\n{trace}")
    clock = VirtualClock(seconds_per_step=2.0, latency=0.0)  # the largest shards have three minibatches
    strategy = Modest(availability=AvailabilityTrace(str(tmp_path / "trace.csv")), clock=clock)
    found = run(strategy)
    plans = strategy.replay(ROUNDS)
    assert any(start.is_trained for start in plans[1].starts.values()) and plans[1].restarts
    assert_trajectory(found, follow(plans))


# ----------------------------------------------------------------------------------------------------------- messages


def expected_bytes(row_bytes: int, num_clients: int, aggregators: int, rounds: int) -> np.ndarray:
    """Bytes of each client when nobody fails, ``[N]``: models with views, pings, pongs; nothing to oneself."""
    sent = np.zeros(num_clients, dtype=int)
    for round in range(1, rounds + 1):
        trainers, after = hash_order(num_clients, round)[:SAMPLE], hash_order(num_clients, round + 1)
        for askers, asked in ((trainers, after[:aggregators]), (after[:aggregators], after[:SAMPLE])):
            for asker in askers:
                for other in set(asked) - {asker}:
                    sent[asker] += 16 + row_bytes + 8 * num_clients  # a ping, and a model with the view
                    sent[other] += 16  # a pong
    return sent


@pytest.mark.parametrize("aggregators", [1, 2, 4])
@pytest.mark.parametrize(("float_buffers", "numbers"), [("mix", 276 + 32 + 32), ("local", 276 + 32)])
def test_bytes_are_those_of_the_formula(aggregators: int, float_buffers: Any, numbers: int) -> None:
    rounds, num_clients = 5, 9
    strategy = Modest(num_clients=num_clients, num_aggregators=aggregators, float_buffers=float_buffers)
    trainer = silent_trainer(strategy, max_epochs=rounds, limit_val_batches=0)
    trainer.fit(Classifier(norm=True), loaders(clients(num_clients))[0])
    np.testing.assert_array_equal(
        strategy.exchange.sent_bytes, expected_bytes(4 * numbers, num_clients, aggregators, rounds)
    )
    assert strategy.exchange.server_bytes == 0
    message, selves = 4 * numbers + 8 * num_clients, 0
    for round in range(1, rounds + 1):
        trainers, after = hash_order(num_clients, round)[:SAMPLE], hash_order(num_clients, round + 1)[:aggregators]
        selves += len(set(trainers) & set(after)) + len(after)
    exchanges = rounds * 2 * SAMPLE * aggregators - selves
    assert strategy.exchange.total_bytes == exchanges * (message + 2 * 16)


class RowsAndBytes(pl.Callback):
    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.bytes: list[np.ndarray] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.rows.append(all_rows(trainer.strategy))
        self.bytes.append(trainer.strategy.exchange.sent_bytes.copy())


def test_who_is_not_in_the_sample_does_nothing_but_answer_pings() -> None:
    record, rounds, num_clients = RowsAndBytes(), 8, 12
    strategy = Modest(num_clients=num_clients)
    silent_trainer(strategy, max_epochs=rounds, callbacks=[record]).fit(Classifier(), *loaders(clients(num_clients)))
    idle = 0
    for round in range(2, rounds + 1):
        before, after = record.rows[round - 2], record.rows[round - 1]
        sent = record.bytes[round - 1] - record.bytes[round - 2]
        trainers, next_sample = hash_order(num_clients, round)[:SAMPLE], hash_order(num_clients, round + 1)[:SAMPLE]
        for client in set(range(num_clients)) - set(trainers):
            np.testing.assert_array_equal(after[client], before[client])
            if client not in next_sample[:AGGREGATORS]:
                assert sent[client] == (16 * AGGREGATORS if client in next_sample else 0)
                idle += 1
        assert all((after[client] != before[client]).any() for client in trainers)
    assert idle > 20


# ------------------------------------------------------------------------------------------------- layouts and resuming

FEDERATION = 9


def churning(**settings: Any) -> MoDeSTStrategy:
    return MoDeSTStrategy(**{
        "num_clients": FEDERATION,
        "sample_size": SAMPLE,
        "num_aggregators": AGGREGATORS,
        "success_fraction": 0.75,
        "availability": RandomChurn(0.02, 0.05, leave_fraction=0.3, unit="seconds"),
        "clock": VirtualClock(seconds_per_step=Uniform(0.5, 2.0), latency=Uniform(0.0, 0.3)),
        "optimizer_state": "keep",
        **settings,
    })  # fmt: skip


def federation(world_size: int) -> dict[str, Any]:
    pl.seed_everything(7, verbose=False)
    strategy = churning()
    trainer = silent_trainer(strategy, devices=world_size, max_epochs=6, precision="64-true")
    trainer.fit(Classifier(momentum=0.9), *loaders(clients(FEDERATION)))
    assert strategy.clock is not None
    plans = strategy.replay(6)
    assert sum(len(plan.left) + len(plan.joined) for plan in plans) > 5
    return {**outcome(strategy, trainer), "seconds": strategy.clock.state()}


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_do_not_show(world_size: int) -> None:
    alone = federation(1)
    for result in run_ranks(world_size, federation, world_size):
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=0, atol=1e-10)
        np.testing.assert_array_equal(result["bytes"], alone["bytes"])
        for name in ("total_bytes", "global_step", "round", "seconds"):
            assert result[name] == alone[name]
        # A step's training value is the mean over one rank's clients, so it is the one thing that knows the layout.
        names = alone["metrics"].keys() - {"train/loss_step"}
        assert names == result["metrics"].keys() - {"train/loss_step"}
        for name in names:
            assert result["metrics"][name] == pytest.approx(alone["metrics"][name], abs=2e-6), name


RESUME_ROUNDS = 6


def fit(world_size: int, directory: str, resume: str | None, epochs: int = RESUME_ROUNDS, **settings: Any) -> Any:
    pl.seed_everything(11 if resume is None else 12345, verbose=False)  # the checkpoint knows better
    strategy = churning(**settings)
    keep_all = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = silent_trainer(
        strategy, world_size, max_epochs=epochs, enable_checkpointing=True, callbacks=[keep_all], precision="64-true"
    )
    module = Classifier(momentum=0.9)
    trainer.fit(module, *loaders(clients(FEDERATION)), ckpt_path=resume)
    assert strategy.clock is not None
    exported = torch.cat([value.flatten() for value in module.state_dict().values()]).numpy()
    return {**outcome(strategy, trainer), "seconds": strategy.clock.state(), "exported": exported}


@pytest.mark.parametrize("float_buffers", ["mix", "local"])
def test_resuming_after_any_round_is_exact(float_buffers: Any, tmp_path: Path) -> None:
    whole = fit(1, str(tmp_path / "whole"), None, float_buffers=float_buffers)
    for epoch in range(RESUME_ROUNDS - 1):
        saved = str(tmp_path / f"whole/epoch={epoch}.ckpt")
        resumed = fit(1, str(tmp_path / f"from{epoch}"), saved, float_buffers=float_buffers)
        for name, value in whole.items():
            np.testing.assert_equal(resumed[name], value, err_msg=name)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1)])
def test_resuming_on_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    whole = fit(1, str(tmp_path / "whole"), None)
    run_ranks(before, fit, before, str(tmp_path / "first"), None, 3)
    for resumed in run_ranks(after, fit, after, str(tmp_path / "second"), str(tmp_path / "first/epoch=2.ckpt")):
        np.testing.assert_allclose(resumed["rows"], whole["rows"], rtol=0, atol=1e-10)
        np.testing.assert_array_equal(resumed["bytes"], whole["bytes"])
        assert (resumed["round"], resumed["seconds"]) == (whole["round"], whole["seconds"])


@pytest.mark.parametrize(
    ("name", "value", "saved"),
    [
        ("sample_size", 3, "4"),
        ("success_fraction", 1.0, "0.75"),
        ("availability", MembershipSchedule(crashes={3: [1]}), "'RandomChurn'"),
    ],
)
def test_resuming_with_another_protocol_is_refused(name: str, value: Any, saved: str, tmp_path: Path) -> None:
    fit(1, str(tmp_path), None, epochs=2)
    with pytest.raises(ValueError, match=f"the checkpoint's federation has {name}={saved}, but this run has"):
        fit(1, str(tmp_path), str(tmp_path / "epoch=1.ckpt"), **{name: value})


# ------------------------------------------------------------------------------------------------------------ failures


def test_digits_are_learnt_although_four_of_five_crash(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    crashed = np.random.default_rng(0).choice(50, 40, replace=False).tolist()
    strategy = MoDeSTStrategy(
        num_clients=50, sample_size=10, num_aggregators=2, availability=MembershipSchedule(crashes={20: crashed})
    )
    accuracy: list[float] = []

    class Accuracy(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            accuracy.append(float(trainer.callback_metrics["val/acc"]))

    trainer = silent_trainer(strategy, max_epochs=40, callbacks=[Accuracy()])
    trainer.fit(ImageClassifier("mlp", lr=0.3), DigitsDataModule(num_clients=50, batch_size=8))
    assert strategy.round == 40 and set(strategy.cohort) <= set(range(50)) - set(crashed)
    assert max(accuracy[:19]) > 0.75 and accuracy[-1] > 0.85
    assert accuracy[-1] > accuracy[0]


def test_a_federation_that_dies_names_the_last_checkpoint(tmp_path: Path) -> None:
    schedule = MembershipSchedule(crashes={4: list(range(CLIENTS))})
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = silent_trainer(
        Modest(availability=schedule), max_epochs=10, enable_checkpointing=True, callbacks=[saving]
    )
    with pytest.raises(RuntimeError, match="no node of the federation is left") as error:
        trainer.fit(Classifier(), *loaders(clients(CLIENTS)))
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert repr(str(saved[-1])) in str(error.value)
    assert isinstance(Classifier.load_from_checkpoint(saved[-1]), Classifier)


def test_a_federation_that_dies_without_a_checkpoint_tells_how_to_keep_one() -> None:
    strategy = Modest(availability=MembershipSchedule(crashes={3: list(range(CLIENTS))}))
    with pytest.raises(RuntimeError, match="no checkpoint was saved; add a ModelCheckpoint callback"):
        silent_trainer(strategy, max_epochs=10).fit(Classifier(), *loaders(clients(CLIENTS)))


def exploding(client: int, round: int) -> Classifier:
    class Exploding(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            strategy: Any = self.trainer.strategy
            explodes = strategy.round == round and strategy.bank.bound == client
            return super().training_step(batch, batch_idx) * (math.inf if explodes else 1.0)

    return Exploding()


def test_a_client_that_diverges_is_left_out_of_the_average() -> None:
    diverged = sample(2)[1]
    strategy, record = Modest(on_nonfinite="drop"), RowsAndBytes()
    trainer = silent_trainer(strategy, max_epochs=2, callbacks=[record])
    module = exploding(diverged, round=1)  # the engine counts from 0
    with pytest.warns(UserWarning, match=rf"clients \[{diverged}\] are not finite"):
        trainer.fit(module, *loaders(clients(CLIENTS)))
    rest = [client for client in sample(2) if client != diverged]
    mean = record.rows[1][rest].mean(axis=0)
    np.testing.assert_allclose(strategy.bank.consensus[0].numpy(), mean[: len(strategy.bank.consensus[0])], atol=1e-6)
    np.testing.assert_allclose(record.rows[1][diverged], mean, atol=1e-6)


def test_an_average_of_nothing_but_diverged_clients_is_that_of_the_others(tmp_path: Path) -> None:
    fastest = fastest_of(2)[0]
    clock = uneven_clock(tmp_path)
    strategy = Modest(success_fraction=0.25, success_rounding="down", on_nonfinite="drop", clock=clock)
    trainer = silent_trainer(strategy, max_epochs=4)
    with pytest.warns(UserWarning, match=rf"clients \[{fastest}\] are not finite"):
        trainer.fit(exploding(fastest, round=1), *loaders(clients(CLIENTS, smallest=8, step=0)))
    assert strategy.round == 4
    assert all(torch.isfinite(vector).all() for vector in strategy.bank.consensus[:2])


def test_a_client_that_diverges_is_named() -> None:
    diverged = sample(2)[0]
    with pytest.raises(RuntimeError, match=rf"clients \[{diverged}\] are not finite at the end of round 1"):
        silent_trainer(Modest()).fit(exploding(diverged, round=1), *loaders(clients(CLIENTS)))


def test_local_buffers_stay_at_home() -> None:
    record = RowsAndBytes()
    strategy = Modest(float_buffers="local")
    silent_trainer(strategy, max_epochs=6, callbacks=[record]).fit(Classifier(dropout=0.0), *loaders(clients(CLIENTS)))
    width = strategy.bank.rows.matrix.shape[1]
    parameters, buffers = record.rows[-1][:, :width], record.rows[-1][:, width:]
    assert len({row.tobytes() for row in buffers}) == len({c for r in range(1, 7) for c in sample(r)} | {-1})
    np.testing.assert_allclose(strategy.bank.consensus[0].numpy(), parameters[sample(6)].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(strategy.bank.consensus[1].numpy(), buffers.mean(axis=0), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sample_size": 2, "num_aggregators": 3}, "num_aggregators=3 is larger than sample_size=2"),
        ({"success_fraction": 0.0}, r"success_fraction=0.0 must be in \(0, 1\]"),
        ({"success_fraction": 1.5}, r"success_fraction=1.5 must be in \(0, 1\]"),
        ({"success_rounding": "nearest"}, "success_rounding='nearest' is not one of"),
        ({"sample_size": 0}, "sample_size=0 must be at least 1"),
        ({"min_models": 0}, "min_models=0 must be at least 1"),
        ({"activity_window": 0}, "activity_window=0 must be at least 1"),
        ({"ping_timeout": 0.0}, "ping_timeout=0.0 must be more than 0 seconds"),
        ({"restart_timeout": -1.0}, "restart_timeout=-1.0 must be more than 0 seconds"),
        ({"aggregation_timeout": math.nan}, "aggregation_timeout=nan must be more than 0 seconds"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        MoDeSTStrategy(**settings)


def refusal(strategy: MoDeSTStrategy) -> str:
    trainer = silent_trainer(strategy)
    with pytest.raises(ValueError) as error:
        trainer.fit(Classifier(), *loaders(clients(CLIENTS)))
    assert trainer.global_step == 0
    return str(error.value)


def test_a_sample_larger_than_the_federation() -> None:
    assert "sample_size=9 is larger than num_clients=8" in refusal(Modest(sample_size=9))


def test_a_trace_of_unknown_nodes(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("client,from,to\n0,0,10\n8,0,10\n")
    message = refusal(Modest(availability=AvailabilityTrace(str(tmp_path / "trace.csv"))))
    assert "line 3" in message and "client=8 is not a client of this federation (0 to 7)" in message


def test_a_schedule_of_unknown_nodes() -> None:
    message = refusal(Modest(availability=MembershipSchedule(joins={2: [11]})))
    assert "names clients [11], but num_clients=8" in message


def test_the_name_is_enough() -> None:
    trainer = silent_trainer("modest")
    assert isinstance(trainer.strategy, MoDeSTStrategy) and trainer.strategy.rules.sample_size == 10
    with pytest.raises(ValueError, match="sample_size=10 is larger than num_clients=1: lower the sample size"):
        trainer.fit(Classifier(), *loaders(clients(1)))  # one client a process, unless the strategy is told


CONFIG = """
model: {class_path: ImageClassifier, init_args: {model: mlp}}
data: {class_path: DigitsDataModule, init_args: {num_clients: 12}}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  strategy:
    class_path: lightning_fed.MoDeSTStrategy
    init_args:
      num_clients: 12
      sample_size: 4
      aggregation_timeout: 300
      availability:
        class_path: lightning_fed.federation.availability.MembershipSchedule
        init_args: {crashes: {2: [0, 1]}, joins: {2: [7]}}
      clock:
        class_path: lightning_fed.federation.virtual_clock.VirtualClock
        init_args:
          latency: 0.1
          seconds_per_step: {class_path: lightning_fed.federation.virtual_clock.Uniform, init_args: {low: 1, high: 2}}
"""


def test_a_federation_with_churn_and_a_clock_from_yaml(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fed"])
    (in_tmp_path / "modest.yaml").write_text(CONFIG)
    cli = FederatedCLI(["--config=modest.yaml"], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    strategy: Any = cli.trainer.strategy
    assert strategy.rules.aggregation_timeout == 300
    second = strategy.replay(2)[1]
    assert (second.left, second.joined) == ([0, 1], [7])
    assert strategy.clock.elapsed > 3
