"""Gossip with rows that are rounded on their way: half the bytes, and nearly the same models."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, outcome, silent_trainer
from ranks import run_ranks

from lightning_fed import DFedSAMStrategy, GossipStrategy
from lightning_fed.compression import TopK
from lightning_fed.federation.virtual_clock import VirtualClock

N = 6


def fit(message_dtype: Any, devices: int = 1, lr: float = 0.05, **settings: Any) -> dict[str, Any]:
    pl.seed_everything(2, verbose=False)
    strategy = GossipStrategy(num_clients=N, message_dtype=message_dtype, **settings)
    trainer = silent_trainer(strategy, devices)
    trainer.fit(Classifier(lr=lr), *loaders(clients(N)))
    seconds = strategy.clock.elapsed if strategy.clock is not None else 0.0
    return {**outcome(strategy, trainer), "wire": strategy.exchange.wire_bytes, "seconds": seconds}


def test_messages_cost_half_and_change_little() -> None:
    exact, rounded = (fit(kind, clock=VirtualClock(0.0, 0.0, 1e3)) for kind in ("row", "bf16"))
    assert rounded["total_bytes"] * 2 == exact["total_bytes"] > 0
    assert rounded["seconds"] == pytest.approx(exact["seconds"] / 2)
    change = np.abs(rounded["rows"] - exact["rows"]).max()
    assert 1e-5 < change < 0.05


def test_rounding_does_not_depend_on_who_hosts_whom() -> None:
    alone, exact = fit("bf16"), run_ranks(2, fit, "row", 2)
    for result, twice in zip(run_ranks(2, fit, "bf16", 2), exact):
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(result["bytes"], alone["bytes"])
        assert result["wire"] * 2 == twice["wire"] > 0


def test_a_round_without_training_conserves_the_mean_up_to_rounding() -> None:
    strategy = GossipStrategy(num_clients=N, message_dtype="bf16")
    silent_trainer(strategy, max_epochs=1).fit(Classifier(norm=False), loaders(clients(N))[0])
    rows = torch.randn(N, strategy.bank.rows.width, generator=torch.Generator().manual_seed(0))
    before = rows.mean(dim=0)
    strategy.exchange.mix_(rows, strategy.weights(0))
    drift = (rows.mean(dim=0) - before).abs().max()
    assert 1e-6 < drift < 2**-9 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"message_dtype": "fp8"}, r"message_dtype='fp8' is not one of \('row', 'bf16'\)"),
        ({"message_dtype": "bf16", "method": "choco", "compressor": TopK(0.1)}, "message_dtype='bf16'.*'choco'"),
        ({"message_dtype": "bf16", "method": "tracking", "local_steps": 1}, "message_dtype='bf16'.*'tracking'"),
    ],
    ids=str,
)
def test_what_cannot_be_rounded_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GossipStrategy(**settings)


def test_dfedsam_rounds_too() -> None:
    assert DFedSAMStrategy(message_dtype="bf16").message_dtype == "bf16"
