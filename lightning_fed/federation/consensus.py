"""The consensus model: what is evaluated and exported; and how far the clients are from their mean.

Shapes: C = clients on this rank that have rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy


def refresh_consensus(strategy: FederatedStrategy) -> None:
    """Make the module the consensus model of the rows as they are now; a collective call."""
    bank, exchange = strategy.bank, strategy.exchange
    if strategy.consensus_is_stale:
        with torch.inference_mode(False), torch.no_grad():
            device = strategy.root_device
            first = exchange.clients.start if strategy.is_elastic else 0  # whose integer buffers the model takes
            counters = bank.counters_of(first) if first in bank.clients else torch.zeros_like(bank.consensus[2])
            bank.consensus = [
                strategy.consensus(bank.rows.matrix, exchange).to(device),
                strategy.consensus_buffers(bank.buffers.matrix, exchange).to(device),
                exchange.sum(counters.clone()).to(device) if len(counters) else counters,
            ]
        strategy.consensus_is_stale = False
    bank.bind_consensus()


def consensus_distance(strategy: FederatedStrategy) -> float:
    """``sqrt(mean_i ||x_i - x_bar||^2)`` over the clients that have rows; a collective call."""
    bank, exchange = strategy.bank, strategy.exchange
    if not len(exchange.holders):
        return 0.0
    with torch.inference_mode(False), torch.no_grad():
        rows = bank.rows.matrix
        if strategy.one_model:  # replicas; a few bytes tell whether they are equal indeed
            sums = np.full(len(rows), float(rows[0].double().sum()))
            if np.ptp(exchange.gather_rows(sums)) == 0:
                return 0.0
        mean = bank.consensus[0].to(rows) if strategy.is_elastic else exchange.mean(rows)
        # Row by row: all differences at once would take twice the memory of the rows.
        squares = np.array([float((row - mean).square().sum()) for row in rows])
    return float(np.sqrt((squares if strategy.is_elastic else exchange.gather_rows(squares)[exchange.holders]).mean()))
