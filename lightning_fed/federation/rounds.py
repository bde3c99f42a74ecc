"""The two ends of a round: what happens before the first local step, and the communication after the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed.federation.elastic_exchange import ElasticExchange
from lightning_fed.federation.sampler import JointBatch

if TYPE_CHECKING:
    from lightning_fed.federation.clients import ClientBank
    from lightning_fed.federation.strategy import FederatedStrategy


@torch.no_grad()
def start_round(strategy: FederatedStrategy) -> None:
    """Give the cohort what it starts from."""
    bank = strategy.bank
    if strategy.optimizer_state_policy == "reset":
        bank.reset_optimizers()
    if not strategy.keeps_rows:
        hold_rows(strategy, strategy.cohort)
    strategy.dropped = np.array([], dtype=np.int64)
    if remembers_buffers(strategy):
        strategy.buffers_before = bank.buffers.matrix.clone()
    strategy.start_round(bank.rows.matrix, bank.buffers.matrix, strategy.exchange)


def remembers_buffers(strategy: FederatedStrategy) -> bool:
    """Whether an algorithm may undo a round's steps."""
    return strategy.gathers_gradients or strategy.settles_nonfinite


def hold_rows(strategy: FederatedStrategy, clients: np.ndarray) -> None:
    """Give rows to these clients (sorted) alone, on all ranks."""
    strategy.exchange.hold(clients)
    strategy.bank.hold(strategy.exchange.present.tolist())


def leaves_nothing_behind(strategy: FederatedStrategy, bank: ClientBank) -> bool:
    """Whether a client has no state between rounds, so that any rank can train it."""
    has_scaler = getattr(strategy.precision_plugin, "scaler", None) is not None
    resets = strategy.optimizer_state_policy == "reset"
    return resets and not strategy.keeps_rows and not bank.counters.width and not has_scaler


def finish_joint_step(strategy: FederatedStrategy, joint: JointBatch) -> None:
    """Count a joint step; after a round's last one communicate, after an epoch's last one make the consensus model.

    Comes before Lightning steps the schedulers, so that an algorithm mixes with the rate that its clients have used,
    and before any callback sees the batch's end.
    """
    strategy.joint_index = joint.index + 1
    strategy.after_joint_step(joint)
    if joint.is_last_of_round:
        finish_round(strategy)
        if strategy.round % strategy.sampler.rounds_per_epoch == 0:
            strategy.refresh_consensus()


@torch.no_grad()
def finish_round(strategy: FederatedStrategy) -> None:
    """Communicate, and count the round."""
    bank, exchange = strategy.bank, strategy.exchange
    bank.bind_nothing()
    if strategy.clock is not None:
        strategy.pass_time(strategy.clock, strategy.cohort, local_steps(strategy))
    strategy.corrupt_rows(bank.rows.matrix, exchange)
    if isinstance(exchange, ElasticExchange):
        exchange.begin_round(strategy.round, excluded=settle_nonfinite_here(strategy))
    elif not strategy.settles_nonfinite:
        settle_nonfinite(strategy)
    strategy.mix(bank.rows.matrix, exchange)
    if bank.buffers.width and strategy.float_buffers == "mix":
        strategy.mix_buffers(bank.buffers.matrix, exchange)
    if strategy.optimizer_state_policy == "reset":
        bank.reset_optimizers()
    strategy.round += 1
    strategy.joint_index = 0


def restore_buffers(strategy: FederatedStrategy) -> None:
    """Undo what a step that is left out has done to float buffers: its batches may not have been finite."""
    strategy.bank.bind_nothing()
    strategy.bank.buffers.matrix.copy_(strategy.buffers_before)


def local_steps(strategy: FederatedStrategy) -> np.ndarray:
    """Optimizer steps that each client of the cohort takes in a round, int64 ``[cohort]``."""
    work = strategy.sampler.work
    steps = [work.optimizer_steps_per_round(len(strategy.shards[client])) for client in strategy.cohort]
    return np.array(steps, dtype=np.int64)


def settle_nonfinite(strategy: FederatedStrategy) -> None:
    """Find clients whose row is not finite; refuse to mix them, or drop them and restart them from the others.

    Raises:
        RuntimeError: naming the clients and the round.
    """
    bank, exchange = strategy.bank, strategy.exchange
    bad_here = np.zeros(len(bank.present))
    bad_here[nonfinite_slots(strategy)] = 1
    clients = np.flatnonzero(exchange.gather_rows(bad_here))
    if not len(clients):
        return
    rest = np.setdiff1d(strategy.cohort, clients)
    if strategy.on_nonfinite == "raise" or not len(rest):
        raise nonfinite_error(strategy, clients.tolist())
    rank_zero_warn(f"round {strategy.round}: clients {clients.tolist()} are not finite and restart from the others.")
    strategy.dropped = clients
    weights = np.zeros(strategy.num_clients)
    weights[rest] = 1 / len(rest)
    for rows in (bank.rows, bank.buffers):
        mean = exchange.mean(rows.matrix, weights)
        exchange.download(mean, rows.matrix, clients)
    for client in clients:
        bank.forget(int(client))


def settle_nonfinite_here(strategy: FederatedStrategy) -> list[int]:
    """Find clients of this rank alone whose row is not finite: refuse to go on, or return them, for others to ignore.

    Raises:
        RuntimeError: naming the clients and the round.
    """
    bank, slots = strategy.bank, nonfinite_slots(strategy)
    clients = [bank.present[slot] for slot in slots]
    if clients and strategy.on_nonfinite == "raise":
        raise nonfinite_error(strategy, clients)
    for slot, client in zip(slots, clients):
        # Numbers that are not finite would get into other rows even with a weight of zero.
        bank.rows.matrix[slot] = 0
        bank.buffers.matrix[slot] = 0
        bank.forget(client)
    return clients


def nonfinite_slots(strategy: FederatedStrategy) -> list[int]:
    """Which rows of this rank's part of the cohort are not finite."""
    bank, rows = strategy.bank, strategy.bank.rows.matrix
    slots = [bank.slot(client) for client in strategy.exchange.share_of(strategy.cohort).tolist()]
    if not slots:
        return []
    # A sum is not finite if an entry is not, and costs a tenth of torch.isfinite; a sum may also overflow, so the few
    # suspects are looked at entry by entry.
    sums = rows.sum(dim=1) if slots == list(range(len(rows))) else torch.stack([rows[slot].sum() for slot in slots])
    suspects = [slots[index] for index in (~torch.isfinite(sums)).nonzero().squeeze(1).tolist()]
    return [slot for slot in suspects if not bool(torch.isfinite(rows[slot]).all())]


def nonfinite_error(strategy: FederatedStrategy, clients: list[int]) -> RuntimeError:
    """What is raised for clients whose models are not finite."""
    return RuntimeError(
        f"the models of clients {clients} are not finite at the end of round {strategy.round}: lower the learning "
        "rate or clip gradients, or set on_nonfinite='drop' to go on without them (they restart from the mean of the "
        "rest of the cohort)."
    )
