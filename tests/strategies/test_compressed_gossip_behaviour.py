"""Compressed gossip on quadratics on a ring, what it preserves, steps that are left out, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, silent_trainer
from paper_problem import (
    SEED,
    quiet_trainer,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import GossipStrategy
from lightning_fed.callbacks import FederationMonitor
from lightning_fed.compression import Compressor, Identity, Layer, Quantize, RandK, ScaledSign, TopK
from lightning_fed.federation.compressed_channel import CompressedChannel
from lightning_fed.federation.exchange import LoopbackExchange
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.public_copies import PublicCopies
from lightning_fed.proximal import L1Norm
from lightning_fed.strategies.gossip_methods import Beer, Choco, CompressedTracking, GossipMethod, GradientTracking
from lightning_fed.topology import Star

# --------------------------------------------------------------------------------------------------- the ring test

DRAW = np.random.default_rng(0)
CURVATURES = torch.from_numpy(np.stack([DRAW.uniform(0.5, 2, 10) for _ in range(8)]))
MINIMA = torch.from_numpy(np.stack([3 * DRAW.normal(size=10) for _ in range(8)]))
BEST = (CURVATURES * MINIMA).sum(dim=0) / CURVATURES.sum(dim=0)
RING = sum(np.roll(np.eye(8), shift, axis=1) for shift in (-1, 0, 1)) / 3


def copies(number: int, compressor: Compressor | None = None, dtype: torch.dtype = torch.float64) -> PublicCopies:
    start = torch.zeros(8, 10, dtype=dtype)
    layers = [Layer("first", torch.Size([6])), Layer("second", torch.Size([4]))]
    return PublicCopies(CompressedChannel(compressor or TopK(0.3), layers, start, SEED, number), RING, start)


def method_of(name: str, gamma: float = 0, dtype: torch.dtype = torch.float64) -> GossipMethod:
    rows = torch.zeros(8, 10, dtype=dtype)

    def weights(step: int) -> np.ndarray:
        return RING

    def no_prox(rows: Tensor) -> None:
        pass

    if name == "average":
        return GossipMethod(weights, 1)
    if name == "dsgt":
        return GradientTracking(weights, rows, no_prox)
    if name == "choco":
        return Choco(weights, 1, copies(0, dtype=dtype), gamma)
    kind = {"cdproxsgt": CompressedTracking, "beer": Beer}[name]
    return kind(weights, rows, no_prox, copies(0, dtype=dtype), copies(1, dtype=dtype), gamma)


def descend(method: GossipMethod, eta: float, steps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """On ``f_i(x) = (x - b_i)^T A_i (x - b_i) / 2`` from 0; all clients' models."""
    exchange, X = LoopbackExchange(Layout(8)), torch.zeros(8, 10, dtype=dtype)
    curvatures, minima = CURVATURES.to(dtype), MINIMA.to(dtype)
    for t in range(steps):
        X -= eta * method.directions(curvatures * (X - minima), exchange, t)
        method.mix(X, exchange, t)
    return X


def error_of(X: Tensor) -> float:
    """``||X - 1 x*^T||_F / sqrt(8)``."""
    return float((X.double() - BEST).norm()) / 8**0.5


def test_adapt_then_combine_stays_away_from_the_minimum() -> None:
    assert error_of(descend(method_of("average"), 0.1, 3000)) == pytest.approx(0.9789, abs=5e-5)


def test_tracked_gradients_reach_the_minimum() -> None:
    assert error_of(descend(method_of("dsgt"), 0.1, 3000)) < 1e-14


@pytest.mark.parametrize(
    ("gamma", "error"),
    [
        (0.8, 0.342),
        pytest.param(0.5, 0.572, marks=pytest.mark.slow),
        pytest.param(0.3, 0.934, marks=pytest.mark.slow),
        (0.1, 2.15),
    ],
)
def test_choco_stays_away_the_farther_the_less_it_mixes(gamma: float, error: float) -> None:
    """The bias of CHOCO does not vanish with time: 700 steps reach the digits of 6,000."""
    assert error_of(descend(method_of("choco", gamma), 0.02, 700)) == pytest.approx(error, rel=2e-3)


@pytest.mark.slow
def test_choco_blows_up_if_it_mixes_at_full_rate() -> None:
    """The unstable part grows out of rounding, so that nothing shows for thousands of steps."""
    assert error_of(descend(method_of("choco", 1.0), 0.02, 6000)) > 1000


@pytest.mark.parametrize("name", ["beer", "cdproxsgt"])
def test_compressed_trackers_come_near_the_minimum(name: str) -> None:
    assert error_of(descend(method_of(name, 0.8), 0.02, 600)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gamma", "steps"),
    [("beer", 0.8, 2000), ("beer", 0.5, 2000), ("beer", 0.3, 2000), ("beer", 0.1, 6000), ("cdproxsgt", 0.5, 2000)],
)
def test_compressed_trackers_reach_the_minimum(name: str, gamma: float, steps: int) -> None:
    """But for rounding: sums of messages that are kept for thousands of steps cost three digits."""
    assert error_of(descend(method_of(name, gamma), 0.02, steps)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beer", "cdproxsgt"])
def test_compressed_trackers_blow_up_if_they_mix_at_full_rate(name: str) -> None:
    assert error_of(descend(method_of(name, 1.0), 0.02, 4000)) > 1000


class RingQuadratic(pl.LightningModule):
    """The same problem as a user would write it: the one sample of each client is its (A_i, b_i)."""

    def __init__(self, eta: float = 0.02) -> None:
        super().__init__()
        self.eta = eta
        self.x = torch.nn.ParameterList([torch.zeros(6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        curvatures, minima = batch[0][0], batch[1][0]
        return (curvatures * (torch.cat(list(self.x)) - minima) ** 2).sum() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.eta)


def ring_loader() -> DataLoader[Any]:
    dataset = TensorDataset(CURVATURES, MINIMA)
    dataset.client_indices = [np.array([client]) for client in range(8)]  # type: ignore[attr-defined]
    return DataLoader(dataset, batch_size=1)


RING_STRATEGIES: dict[str, dict[str, Any]] = {
    "average": {},
    "choco": {"method": "choco", "compressor": TopK(0.3)},
    "dsgt": {"method": "tracking"},
    "cdproxsgt": {"method": "tracking", "compressor": TopK(0.3)},
    "beer": {"method": "beer", "compressor": TopK(0.3)},
}


@pytest.mark.parametrize("name", RING_STRATEGIES)
def test_the_trainer_makes_the_same_steps(name: str) -> None:
    settings = RING_STRATEGIES[name]
    strategy = GossipStrategy(num_clients=8, gamma=0.5, local_steps=1, rounds_per_epoch=60, **settings)
    quiet_trainer(1, strategy=strategy).fit(RingQuadratic(), ring_loader())
    expected = descend(method_of(name, 0.5), 0.02, 60)
    torch.testing.assert_close(strategy.bank.rows.matrix, expected, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("gamma", [0.1, 0.7, 1.0])
@pytest.mark.parametrize(
    "compressor", [TopK(0.3), TopK(0.3, "layer"), RandK(0.3), ScaledSign(), Quantize(4), Identity()], ids=repr
)
def test_gossip_of_compressed_differences_preserves_the_mean(compressor: Compressor, gamma: float) -> None:
    exchange, x_hat = LoopbackExchange(Layout(8)), copies(0, compressor)
    X = torch.randn(8, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, spread = X.mean(dim=0), (X - X.mean(dim=0)).norm()
    for step in range(40):
        x_hat.publish(X, exchange, step)
        x_hat.mix_(X, gamma)
        pull = torch.from_numpy(RING) @ x_hat.copies - x_hat.copies
        torch.testing.assert_close(x_hat.pull, pull, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(X.mean(dim=0), mean, rtol=1e-12, atol=1e-12)
    if gamma == 0.1:
        assert (X - mean).norm() < 0.9 * spread


@pytest.mark.parametrize("name", ["beer", "cdproxsgt"])
def test_the_mean_tracker_stays_the_mean_gradient_in_float32(name: str) -> None:
    """Rounding must not pile up: float64 is 1e-4 away from the minimum after 700 steps, and float32 can be."""
    method = method_of(name, 0.5, torch.float32)
    X = descend(method, 0.02, 700, torch.float32)
    drift = (method.trackers - method.last_gradients).double().mean(dim=0).norm()
    assert drift < 1e-5
    assert error_of(X) < 1e-4


# ---------------------------------------------------------------------------------- gradients that are not finite


class BadQuadratic(RingQuadratic):
    """Client 3's loss is not a number in one round."""

    def __init__(self, round: int) -> None:
        super().__init__()
        self.round = round

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy = self.trainer.strategy
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if (strategy.round, strategy.bank.bound) == (self.round, 3) else loss


@pytest.mark.parametrize("round", [0, 7])
@pytest.mark.parametrize("name", ["dsgt", "cdproxsgt", "beer"])
def test_all_clients_leave_out_a_step_with_a_gradient_that_is_not_finite(name: str, round: int) -> None:
    """As if the step had not been: the others are the same steps, one later."""
    settings = RING_STRATEGIES[name]
    strategy = GossipStrategy(num_clients=8, gamma=0.5, local_steps=1, rounds_per_epoch=21, **settings)
    trainer = quiet_trainer(1, strategy=strategy, callbacks=[FederationMonitor(plots=False)])
    with pytest.warns(UserWarning, match=f"round {round}: a gradient is not finite, so all clients leave this step"):
        trainer.fit(BadQuadratic(round), ring_loader())
    expected = descend(method_of(name, 0.5), 0.02, 20)
    torch.testing.assert_close(strategy.bank.rows.matrix, expected, rtol=0, atol=1e-13)
    assert float(trainer.callback_metrics["fed/skipped_steps"]) == 1


class BadFeatures(Classifier):
    """Features of client 1 are not a number in round 2, and so is what its BatchNorm makes of them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy, (features, labels) = self.trainer.strategy, batch
        if (strategy.round, strategy.bank.bound) == (2, 1):
            features = features * torch.nan
        return super().training_step((features, labels), batch_idx)


@pytest.mark.parametrize("float_buffers", ["mix", "local"])
def test_statistics_of_a_step_that_is_left_out_are_forgotten(float_buffers: Any) -> None:
    strategy = GossipStrategy(
        method="tracking", num_clients=4, local_steps=1, rounds_per_epoch=6, float_buffers=float_buffers
    )
    trainer = silent_trainer(strategy, max_epochs=1)
    with pytest.warns(UserWarning, match="not finite"):
        trainer.fit(BadFeatures(), *loaders(clients(4)))
    assert torch.isfinite(strategy.bank.buffers.matrix).all() and torch.isfinite(strategy.bank.rows.matrix).all()
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


# --------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("settings", [RING_STRATEGIES[name] for name in ("choco", "dsgt", "cdproxsgt", "beer")])
def test_rows_of_half_precision_keep_float32_copies(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    strategy = GossipStrategy(num_clients=4, local_steps=1, **settings)
    with caplog.at_level("INFO"):
        silent_trainer(strategy, precision="bf16-true").fit(Classifier(), *loaders(clients(4)))
    assert caplog.text.count("keeps copies and trackers in float32") == 1
    assert strategy.bank.rows.matrix.dtype == torch.bfloat16
    assert all(matrix.dtype.itemsize >= 4 for matrix in strategy.client_matrices().values())


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "gossip"}, r"method='gossip' is not one of \('average', 'choco', 'tracking', 'beer'\)"),
        ({"start": "random"}, r"start='random' is not one of \('zero', 'model'\)"),
        ({"gamma": 0.0}, "gamma=0.0 must be above 0 and at most 1"),
        ({"gamma": 1.5}, "gamma=1.5 must be above 0 and at most 1"),
        ({"gamma": float("nan")}, "gamma=nan must be a finite number"),
        ({"method": "choco"}, r"method='choco' sends compressed messages: give it a compressor=TopK\(0.1\)"),
        ({"method": "beer", "local_steps": 1}, "method='beer' sends compressed messages"),
        ({"compressor": TopK(0.1)}, r"compressor=TopK\(ratio=0.1.*method='average'.*use method='choco', 'beer' or"),
        (
            {"method": "choco", "compressor": RandK(0.1, unbiased=True)},
            r"compressor=RandK\(ratio=0.1.*unbiased=True\).*leave out the scaling \(unbiased=False\)",
        ),
        ({"proximal": L1Norm(0.1)}, r"proximal=L1Norm\(weight=0.1\) goes with method='tracking', not with 'average'"),
        (
            {"method": "beer", "compressor": TopK(0.1), "local_steps": 1, "proximal": L1Norm(0.1)},
            "proximal=.* goes with method='tracking', not with 'beer'",
        ),
        ({"method": "tracking"}, "method='tracking' communicates once at every step, but local_steps=None.*set both"),
        ({"method": "tracking", "local_steps": 2}, "local_steps=2 and gossip_steps=1: set both to 1"),
        ({"method": "tracking", "local_steps": 1, "gossip_steps": 2}, "local_steps=1 and gossip_steps=2: set both"),
        (
            {"method": "choco", "compressor": TopK(0.1), "participation": UniformSample(2)},
            r"participation=UniformSample.*method='choco'.*full participation \(participation=None\)",
        ),
        (
            {"method": "tracking", "local_steps": 1, "participation": UniformSample(2)},
            "participation=UniformSample.*method='tracking'",
        ),
        (
            {"method": "choco", "compressor": TopK(0.1), "on_peer_loss": "drop"},
            "method='choco' neighbours keep an account.*on_peer_loss='raise', or method='average'",
        ),
        ({"method": "tracking", "local_steps": 1, "on_peer_loss": "drop"}, "method='tracking' neighbours keep an"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        GossipStrategy(**settings)


def test_a_regularizer_of_negative_weight() -> None:
    with pytest.raises(ValueError, match=r"weight=-0.1 must be in \[0, inf\)"):
        L1Norm(-0.1)
    with pytest.raises(ValueError, match="weight=nan must be a number in"):
        L1Norm(float("nan"))


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def refusal(strategy: GossipStrategy, module: Any = None, **fit: Any) -> str:
    trainer = silent_trainer(strategy)
    with pytest.raises(ValueError) as error:
        trainer.fit(module or Classifier(), *loaders(clients(4)), **fit)
    assert trainer.global_step == 0
    return str(error.value)


def test_compression_on_a_topology_that_changes() -> None:
    message = refusal(GossipStrategy("one-peer-exponential", method="choco", compressor=TopK(0.1), num_clients=4))
    assert "topology=OnePeerExponential changes from round to round" in message
    assert "use a topology that stays" in message


def test_manual_optimization() -> None:
    message = refusal(GossipStrategy(method="tracking", local_steps=1, num_clients=4), ByHand())
    assert "ByHand has automatic_optimization=False" in message


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("saved") / "saved.ckpt"
    trainer = silent_trainer(GossipStrategy(method="choco", compressor=TopK(0.1), num_clients=4), max_epochs=1)
    trainer.fit(Classifier(), *loaders(clients(4)))
    trainer.save_checkpoint(path)
    return str(path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"compressor": TopK(0.2)}, "compressor=\"TopK(ratio=0.1, scope='model')\", but this run has"),
        ({"method": "beer", "local_steps": 1}, "method='choco', but this run has 'beer'"),
        ({"topology": Star()}, "topology"),  # the sum of what neighbours have sent is that of a ring
    ],
    ids=["compressor", "method", "topology"],
)
def test_resuming_with_other_settings(settings: dict[str, Any], expected: str, saved: str) -> None:
    choco = {"method": "choco", "compressor": TopK(0.1), "num_clients": 4}
    message = refusal(GossipStrategy(**{**choco, **settings}), ckpt_path=saved)
    assert expected in message and Path(saved).name in message
    assert "resume with the settings of the run that saved it" in message
