"""How clients' rows meet: the one part of the engine that knows about ranks and wires.

Shapes: N = clients of the federation, C = clients on this rank, H = remote clients whose rows this rank needs,
P = numbers in a row.

An algorithm sees rows, weights and an :class:`Exchange`; it never calls ``torch.distributed``. Bytes are counted per
*client* (what the algorithm sends, whichever ranks host sender and receiver), so the counts equal the algorithm's
formula and do not depend on the layout; ``wire_bytes`` counts what really left this rank.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fed.federation.layout import Layout
from lightning_fed.federation.rows import Rows
from lightning_fed.federation.virtual_clock import VirtualClock

# Columns mixed at a time: small enough for the block of all rows to stay in a CPU cache, and to bound the memory that
# rows of other ranks need while they are here.
COLUMNS_PER_BLOCK = 4096
REMOTE_BLOCK_BYTES = 64 * 2**20
# The sparse kernel is faster below this density, and gives the same bits whichever rows a rank asks for; for few
# clients that is worth its price at any density.
SPARSE_DENSITY = 0.3
SPARSE_CLIENTS = 32
CACHED_MATRICES = 32


@dataclass
class MixingPlan:
    """What one rank does for ``X <- W X``: whose rows it sends, receives and combines.

    Attributes:
        weights: float ``[C, H_before + C + H_after]``, dense or sparse. Columns are in the order of client numbers on
            every layout. The sparse kernel (on CPU: up to 32 clients, or few neighbours) adds up in that order, so
            there the result is the same to the bit on any number of ranks; a dense product chooses its own order.
        send: for each peer host, the local row numbers that it needs.
        receive: for each peer host, in order, how many rows come from it (in client order).
        before: how many of the received rows come from lower hosts.
        sent_rows: int64 ``[N]``, rows that each client sends to other clients (on any rank).
    """

    weights: Tensor
    send: dict[int, Tensor]
    receive: dict[int, int]
    before: int
    sent_rows: np.ndarray

    @property
    def remote(self) -> int:
        return sum(self.receive.values())


def plan_mixing(weights_NN: np.ndarray, layout: Layout, host: int, matrix: Tensor) -> MixingPlan:
    """Work out one rank's part of a mixing matrix; see :class:`MixingPlan`."""
    support = weights_NN != 0
    mine = layout.clients_of(host)
    needed = support[mine.start : mine.stop].any(axis=0)
    columns: list[int] = []
    send, receive = {}, {}
    for peer in range(layout.num_hosts):
        theirs = layout.clients_of(peer)
        if peer == host:
            columns += mine
            continue
        wanted = [client for client in theirs if needed[client]]
        given = [client - mine.start for client in mine if support[theirs.start : theirs.stop, client].any()]
        if wanted:
            columns += wanted
            receive[peer] = len(wanted)
        if given:
            send[peer] = torch.tensor(given, device=matrix.device)
    before = sum(count for peer, count in receive.items() if peer < host)
    local = torch.from_numpy(weights_NN[mine.start : mine.stop][:, columns]).to(matrix)
    # Decided by all of W, not by this rank's part of it: one kernel on every layout.
    sparse = len(support) <= SPARSE_CLIENTS or support.mean() <= SPARSE_DENSITY
    if sparse and matrix.device.type == "cpu" and matrix.dtype in (torch.float32, torch.float64):  # no other kernels
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            local = local.to_sparse_csr()
    sent_rows = support.sum(axis=0) - np.diag(support)
    return MixingPlan(local, send, receive, before, sent_rows.astype(np.int64))


@contextmanager
def full_precision_matmul(device: torch.device) -> Iterator[None]:
    """Keep TF32 out of averaging, whatever the user chose for training: ten bits of mantissa would not conserve W."""
    if device.type != "cuda":
        yield
        return
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


class Exchange(ABC):
    """The contract between an algorithm and the wire.

    Every method that communicates is called by all ranks of the federation, in the same order.

    Args:
        layout: which host has which clients.
        host: the host of this rank.

    Attributes:
        sent_bytes: int64 ``[N]``, bytes that each client has sent, the same array on every rank.
        server_bytes: bytes that the (virtual) server has sent.
        wire_bytes: bytes that really left this rank for mixing.
        clock: what the communication takes; None if no time is counted.
        riders: rows that travel in the messages of other rows (float buffers beside parameters), so that the clock
            sees one message.
    """

    def __init__(self, layout: Layout, host: int = 0) -> None:
        self.layout = layout
        self.host = host
        self.clients = layout.clients_of(host)
        self.sent_bytes = np.zeros(layout.num_clients, dtype=np.int64)
        self.server_bytes = 0
        self.wire_bytes = 0
        self.clock: VirtualClock | None = None
        self.riders: Rows | None = None
        self._plans: OrderedDict[tuple[Any, ...], tuple[np.ndarray, MixingPlan]] = OrderedDict()

    def reset_counts(self) -> None:
        """Begin to count bytes anew."""
        self.sent_bytes[:] = 0
        self.server_bytes = self.wire_bytes = 0

    def takes_part(self, round: int) -> bool:
        """Whether this rank's clients should train in a round; not if the others have finished it already."""
        return True

    def keep_time(self, clock: VirtualClock | None, seed: int) -> None:
        """Count simulated time from now on, or none."""
        if clock is not None:
            clock.bind(self.layout.num_clients, seed)
        self.clock = clock

    def _message_bytes(self, rows_CP: Tensor) -> int:
        """Bytes of one message with what rides along; 0 for the riders, which are in a message already."""
        riders = self.riders.matrix if self.riders is not None else rows_CP[:, :0]
        return 0 if rows_CP is riders else sum(rows.shape[1] * rows.element_size() for rows in (rows_CP, riders))

    @property
    def total_bytes(self) -> int:
        """Bytes sent by all clients and the server so far."""
        return int(self.sent_bytes.sum()) + self.server_bytes

    @torch.no_grad()
    def mix_(self, rows_CP: Tensor, weights_NN: np.ndarray) -> None:
        """One gossip step in place: ``X <- W X``.

        Client *j* sends its row to every other *i* with ``weights[i, j] != 0``.

        Args:
            rows_CP: the rows of this rank's clients.
            weights_NN: the mixing matrix, the same on every rank. Pass the *same array object* for equal matrices:
                the plan for it is cached.
        """
        plan = self._plan(weights_NN, rows_CP)
        with full_precision_matmul(rows_CP.device):
            self._mix(rows_CP, plan)
        self.sent_bytes += plan.sent_rows * rows_CP.shape[1] * rows_CP.element_size()
        if self.clock is not None and (message_bytes := self._message_bytes(rows_CP)):
            self.clock.mixed(weights_NN != 0, message_bytes)

    @torch.no_grad()
    def mean(self, rows_CP: Tensor, weights_N: np.ndarray | None = None) -> Tensor:
        """The weighted mean of all clients' rows, ``[P]``, the same on every rank.

        Not counted as communication of the algorithm: use it to evaluate. Clients of weight zero are left out
        altogether, whatever their rows hold.
        """
        if weights_N is None:
            weights_N = np.full(self.layout.num_clients, 1 / self.layout.num_clients)
        return self._weighted_sum(rows_CP, weights_N, rows_CP.dtype)

    @torch.no_grad()
    def upload_mean(self, rows_CP: Tensor, weights_N: np.ndarray) -> Tensor:
        """What a server computes: every client of non-zero weight sends its row; returns the weighted mean ``[P]``."""
        self.sent_bytes += (weights_N != 0) * rows_CP.shape[1] * rows_CP.element_size()
        if self.clock is not None and (message_bytes := self._message_bytes(rows_CP)):
            self.clock.uploaded(np.flatnonzero(weights_N), message_bytes)
        return self.average(rows_CP, weights_N)

    @torch.no_grad()
    def average(self, rows_CP: Tensor, weights_N: np.ndarray) -> Tensor:
        """The weighted mean ``[P]`` that clients train on from; the caller counts what it costs, in ``sent_bytes``.

        It is summed in float64: which clients share a rank must not show.
        """
        return self._weighted_sum(rows_CP, weights_N, torch.float64).to(rows_CP.dtype)

    def _weighted_sum(self, rows_CP: Tensor, weights_N: np.ndarray, dtype: torch.dtype) -> Tensor:
        local = weights_N[self.clients.start : self.clients.stop]
        chosen = np.flatnonzero(local)
        if len(chosen) == len(local) and dtype == rows_CP.dtype:
            with full_precision_matmul(rows_CP.device):
                total = torch.mv(rows_CP.t(), torch.from_numpy(local).to(rows_CP))
        else:
            total = torch.zeros_like(rows_CP[0], dtype=dtype)
            for slot in chosen.tolist():
                total.add_(rows_CP[slot], alpha=local[slot])
        return self.sum(total)

    @torch.no_grad()
    def download(self, vector_P: Tensor, rows_CP: Tensor, receivers: np.ndarray) -> None:
        """The server sends ``vector`` to the clients ``receivers`` (sorted), whose rows it becomes."""
        self.server_bytes += len(receivers) * rows_CP.shape[1] * rows_CP.element_size()
        if self.clock is not None and (message_bytes := self._message_bytes(rows_CP)):
            self.clock.downloaded(receivers, message_bytes)
        for client in receivers:
            if client in self.clients:
                rows_CP[client - self.clients.start] = vector_P

    def gather_rows(self, values_C: np.ndarray) -> np.ndarray:
        """All clients' numbers ``[N]`` from each rank's own ``[C]``; float64, for decisions and logs."""
        values_N = torch.zeros(self.layout.num_clients, dtype=torch.float64)
        values_N[self.clients.start : self.clients.stop] = torch.as_tensor(values_C, dtype=torch.float64)
        return self.sum(values_N).numpy()

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the hosts, the same bits on every rank. May reuse the memory of ``tensor``."""

    @abstractmethod
    def _mix(self, rows_CP: Tensor, plan: MixingPlan) -> None:
        """Apply a plan to the rows in place, receiving what it needs from other ranks."""

    def _plan(self, weights_NN: np.ndarray, rows_CP: Tensor) -> MixingPlan:
        key = (id(weights_NN), rows_CP.dtype, rows_CP.device)
        if key not in self._plans:
            if weights_NN.shape != (self.layout.num_clients,) * 2:
                raise ValueError(f"a mixing matrix of shape {weights_NN.shape} for {self.layout.num_clients} clients.")
            # The array is kept beside its plan, so that its id cannot be given to another array meanwhile.
            self._plans[key] = weights_NN, plan_mixing(weights_NN, self.layout, self.host, rows_CP)
            if len(self._plans) > CACHED_MATRICES:
                self._plans.popitem(last=False)
        return self._plans[key][1]


class LoopbackExchange(Exchange):
    """All clients on one rank: mixing is a matrix product."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def _mix(self, rows_CP: Tensor, plan: MixingPlan) -> None:
        for block in rows_CP.split(COLUMNS_PER_BLOCK, dim=1):
            block.copy_(plan.weights @ block.contiguous())


class CollectiveExchange(Exchange):
    """Clients over the ranks of a process group (NCCL or gloo); all ranks must live.

    Rows travel point to point, once for each rank that needs them, only along edges that cross ranks.

    Args:
        layout: which host has which clients.
        host: the host of this rank.
        group: the process group of one rank per host, in host order.
    """

    def __init__(self, layout: Layout, host: int, group: dist.ProcessGroup) -> None:
        super().__init__(layout, host)
        self.group = group
        self._stages_on_cpu = dist.get_backend(group) == "gloo"

    def sum(self, tensor: Tensor) -> Tensor:
        device = tensor.device
        if self._stages_on_cpu:
            tensor = tensor.cpu()
        elif device.type == "cpu":
            tensor = tensor.cuda()
        dist.all_reduce(tensor, group=self.group)
        return tensor.to(device)

    def _mix(self, rows_CP: Tensor, plan: MixingPlan) -> None:
        row_bytes = rows_CP.element_size() * max(plan.remote, 1)
        width = min(rows_CP.shape[1], max(REMOTE_BLOCK_BYTES // row_bytes, 1))
        for block in rows_CP.split(max(width, 1), dim=1):
            received = self._swap(block, plan)
            for columns, remote in zip(block.split(COLUMNS_PER_BLOCK, dim=1), received.split(COLUMNS_PER_BLOCK, dim=1)):
                columns.copy_(plan.weights @ torch.cat([remote[: plan.before], columns, remote[plan.before :]]))

    def _swap(self, block: Tensor, plan: MixingPlan) -> Tensor:
        """Send what the peers need of one block of columns, and return the peers' rows ``[H, columns]``."""
        wire = torch.device("cpu") if self._stages_on_cpu else block.device
        received = torch.empty((plan.remote, block.shape[1]), dtype=block.dtype, device=wire)
        operations = []
        for peer, part in zip(plan.receive, received.split(list(plan.receive.values()))):
            operations.append(dist.P2POp(dist.irecv, part, group=self.group, group_peer=peer))
        for peer, rows in plan.send.items():
            message = block[rows].to(wire)
            self.wire_bytes += message.numel() * message.element_size()
            operations.append(dist.P2POp(dist.isend, message, group=self.group, group_peer=peer))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return received.to(block.device)
