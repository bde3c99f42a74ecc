"""Clipped updates: the two rules of the papers, and a bound that no rounding exceeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_problem import SHARDS, TwoLayers, loader_of, quiet_trainer
from torch import Tensor

from lightning_fed import FedAvgStrategy, GossipStrategy
from lightning_fed.compression import Layer
from lightning_fed.federation import update_clipping
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.federation.update_clipping import Clipping, UpdateClipping

SIZES = (6, 1, 0, 9)  # of layers; one is empty
LAYERS = [Layer(f"layer {index}", torch.Size([size])) for index, size in enumerate(SIZES)]
EYE = np.eye(8)
CLIPPINGS: tuple[Clipping, ...] = ("whole", "layers", "layers_by_size")


def exact_norm(update: Tensor) -> float:
    """Of float64 numbers, with one rounding at the end."""
    return math.sqrt(math.fsum(float(value) ** 2 for value in update))


def clipped(clipping: Clipping, update: np.ndarray, max_norm: float) -> np.ndarray:
    """The papers' rules, in NumPy."""
    norm = np.sqrt((update**2).sum())
    if clipping == "whole":
        return update * min(1.0, max_norm / norm)
    if norm < max_norm:
        return update
    parts = [part for part in np.split(update, np.cumsum(SIZES)[:-1]) if len(part)]
    shares = [1 / len(parts) if clipping == "layers" else len(part) / len(update) for part in parts]
    return np.concatenate(
        [part * max_norm * np.sqrt(share) / np.sqrt((part**2).sum()) for part, share in zip(parts, shares)]
    )


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_an_update_is_clipped_as_the_papers_say(clipping: Clipping, size: float) -> None:
    draw = np.random.default_rng(0)
    start, update = draw.normal(size=16), draw.normal(size=16)
    update *= size / np.sqrt((update**2).sum())
    row = torch.from_numpy(start + update)
    UpdateClipping(1.0, clipping, LAYERS).clip_(row, torch.from_numpy(start))
    np.testing.assert_allclose(row.numpy() - start, clipped(clipping, update, 1.0), atol=1e-11)


def test_a_layer_that_has_not_moved_stays() -> None:
    row, start = torch.zeros(16), torch.zeros(16)
    row[7:] = 5.0
    UpdateClipping(2.0, "layers", LAYERS).clip_(row, start)
    assert not row[:7].any() and torch.allclose(row[7:].norm(), torch.tensor(2 / math.sqrt(3)))


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_rows_that_take_several_blocks_are_clipped_alike(clipping: Clipping, monkeypatch: pytest.MonkeyPatch) -> None:
    start, row = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    other = row.clone()
    UpdateClipping(0.5, clipping, LAYERS).clip_(row, start)
    monkeypatch.setattr(update_clipping, "NUMBERS_PER_BLOCK", 4)
    UpdateClipping(0.5, clipping, LAYERS).clip_(other, start)
    torch.testing.assert_close(other, row)


@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    clipping=st.sampled_from(CLIPPINGS),
    max_norm=st.floats(1e-6, 1e3),
    start_size=st.floats(1e-6, 1e3),
    update_size=st.floats(1e-6, 1e3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_rounding_exceeds_the_bound(
    dtype: torch.dtype, clipping: Clipping, max_norm: float, start_size: float, update_size: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    start = (start_size * torch.randn(16, generator=draw, dtype=torch.float64)).to(dtype)
    row = (start.double() + update_size * torch.randn(16, generator=draw, dtype=torch.float64)).to(dtype)
    before = row.clone()
    UpdateClipping(max_norm, clipping, LAYERS).clip_(row, start)
    update = row.double() - start.double()
    assert exact_norm(update) <= max_norm
    if exact_norm(before.double() - start.double()) < max_norm * (1 - 1e-9):
        assert torch.equal(row, before)
    assert bool((update * (before.double() - start.double()) >= 0).all())  # no entry turns around


# ---------------------------------------------------------------------------------------------------- in a strategy


class Watching:
    """A strategy that remembers what each client's update is when rows meet."""

    norms: list[float]

    def start_round(self, rows: Tensor, buffers: Tensor, exchange: Any) -> None:
        super().start_round(rows, buffers, exchange)  # type: ignore[misc]
        self.started = rows.clone()

    def observe(self, rows: Tensor) -> None:
        self.norms += (rows.double() - self.started.double()).norm(dim=1).tolist()


class WatchedFedAvg(Watching, FedAvgStrategy):
    def mix(self, rows: Tensor, exchange: Any) -> None:
        super().mix(rows, exchange)
        self.observe(rows)  # a server leaves the rows as they came


class WatchedGossip(Watching, GossipStrategy):
    def weights(self, gossip_step: int) -> np.ndarray:
        return EYE  # rows after a round are then those that would have met

    def mix(self, rows: Tensor, exchange: Any) -> None:
        super().mix(rows, exchange)
        self.observe(rows)


@pytest.mark.parametrize("kind", [WatchedFedAvg, WatchedGossip])
@pytest.mark.parametrize("together", [1, 4])
def test_updates_of_a_federation_never_exceed_the_norm(kind: type[FederatedStrategy], together: int) -> None:
    norms = {}
    for bound in (None, 0.2):
        strategy = kind(num_clients=8, max_update_norm=bound, clients_per_step=together, seed=0)
        strategy.norms = []
        quiet_trainer(3, "32-true", strategy=strategy).fit(TwoLayers().float(), loader_of(SHARDS))
        norms[bound] = strategy.norms
    assert len(norms[0.2]) == 24
    assert min(norms[None]) > 0.2  # each is clipped
    assert max(norms[0.2]) <= 0.2 and min(norms[0.2]) > 0.199999


def test_a_client_that_is_restarted_from_the_others_is_not_clipped() -> None:
    class Breaking(WatchedGossip):
        def after_joint_step(self, joint: Any) -> None:
            if joint.is_last_of_round:
                self.bank.bind_nothing()
                self.bank.rows.matrix[2] = float("nan")

    strategy = Breaking(num_clients=8, max_update_norm=1e-3, on_nonfinite="drop")
    strategy.norms = []
    quiet_trainer(1, "32-true", strategy=strategy).fit(TwoLayers().float(), loader_of(SHARDS))
    restarted = strategy.norms.pop(2)
    assert restarted > 0.01 > 1e-3 >= max(strategy.norms)


def test_gradients_that_meet_are_not_clipped() -> None:
    with pytest.raises(ValueError, match=r"max_update_norm=1\.0 .* use method='average' or 'choco'"):
        GossipStrategy(method="tracking", local_steps=1, max_update_norm=1.0)


@pytest.mark.parametrize("kind", [FedAvgStrategy, GossipStrategy])
@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf])
def test_a_norm_that_bounds_nothing_is_refused(kind: type[FederatedStrategy], norm: float) -> None:
    with pytest.raises(ValueError, match="max_update_norm="):
        kind(max_update_norm=norm)
