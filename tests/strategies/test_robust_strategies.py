"""Strategies with robust rules and simulated attackers: trajectories against NumPy loops, bytes, time, refusals.

Shapes: N = clients, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from paper_problem import (
    CLIENTS,
    SEED,
    SHARDS,
    SIZES,
    START_P,
    TOLERANCE,
    TwoLayers,
    loader_of,
    local_sgd,
    pass_over_shard,
    quiet_trainer,
    run,
)
from test_robust import krum, median, nearest, trimmed_mean, weiszfeld

from lightning_fed import (
    ALittleIsEnough,
    CoordinateMedian,
    DFedSAMStrategy,
    FallOfEmpires,
    FedAvgStrategy,
    GaussianNoise,
    GeometricMedian,
    GossipStrategy,
    Krum,
    MoDeSTStrategy,
    NearestNeighborAverage,
    NotANumber,
    SignFlip,
    Silent,
    TrimmedMean,
    UserLevelPrivacy,
    VirtualClock,
)
from lightning_fed.attacks import Attack, largest_z
from lightning_fed.compression import TopK
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.randomness import Stream, derive_seed
from lightning_fed.modest.membership import hash_order
from lightning_fed.robust import RobustMix

EPOCHS = 6
HOSTILE, HONEST = [1, 6], [0, 2, 3, 4, 5, 7]

Rule = Callable[[np.ndarray], np.ndarray]  # rows [K, P] -> [P]
Corrupt = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # (X, X at the round's start, round) -> what is sent


# ---------------------------------------------------------------------------------------------------- the equations


def as_trained(X: np.ndarray, X0: np.ndarray, round: int) -> np.ndarray:
    return X


def hostile(row: Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]) -> Corrupt:
    """Replace the attackers' rows, each by what it makes of (X, X0, its number, the round)."""

    def corrupt(X: np.ndarray, X0: np.ndarray, round: int) -> np.ndarray:
        sent = X.copy()
        for i in HOSTILE:
            sent[i] = row(X, X0, i, round)
        return sent

    return corrupt


def noise(client: int, round: int) -> np.ndarray:
    draw = torch.Generator().manual_seed(derive_seed(Stream.ATTACK, SEED, round, client))
    return torch.randn(len(START_P), generator=draw, dtype=torch.float64).numpy()


ATTACKS: dict[str, tuple[Attack, Corrupt]] = {
    "sign flip": (SignFlip(HOSTILE, scale=2.0), hostile(lambda X, X0, i, t: X0[i] - 2 * (X[i] - X0[i]))),
    "a little": (
        ALittleIsEnough(HOSTILE),
        # n = 8, f = 2: s = 5 - 2 = 3, Phi(z) = (8 - 2 - 3) / (8 - 2)
        hostile(lambda X, X0, i, t: X[HONEST].mean(0) - NormalDist().inv_cdf(3 / 6) * X[HONEST].std(0)),
    ),
    "more than a little": (
        ALittleIsEnough(HOSTILE, z=1.5),
        hostile(lambda X, X0, i, t: X[HONEST].mean(0) - 1.5 * X[HONEST].std(0)),
    ),
    "empires": (
        FallOfEmpires(HOSTILE, epsilon=0.7),
        hostile(lambda X, X0, i, t: X0[i] - 0.7 * (X[HONEST] - X0[HONEST]).mean(0)),
    ),
    "noise": (GaussianNoise(HOSTILE, std=0.3), hostile(lambda X, X0, i, t: X0[i] + 0.3 * noise(i, t))),
    "silent": (Silent(HOSTILE), hostile(lambda X, X0, i, t: X0[i])),
}


def fedavg(rule: Rule, corrupt: Corrupt = as_trained, server: float | None = None) -> Iterator[np.ndarray]:
    """The server's model after each round: the rule's, or a momentum step (0.9) of this rate along ``x - rule``."""
    x, m = START_P, np.zeros_like(START_P)
    for t in range(EPOCHS):
        X = np.stack([local_sgd(x, pass_over_shard(k)) for k in range(CLIENTS)])
        y = rule(corrupt(X, np.tile(x, (CLIENTS, 1)), t))
        m = 0.9 * m + (x - y)
        x = y if server is None else x - server * m
        yield x


def modest(rule: Rule, size: int, corrupt: Corrupt = as_trained) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All clients' rows and the new model after each round, of samples that all live."""
    X, x = np.tile(START_P, (CLIENTS, 1)), START_P
    for t in range(EPOCHS):
        S = hash_order(CLIENTS, t + 1)[:size]
        X0 = X.copy()
        X0[S] = x
        X[S] = [local_sgd(x, pass_over_shard(i)) for i in S]
        X = corrupt(X, X0, t)
        x = rule(X[np.sort(S)])
        yield X.copy(), x


def gossip(rule: Callable[[np.ndarray, int], np.ndarray], corrupt: Corrupt = as_trained, **local: float) -> Any:
    """All clients' rows after each round on a torus of 2 x 4: up and down is one neighbour, so K = 4."""
    X = np.tile(START_P, (CLIENTS, 1))
    for t in range(EPOCHS):
        X0, X = X, np.stack([local_sgd(X[i], pass_over_shard(i), **local) for i in range(CLIENTS)])
        X = corrupt(X, X0, t)
        X = np.stack([rule(X[heard], int(np.searchsorted(heard, i))) for i, heard in enumerate(TORUS)])
        if corrupt is not as_trained:
            X[HOSTILE] = X[HONEST].mean(axis=0)
        yield X


def torus_neighbours(i: int) -> list[int]:
    row, column = divmod(i, 4)
    return sorted({i, (1 - row) * 4 + column, row * 4 + (column + 1) % 4, row * 4 + (column - 1) % 4})


TORUS = [torus_neighbours(i) for i in range(CLIENTS)]


# -------------------------------------------------------------------------------------------------------- the tests

Fedavg = partial(FedAvgStrategy, num_clients=CLIENTS, seed=SEED, evaluate="both")
Gossip = partial(GossipStrategy, "torus", num_clients=CLIENTS, seed=SEED)
Modest = partial(MoDeSTStrategy, num_clients=CLIENTS, seed=SEED)


def server_models(strategy: FedAvgStrategy) -> np.ndarray:
    """The server's model after each of some epochs, ``[epochs, P]``."""
    models: list[np.ndarray] = []
    mix = strategy.mix

    def recorded(rows: Any, exchange: Any) -> None:
        mix(rows, exchange)
        models.append(strategy.server_row().numpy().copy())

    strategy.mix = recorded  # type: ignore[method-assign]
    quiet_trainer(EPOCHS, strategy=strategy, limit_val_batches=0).fit(TwoLayers(), loader_of(SHARDS))
    return np.stack(models)


SERVER_RULES: dict[str, tuple[dict[str, Any], Rule]] = {
    "median": ({"robust": CoordinateMedian(), "weighting": "uniform"}, median),
    "trimmed mean": ({"robust": TrimmedMean(2), "weighting": "uniform"}, lambda X: trimmed_mean(X, 2)),
    "geometric median": ({"robust": GeometricMedian(20)}, lambda X: weiszfeld(X, 20, 1e-6, SIZES / SIZES.sum())),
    "krum": ({"robust": Krum(2), "weighting": "uniform"}, lambda X: krum(X, 2)),
    "multi-krum": ({"robust": Krum(2, 3), "weighting": "uniform"}, lambda X: krum(X, 2, 3)),
}


@pytest.mark.parametrize("name", SERVER_RULES)
def test_fedavg_follows_the_rule(name: str) -> None:
    settings, rule = SERVER_RULES[name]
    expected = np.stack(list(fedavg(rule)))
    np.testing.assert_allclose(server_models(Fedavg(**settings)), expected, rtol=0, atol=TOLERANCE)


def test_a_server_optimizer_steps_towards_what_the_rule_gives() -> None:
    momentum = partial(torch.optim.SGD, lr=0.7, momentum=0.9)
    strategy = Fedavg(robust=CoordinateMedian(), weighting="uniform", server_optimizer=momentum)
    np.testing.assert_allclose(
        server_models(strategy), np.stack(list(fedavg(median, server=0.7))), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_attackers_send_a_server_what_they_should(name: str) -> None:
    attack, corrupt = ATTACKS[name]
    expected = np.stack(list(fedavg(lambda X: X.mean(axis=0), corrupt)))
    models = server_models(Fedavg(weighting="uniform", attack=attack))
    np.testing.assert_allclose(models, expected, rtol=0, atol=TOLERANCE)


GOSSIP_RULES: dict[str, tuple[RobustMix, Callable[[np.ndarray, int], np.ndarray]]] = {
    "median": (CoordinateMedian(), lambda X, own: median(X)),
    "trimmed mean": (TrimmedMean(1), lambda X, own: trimmed_mean(X, 1)),
    "geometric median": (GeometricMedian(20), lambda X, own: weiszfeld(X, 20, 1e-6)),
    "nearest": (NearestNeighborAverage(1), lambda X, own: nearest(X, 1, own)),
}


@pytest.mark.parametrize("name", GOSSIP_RULES)
def test_gossip_follows_the_rule(name: str) -> None:
    rule, equation = GOSSIP_RULES[name]
    rows, model = run(Gossip(robust=rule), epochs=EPOCHS)
    expected = np.stack(list(gossip(equation)))
    np.testing.assert_allclose(rows, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(model, expected[-1].mean(axis=0), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ATTACKS)
def test_attackers_in_gossip_send_what_they_should(name: str) -> None:
    attack, corrupt = ATTACKS[name]
    rows, model = run(Gossip(robust=TrimmedMean(1), attack=attack), epochs=EPOCHS)
    expected = np.stack(list(gossip(lambda X, own: trimmed_mean(X, 1), corrupt)))
    np.testing.assert_allclose(rows, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(model, expected[-1][HONEST].mean(axis=0), rtol=0, atol=TOLERANCE)


def assert_modest(strategy: MoDeSTStrategy, expected: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    rows, model = run(strategy, epochs=EPOCHS)
    expected_rows, expected_models = map(np.stack, zip(*expected))
    np.testing.assert_allclose(rows, expected_rows, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(model, expected_models[-1], rtol=0, atol=TOLERANCE)


MODEST_RULES: dict[str, tuple[RobustMix, Rule]] = {
    "median": (CoordinateMedian(), median),
    "trimmed mean": (TrimmedMean(2), lambda X: trimmed_mean(X, 2)),
    "geometric median": (GeometricMedian(20), lambda X: weiszfeld(X, 20, 1e-6)),
    "multi-krum": (Krum(1, 3), lambda X: krum(X, 1, 3)),
}


@pytest.mark.parametrize("name", MODEST_RULES)
def test_modests_aggregators_follow_the_rule(name: str) -> None:
    robust, rule = MODEST_RULES[name]
    assert_modest(Modest(sample_size=5, num_aggregators=2, robust=robust), modest(rule, 5))


@pytest.mark.parametrize("name", ATTACKS)
def test_attackers_send_modests_aggregators_what_they_should(name: str) -> None:
    attack, corrupt = ATTACKS[name]
    strategy = Modest(sample_size=CLIENTS, robust=TrimmedMean(2), attack=attack)
    assert_modest(strategy, modest(lambda X: trimmed_mean(X, 2), CLIENTS, corrupt))


def test_an_attacker_outside_modests_sample_does_nothing() -> None:
    idle = [client for client in range(CLIENTS) if client not in hash_order(CLIENTS, 1)[:3]]
    strategy = Modest(sample_size=3, attack=SignFlip(idle))
    rows, _ = run(strategy, epochs=1)
    np.testing.assert_allclose(rows[0], next(modest(lambda X: X.mean(axis=0), 3))[0], rtol=0, atol=TOLERANCE)


def test_dfedsam_mixes_by_the_rule_too() -> None:
    strategy = DFedSAMStrategy("torus", rho=0.1, num_clients=CLIENTS, seed=SEED, robust=CoordinateMedian())
    rows, _ = run(strategy, epochs=EPOCHS)
    expected = np.stack(list(gossip(lambda X, own: median(X), rho=0.1)))
    np.testing.assert_allclose(rows, expected, rtol=0, atol=TOLERANCE)


def test_clients_that_train_together_are_mixed_the_same() -> None:
    attack = SignFlip(HOSTILE)
    alone, _ = run(Gossip(robust=CoordinateMedian(), attack=attack), epochs=EPOCHS)
    together, _ = run(Gossip(robust=CoordinateMedian(), attack=attack, clients_per_step=CLIENTS), epochs=EPOCHS)
    np.testing.assert_allclose(together, alone, rtol=0, atol=TOLERANCE)


# --------------------------------------------------------------------------------------- float buffers, bytes, time


def train(strategy: Any, epochs: int = 3, module: Classifier | None = None, **trainer: Any) -> Any:
    trainer = silent_trainer(strategy, max_epochs=epochs, limit_val_batches=0, **trainer)
    trainer.fit(module or Classifier(), loaders(clients(strategy.num_clients))[0])
    return strategy


def test_float_buffers_follow_the_rule() -> None:
    strategy = train(FedAvgStrategy(num_clients=5, robust=CoordinateMedian(), weighting="uniform", evaluate="both"))
    expected = strategy.bank.buffers.matrix.median(dim=0).values
    torch.testing.assert_close(strategy.bank.consensus[1], expected, rtol=0, atol=0)
    gossip, before = GossipStrategy("complete", num_clients=5, robust=CoordinateMedian()), []
    mix_buffers = gossip.mix_buffers
    gossip.mix_buffers = lambda buffers, exchange: (before.append(buffers.clone()), mix_buffers(buffers, exchange))
    mixed = train(gossip).bank.buffers.matrix
    torch.testing.assert_close(mixed, before[-1].median(dim=0).values.expand_as(mixed), rtol=0, atol=0)


@pytest.mark.parametrize("float_buffers", ["mix", "local"])
@pytest.mark.parametrize(
    "make",
    [
        partial(FedAvgStrategy, cohort_size=5, weighting="uniform"),
        partial(GossipStrategy, "torus"),
        partial(GossipStrategy, "complete", gossip_steps=2, participation=UniformSample(size=5)),
        partial(MoDeSTStrategy, 5, 2),
    ],
)
def test_a_rule_costs_the_bytes_and_the_time_of_plain_averaging(make: Any, float_buffers: Any) -> None:
    def measured(robust: RobustMix | None) -> tuple[list[int], int, float]:
        clock = VirtualClock(0.01, latency=0.002, bandwidth=1e5)
        strategy = train(make(num_clients=8, robust=robust, clock=clock, float_buffers=float_buffers))
        return strategy.exchange.sent_bytes.tolist(), strategy.exchange.server_bytes, clock.elapsed

    for rule in (CoordinateMedian(), GeometricMedian()):
        assert measured(rule) == measured(None)


# ------------------------------------------------------------------------------------------- checkpoints, bad rows


@pytest.mark.parametrize(
    "make",
    [
        partial(GossipStrategy, "complete"),
        partial(FedAvgStrategy, weighting="uniform"),
        partial(MoDeSTStrategy, sample_size=4, num_aggregators=2),
    ],
)
def test_a_run_that_stops_in_a_round_goes_on_to_the_same_bits(make: Any, tmp_path: Path) -> None:
    def strategy() -> Any:
        return make(num_clients=5, robust=TrimmedMean(1), attack=FallOfEmpires([2], 3.0), evaluate="both", seed=1)

    def fit(strategy: Any, seed: int, resume: Path | None = None, **settings: Any) -> Any:
        pl.seed_everything(seed, verbose=False)
        trainer = silent_trainer(strategy, limit_val_batches=0, **settings)
        trainer.fit(Classifier(), loaders(clients(5))[0], ckpt_path=resume)
        return strategy

    # Rounds have five joint steps, so the seventh is in the middle of the second.
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    whole = fit(strategy(), 0, enable_checkpointing=True, callbacks=[keep])
    resumed = fit(strategy(), 99, tmp_path / "step=7.ckpt")
    assert resumed.round == 3
    np.testing.assert_array_equal(all_rows(resumed), all_rows(whole))


@pytest.mark.parametrize("make", [partial(GossipStrategy, "complete"), FedAvgStrategy, partial(MoDeSTStrategy, 5)])
def test_rows_of_nan_are_dropped_and_named(make: Any) -> None:
    strategy = make(num_clients=5, attack=NotANumber([1, 3]), on_nonfinite="drop")
    with pytest.warns(UserWarning, match=r"clients \[1, 3\] are not finite and restart from the others"):
        train(strategy)
    assert strategy.dropped.tolist() == [1, 3]
    assert np.isfinite(all_rows(strategy)).all() and torch.isfinite(strategy.bank.consensus[0]).all()
    with pytest.raises(RuntimeError, match=r"clients \[1, 3\] are not finite at the end of round 0"):
        train(make(num_clients=5, attack=NotANumber([1, 3])))


def test_a_server_does_not_combine_dropped_clients() -> None:
    settings: dict[str, Any] = {"weighting": "uniform", "evaluate": "both", "on_nonfinite": "drop"}
    strategy = FedAvgStrategy(num_clients=5, robust=CoordinateMedian(), attack=NotANumber([1, 3]), **settings)
    train(strategy, epochs=1, module=Classifier(norm=False))
    kept = strategy.bank.rows.matrix[[0, 2, 4]].median(dim=0).values
    torch.testing.assert_close(strategy.server_row(), kept, rtol=0, atol=0)
    too_few = FedAvgStrategy(num_clients=5, robust=TrimmedMean(2), attack=NotANumber([1, 3]), **settings)
    with pytest.raises(ValueError, match="at least 5 clients, but only 3 come together"):
        train(too_few, epochs=1)


def test_attackers_without_a_victim_harm_nobody() -> None:
    settings: dict[str, Any] = {"num_clients": 6, "cohort_size": 3, "seed": 5, "evaluate": "both"}
    cohorts = [UniformSample(3).cohort(round, 6, 5).tolist() for round in range(3)]
    absent = next(client for client in range(6) if client not in cohorts[0])
    attacks = [None, Silent([absent]), ALittleIsEnough(cohorts[0])]  # the last are among themselves
    rows = []
    for attack in attacks:
        pl.seed_everything(0, verbose=False)
        rows.append(all_rows(train(FedAvgStrategy(attack=attack, **settings), epochs=1)))
    np.testing.assert_array_equal(rows[1], rows[0])
    np.testing.assert_array_equal(rows[2], rows[0])


# -------------------------------------------------------------------------------------------------------- refusals


def refusal(make: Callable[[], Any]) -> str:
    """What is said at construction or set-up, before the first step."""
    with pytest.raises(ValueError) as error:
        strategy = make()
        strategy.local_epochs = 1
        train(strategy)
    return str(error.value)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "cohort": (
        lambda: FedAvgStrategy(num_clients=9, cohort_size=4, weighting="uniform", robust=TrimmedMean(2)),
        "robust=TrimmedMean(byzantine=2) needs the rows of at least 5 clients, but only 4 come together: raise cohort",
    ),
    "samples": (
        lambda: FedAvgStrategy(num_clients=9, robust=Krum(2)),
        "weighting='samples', but robust=Krum(byzantine=2, selected=1) counts every client once: set weighting='uni",
    ),
    "no own row": (
        lambda: FedAvgStrategy(num_clients=9, weighting="uniform", robust=NearestNeighborAverage(2)),
        "robust=NearestNeighborAverage(byzantine=2) needs a row of one's own, which a server has not",
    ),
    "no own model": (
        lambda: MoDeSTStrategy(5, num_clients=9, robust=NearestNeighborAverage(2)),
        "robust=NearestNeighborAverage(byzantine=2) needs a row of one's own, which an aggregator has not",
    ),
    "sample": (
        lambda: MoDeSTStrategy(6, success_fraction=0.6, num_clients=9, robust=TrimmedMean(2)),
        "but only 4 come together: that is what an aggregator waits for; raise sample_size or success_fraction, or",
    ),
    "models": (
        lambda: MoDeSTStrategy(6, aggregation_timeout=9, num_clients=9, robust=TrimmedMean(2)),
        "but only 3 come together: that is what an aggregator waits for; raise min_models, or expect fewer",
    ),
    "elastic nodes": (
        lambda: MoDeSTStrategy(5, num_clients=9, on_peer_loss="drop", attack=Silent([0])),
        "needs the rows of all ranks at the same time, which on_peer_loss='drop' does not promise",
    ),
    "attackers that are no nodes": (
        lambda: MoDeSTStrategy(3, num_clients=4, attack=Silent([1, 4])),
        "clients=[1, 4] of Silent are not all among the num_clients=4 clients 0 .. 3.",
    ),
    "privacy": (
        lambda: FedAvgStrategy(
            num_clients=9,
            weighting="uniform",
            robust=CoordinateMedian(),
            privacy=UserLevelPrivacy(clip=1.0, noise_multiplier=1.0, delta=1e-3),
        ),
        "no epsilon can be stated",
    ),
    "elastic server": (
        lambda: FedAvgStrategy(num_clients=9, on_peer_loss="drop", robust=GeometricMedian()),
        "robust=GeometricMedian(iterations=100, smoothing=1e-06) needs the rows of all ranks at the same time",
    ),
    "elastic gossip": (
        lambda: GossipStrategy(num_clients=9, on_peer_loss="drop", attack=Silent([0])),
        "needs the rows of all ranks at the same time, which on_peer_loss='drop' does not promise",
    ),
    "degree": (
        lambda: GossipStrategy("ring", num_clients=9, robust=TrimmedMean(2)),
        "but only 3 come together: with topology=Ring a client has 2 neighbours",
    ),
    "degree later": (
        lambda: GossipStrategy("one-peer-exponential", num_clients=8, robust=CoordinateMedian()),
        "but only 2 come together: with topology=OnePeerExponential a client has 1 neighbours",
    ),
    "compressed": (
        lambda: GossipStrategy(num_clients=9, method="choco", compressor=TopK(0.1), robust=CoordinateMedian()),
        "robust=CoordinateMedian() is about rows that clients send each other as they are, but with method='choco'",
    ),
    "tracked": (
        lambda: GossipStrategy(num_clients=9, method="tracking", local_steps=1, attack=Silent([0])),
        "is about rows that clients send each other as they are, but with method='tracking'",
    ),
    "rounded": (
        lambda: GossipStrategy("complete", num_clients=9, message_dtype="bf16", robust=CoordinateMedian()),
        "robust=CoordinateMedian() compares rows, and message_dtype='bf16' would round all but one's own",
    ),
    "no rule": (lambda: FedAvgStrategy(num_clients=9, robust="median"), "robust='median' must be"),
    "no attack": (lambda: GossipStrategy(num_clients=9, attack="silent"), "attack='silent' must be"),
    "unknown attacker": (
        lambda: GossipStrategy(num_clients=4, attack=Silent([1, 4])),
        "clients=[1, 4] of Silent are not all among the num_clients=4 clients 0 .. 3.",
    ),
    "only attackers": (
        lambda: FedAvgStrategy(num_clients=2, attack=Silent([1, 0])),
        "clients=[0, 1] of Silent are all num_clients=2 clients: leave some of them honest.",
    ),
    "nobody": (lambda: Silent([]), "clients=[] must be a list of client numbers, for example [0, 1]."),
    "negative": (lambda: Silent([-1]), "clients=[-1] must be a list of client numbers"),
    "fraction": (lambda: Silent([0.5]), "clients=[0.5] must be a list of client numbers"),
    "twice": (lambda: Silent([2, 2]), "clients=[2, 2] names a client twice."),
    "scale": (lambda: SignFlip([0], scale=0), "scale=0 must be"),
    "epsilon": (lambda: FallOfEmpires([0], epsilon=-1), "epsilon=-1 must be"),
    "std": (lambda: GaussianNoise([0], std=float("nan")), "std=nan must be"),
    "z": (lambda: ALittleIsEnough([0], z="much"), "z='much' must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(name: str) -> None:
    make, message = REFUSED[name]
    assert message in refusal(make)


def test_a_sampled_neighbourhood_that_is_too_small_is_refused_in_its_round() -> None:
    strategy = GossipStrategy("ring", num_clients=8, participation=UniformSample(size=5), robust=CoordinateMedian())
    with pytest.raises(ValueError, match="but only 2 come together: use a topology of larger degree"):
        train(strategy)


@pytest.mark.parametrize(
    ("honest", "attackers", "z"), [(21, 5, NormalDist().inv_cdf(12 / 21)), (38, 12, NormalDist().inv_cdf(24 / 38))]
)
def test_the_largest_z_is_the_papers(honest: int, attackers: int, z: float) -> None:
    """n = 26, f = 5: s = 14 - 5 = 9; n = 50, f = 12: s = 26 - 12 = 14."""
    assert largest_z(honest, attackers) == pytest.approx(z)


def test_a_majority_of_attackers_needs_no_z() -> None:
    with pytest.raises(ValueError, match="z=None, but for 6 attackers among 10 clients"):
        largest_z(4, 6)
