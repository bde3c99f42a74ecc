"""Rows that meet under a robust rule instead of an average: at a server, or at every client of a gossip federation.

A block of columns of all rows travels at a time, so memory does not grow with the rows. Rules that look at distances
need two passes: one for the distances, one for the combination. Everything is added up in an order that does not depend
on who hosts whom, so results have the same bits on any number of ranks.

Shapes: N = clients, C = clients on this rank, K = rows that are combined, M = rows that have come, P = numbers in a
row, B = columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_fed.federation.exchange import Exchange
from lightning_fed.robust import CoordinateRule, DistanceRule, RobustMix, squared_distances

# What travels at a time of all clients' rows, and what is computed at a time, which stays in a CPU's cache.
TRAVEL_BYTES = 16 * 2**20
COLUMNS = 4096
PAIRS = 64
SERVER = -1


@dataclass(frozen=True)
class Gathering:
    """Rows that are combined.

    Attributes:
        members: whose rows, sorted client numbers ``[K]``.
        shares: how much each counts, float64 ``[K]``, of sum 1.
        receivers: for whom: clients of this rank that have all these rows, or the server.
    """

    members: np.ndarray
    shares: np.ndarray
    receivers: list[int]


@dataclass(frozen=True)
class Block:
    """Some columns of rows that have come.

    Attributes:
        columns: which.
        senders: whose rows, sorted.
        rows: ``[M, B]``, in that order.
    """

    columns: slice
    senders: np.ndarray
    rows: Tensor

    def places(self, clients: np.ndarray) -> Tensor:
        """Which of the rows are theirs, int64."""
        return torch.from_numpy(np.searchsorted(self.senders, clients)).to(self.rows.device)


Blocks = Callable[[], Iterator[Block]]
Combine = Callable[[Tensor, Tensor], Tensor]  # rows [M, B], and which of them [K] -> [B]


@torch.no_grad()
def robust_average(rule: RobustMix, rows_CP: Tensor, weights_N: np.ndarray, exchange: Exchange) -> Tensor:
    """What a server makes of the rows of all clients of non-zero weight, ``[P]``; a collective call.

    It counts as :meth:`Exchange.upload_mean` does.

    Raises:
        ValueError: if there are too few of them.
    """
    members = np.flatnonzero(weights_N)
    exchange.sent_bytes[members] += rows_CP.shape[1] * rows_CP.element_size()
    if exchange.clock is not None and (message_bytes := exchange.message_bytes(rows_CP)):
        exchange.clock.uploaded(members, message_bytes)
    return combined_row(rule, rows_CP, weights_N, exchange)


@torch.no_grad()
def combined_row(rule: RobustMix, rows_CP: Tensor, weights_N: np.ndarray, exchange: Exchange) -> Tensor:
    """The same, ``[P]``, without counting anything.

    Raises:
        ValueError: if there are too few rows.
    """
    members = np.flatnonzero(weights_N)
    rule.check(len(members), "let more clients take part in a round, or expect fewer hostile ones")
    gathering = Gathering(members, weights_N[members] / weights_N[members].sum(), [SERVER])
    result = rows_CP.new_empty(rows_CP.shape[1])
    for columns, vectors in combined(rule, [gathering], partial(uploaded, rows_CP, members, exchange)):
        result[columns] = vectors[SERVER]
    return result


@torch.no_grad()
def ordered_mean(rows_CP: Tensor, members: np.ndarray, exchange: Exchange) -> Tensor:
    """The mean of some clients' rows ``[P]``, added up in their order; costs no bytes; a collective call."""
    result, equal = rows_CP.new_empty(rows_CP.shape[1]), np.full(len(members), 1 / len(members))
    for block in uploaded(rows_CP, members, exchange):
        result[block.columns] = linear_combination(equal, block.rows.double(), block.places(members))
    return result


@torch.no_grad()
def robust_mix_(rule: RobustMix, rows_CP: Tensor, weights_NN: np.ndarray, exchange: Exchange) -> None:
    """One gossip step in place: each client combines its own row and its neighbours'; a collective call.

    It counts as :meth:`Exchange.mix_` does. Of the weights only matters which of them are 0. A client that hears of
    nobody keeps its row.

    Raises:
        ValueError: if a client hears of others, but of too few.
    """
    support = support_of(weights_NN)
    if (heard := support.sum(axis=1)).max() > 1:
        rule.check(int(heard[heard > 1].min()), "use a topology of larger degree, or expect fewer hostile neighbours")
    exchange.sent_bytes += (support.sum(axis=0) - 1) * rows_CP.shape[1] * rows_CP.element_size()
    if exchange.clock is not None and (message_bytes := exchange.message_bytes(rows_CP)):
        exchange.clock.mixed(weights_NN != 0, message_bytes)
    gatherings = neighbourhoods(support, exchange.clients)
    for columns, vectors in combined(rule, gatherings, partial(heard_of, rows_CP, weights_NN, exchange)):
        for client, vector in vectors.items():
            rows_CP[client - exchange.clients.start, columns] = vector


def support_of(weights_NN: np.ndarray) -> np.ndarray:
    """Whose rows each client combines, bool ``[N, N]``: those of its neighbours, and its own."""
    support: np.ndarray = (weights_NN != 0) | np.eye(len(weights_NN), dtype=bool)
    return support


def fewest_combined(weights_NN: np.ndarray) -> int:
    """Rows that the client with the fewest combines."""
    return int(support_of(weights_NN).sum(axis=1).min())


def neighbourhoods(support_NN: np.ndarray, clients: range) -> list[Gathering]:
    """What some clients combine, once for all that combine the same rows; without those that hear of nobody."""
    found: dict[bytes, Gathering] = {}
    for client in clients:
        members = np.flatnonzero(support_NN[client])
        equal = np.full(len(members), 1 / len(members))
        if len(members) > 1:
            found.setdefault(members.tobytes(), Gathering(members, equal, [])).receivers.append(client)
    return list(found.values())


# -------------------------------------------------------------------------------------------------------- combination


def combined(rule: RobustMix, gatherings: list[Gathering], blocks: Blocks) -> Iterator[tuple[slice, dict[int, Tensor]]]:
    """Block by block, what each receiver gets ``[B]``."""
    tasks: list[tuple[Gathering, Combine]]
    if isinstance(rule, CoordinateRule):
        tasks = [(gathering, partial(of_coordinates, rule)) for gathering in gatherings]
    else:
        assert isinstance(rule, DistanceRule)
        tasks = [
            (part, partial(linear_combination, weights))
            for gathering, squared_KK in zip(gatherings, distances(gatherings, blocks))
            for part, weights in chosen_weights(rule, gathering, squared_KK)
        ]
    for block in blocks():
        places = [block.places(gathering.members) for gathering, _ in tasks]
        vectors = {client: block.rows[0].clone() for gathering, _ in tasks for client in gathering.receivers}
        for start in range(0, block.rows.shape[1], COLUMNS):
            piece = slice(start, start + COLUMNS)
            rows = block.rows[:, piece] if isinstance(rule, CoordinateRule) else block.rows[:, piece].double()
            for (gathering, combine), theirs in zip(tasks, places):
                vector = combine(rows, theirs)
                for client in gathering.receivers:
                    vectors[client][piece] = vector
        yield block.columns, vectors


def of_coordinates(rule: CoordinateRule, rows_MB: Tensor, places_K: Tensor) -> Tensor:
    """The rule on some of the rows, float64 ``[B]``."""
    return rule.combine(rows_MB[places_K])


def linear_combination(weights_K: np.ndarray, rows_MB: Tensor, places_K: Tensor) -> Tensor:
    """``sum_k w_k x_k``, float64 ``[B]``, one after the other: a matrix product would choose an order of its own."""
    total = rows_MB.new_zeros(rows_MB.shape[1])
    for weight, place in zip(weights_K.tolist(), places_K.tolist()):
        if weight:
            total += weight * rows_MB[place]
    return total


def chosen_weights(
    rule: DistanceRule, gathering: Gathering, squared_KK: np.ndarray
) -> Iterator[tuple[Gathering, np.ndarray]]:
    """For each receiver, or for all together if the rule does not ask whose result it is, the weights ``[K]``."""
    if not rule.is_centered:
        yield gathering, rule.weights(squared_KK, gathering.shares, own=-1)
        return
    for client in gathering.receivers:
        own = int(np.searchsorted(gathering.members, client))
        part = Gathering(gathering.members, gathering.shares, [client])
        yield part, rule.weights(squared_KK, gathering.shares, own)


def distances(gatherings: list[Gathering], blocks: Blocks) -> list[np.ndarray]:
    """``||x_i - x_j||^2`` within each gathering, float64 ``[K, K]``; every pair is computed once."""
    if not gatherings:
        for _ in blocks():  # the other ranks need this one's rows
            pass
        return []
    base = 1 + max(int(gathering.members[-1]) for gathering in gatherings)
    codes = [np.add.outer(gathering.members * base, gathering.members) for gathering in gatherings]
    pairs = np.unique(np.concatenate([code[np.triu_indices(len(code), 1)] for code in codes]))
    totals = np.zeros(len(pairs))
    for block in blocks():
        left, right = block.places(pairs // base), block.places(pairs % base)
        sums = torch.zeros(len(pairs), dtype=torch.float64, device=block.rows.device)
        for piece in block.rows.split(COLUMNS, dim=1):
            rows = piece.double()
            for start in range(0, len(pairs), PAIRS):
                some = slice(start, start + PAIRS)
                sums[some] += squared_distances(rows, left[some], right[some])
        totals += sums.cpu().numpy()
    return [np.triu(within, 1) + np.triu(within, 1).T for within in (looked_up(code, pairs, totals) for code in codes)]


def looked_up(codes_KK: np.ndarray, pairs: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """The values of pairs; of pairs that are not there, anything."""
    found: np.ndarray = totals[np.minimum(np.searchsorted(pairs, codes_KK), len(pairs) - 1)]
    return found


# ---------------------------------------------------------------------------------------------------------- transport


def travelling_columns(rows_CP: Tensor, senders: int) -> Iterator[slice]:
    """The columns of a row, a block at a time."""
    pieces = max(TRAVEL_BYTES // (rows_CP.element_size() * senders * COLUMNS), 1)
    for start in range(0, rows_CP.shape[1], pieces * COLUMNS):
        yield slice(start, min(start + pieces * COLUMNS, rows_CP.shape[1]))


def uploaded(rows_CP: Tensor, members: np.ndarray, exchange: Exchange) -> Iterator[Block]:
    """The rows of some clients, on every rank: as bytes, whose sum with the other ranks' zeros changes no bit."""
    here = np.flatnonzero(np.isin(exchange.present, members))
    places = np.searchsorted(members, exchange.present[here])
    for columns in travelling_columns(rows_CP, len(members)):
        mine = rows_CP[:, columns][torch.from_numpy(here).to(rows_CP.device)].view(torch.uint8)
        message = mine.new_zeros((len(members), mine.shape[1]))
        message[torch.from_numpy(places).to(message.device)] = mine
        yield Block(columns, members, exchange.sum(message).view(rows_CP.dtype))


def heard_of(rows_CP: Tensor, weights_NN: np.ndarray, exchange: Exchange) -> Iterator[Block]:
    """The rows of those whom this rank's clients hear, and their own."""
    for columns in travelling_columns(rows_CP, len(weights_NN)):
        shared = exchange.share(rows_CP[:, columns].contiguous().view(torch.uint8), weights_NN)
        yield Block(columns, np.asarray(shared.senders), shared.receive().view(rows_CP.dtype))
