"""How clients' rows meet: the one part of the engine that knows about ranks and wires.

Shapes: N = clients of the federation, K = those of them that have rows at present, C = those of K on this rank,
H = remote clients whose rows this rank needs, P = numbers in a row.

An algorithm sees rows, weights and an :class:`Exchange`; it never calls ``torch.distributed``. Bytes are counted per
*client* (what the algorithm sends, whichever ranks host sender and receiver), so the counts equal the algorithm's
formula and do not depend on the layout; ``wire_bytes`` counts what really left this rank.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fed.federation.layout import Layout
from lightning_fed.federation.rows import Rows
from lightning_fed.federation.virtual_clock import VirtualClock

# What is mixed at a time, a block of columns of all rows: little beside the rows, and in a CPU cache.
BLOCK_BYTES = 2**20
COLUMNS_PER_BLOCK = 64, 4096  # at least and at most
REMOTE_BLOCK_BYTES = 64 * 2**20
# The sparse kernel is faster below this density, and gives the same bits whichever rows a rank asks for; for few
# clients that is worth its price at any density.
SPARSE_DENSITY = 0.3
SPARSE_CLIENTS = 32
CACHED_MATRICES = 32


class SharedMessages:
    """Messages on their way.

    Args:
        senders: whose messages come, sorted client numbers.
        receive: waits, and returns the messages ``[M, B]`` in that order.
    """

    def __init__(self, senders: Sequence[int], receive: Callable[[], Tensor]) -> None:
        self.senders = senders
        self.receive = receive


@dataclass
class MixingPlan:
    """What one rank does for ``X <- W X``: whose rows it sends, receives and combines.

    Attributes:
        weights: float ``[C, H_before + C + H_after]``, dense or sparse. Columns are in the order of client numbers on
            every layout. The sparse kernel (on CPU: up to 32 clients, or few neighbours) adds up in that order, so
            there the result is the same to the bit on any number of ranks; a dense product chooses its own order.
        send: for each peer host, the local row numbers that it needs.
        own: float ``[C, 1]``, the weight of each client's own row.
        receive: for each peer host, in order, how many rows come from it (in client order).
        before: how many of the received rows come from lower hosts.
        columns: int64, whose rows the columns of ``weights`` are: clients of other hosts that are needed, and all of
            this host's.
        sent_rows: int64 ``[N]``, rows that each client sends to other clients (on any rank).
        reaches_everyone: whether each client needs the rows of all.
    """

    weights: Tensor
    own: Tensor
    send: dict[int, Tensor]
    receive: dict[int, int]
    before: int
    columns: list[int]
    sent_rows: np.ndarray
    reaches_everyone: bool

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
    own = torch.from_numpy(np.diag(weights_NN)[mine.start : mine.stop]).to(matrix).unsqueeze(1)
    sent_rows = support.sum(axis=0) - np.diag(support)
    return MixingPlan(local, own, send, receive, before, columns, sent_rows.astype(np.int64), bool(support.all()))


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
        deals_evenly: clients leave no state behind, so each cohort is dealt out evenly, whoever is at home where.
        holders: int64 ``[K]``, the clients that have rows, sorted; by default all.
        present: int64 ``[C]``, those of them on this rank: whose rows ``rows_CP`` are, in this order.
        sent_bytes: int64 ``[N]``, bytes that each client has sent, the same array on every rank.
        server_bytes: bytes that the (virtual) server has sent.
        wire_bytes: bytes that really left this rank for mixing.
        message_dtype: what :meth:`mix_` rounds rows to on their way to other clients, on any rank; None: not.
        clock: what the communication takes; None if no time is counted.
        riders: rows (float buffers) that travel in the messages of others, so that the clock sees one message.
    """

    def __init__(self, layout: Layout, host: int = 0) -> None:
        self.layout = layout
        self.host = host
        self.clients = layout.clients_of(host)
        self.deals_evenly = False
        self.hold(np.arange(layout.num_clients))
        self.sent_bytes = np.zeros(layout.num_clients, dtype=np.int64)
        self.server_bytes = 0
        self.wire_bytes = 0
        self.message_dtype: torch.dtype | None = None
        self.clock: VirtualClock | None = None
        self.riders: Rows | None = None
        self._plans: OrderedDict[tuple[Any, ...], tuple[np.ndarray, MixingPlan]] = OrderedDict()

    def hold(self, holders: np.ndarray) -> None:
        """From now on rows are those of these clients (sorted), here and on all other ranks."""
        self.holders, self.present = holders, self.share_of(holders)

    def share_of(self, clients: np.ndarray) -> np.ndarray:
        """Those of some clients (sorted) that this rank trains."""
        if self.deals_evenly:
            return np.array_split(clients, self.layout.num_hosts)[self.host]
        first, stop = np.searchsorted(clients, (self.clients.start, self.clients.stop))
        return clients[first:stop]

    @cached_property
    def everyone(self) -> np.ndarray:
        """A constant matrix ``[N, N]``: each client with each."""
        return np.ones((self.layout.num_clients, self.layout.num_clients), dtype=bool)

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

    def message_bytes(self, rows_CP: Tensor) -> int:
        """Bytes of one message with what rides along; 0 for the riders, which are in a message already."""
        riders = self.riders.matrix if self.riders is not None else rows_CP[:, :0]
        return (
            0 if rows_CP is riders else sum(rows.shape[1] * self._sent_as(rows).itemsize for rows in (rows_CP, riders))
        )

    def _sent_as(self, rows_CP: Tensor) -> torch.dtype:
        """What rows are on their way."""
        shorter = self.message_dtype is not None and self.message_dtype.itemsize < rows_CP.element_size()
        return self.message_dtype if shorter and self.message_dtype is not None else rows_CP.dtype

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
        self.sent_bytes += plan.sent_rows * rows_CP.shape[1] * self._sent_as(rows_CP).itemsize
        if self.clock is not None and (message_bytes := self.message_bytes(rows_CP)):
            self.clock.mixed(weights_NN != 0, message_bytes)

    @torch.no_grad()
    def mean(self, rows_CP: Tensor, weights_N: np.ndarray | None = None) -> Tensor:
        """The weighted mean of all clients' rows, ``[P]``, the same on every rank; by default of those that have rows.

        Not counted as communication of the algorithm: use it to evaluate. Clients of weight zero are left out
        altogether, whatever their rows hold.
        """
        return self._weighted_sum(rows_CP, self._mean_weights(weights_N), rows_CP.dtype)

    def _mean_weights(self, weights_N: np.ndarray | None) -> np.ndarray:
        if weights_N is not None:
            return weights_N
        weights_N = np.zeros(self.layout.num_clients)
        weights_N[self.holders] = 1 / max(len(self.holders), 1)
        return weights_N

    @torch.no_grad()
    def upload_mean(self, rows_CP: Tensor, weights_N: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """Every client of non-zero weight sends its row to a server; returns the weighted mean ``[P]`` in ``dtype``."""
        self.sent_bytes += (weights_N != 0) * rows_CP.shape[1] * rows_CP.element_size()
        if self.clock is not None and (message_bytes := self.message_bytes(rows_CP)):
            self.clock.uploaded(np.flatnonzero(weights_N), message_bytes)
        return self.average(rows_CP, weights_N, dtype)

    @torch.no_grad()
    def average(self, rows_CP: Tensor, weights_N: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """The weighted mean ``[P]`` that clients train on from; the caller counts what it costs, in ``sent_bytes``.

        It is summed in float64 (which clients share a rank must not show), and rounded to ``dtype``, by default rows'.
        """
        return self._weighted_sum(rows_CP, weights_N, torch.float64).to(dtype or rows_CP.dtype)

    def _weighted_sum(self, rows_CP: Tensor, weights_N: np.ndarray, dtype: torch.dtype) -> Tensor:
        local = weights_N[self.present]
        chosen = np.flatnonzero(local)
        if len(chosen) == len(local) and dtype == rows_CP.dtype:
            with full_precision_matmul(rows_CP.device):
                total = torch.mv(rows_CP.t(), torch.from_numpy(local).to(rows_CP))
        else:
            total = rows_CP.new_zeros(rows_CP.shape[1], dtype=dtype)
            for slot in chosen.tolist():
                total.add_(rows_CP[slot], alpha=local[slot])
        return self.sum(total)

    @torch.no_grad()
    def download(self, vector_P: Tensor, rows_CP: Tensor, receivers: np.ndarray) -> None:
        """The server sends ``vector`` to the clients ``receivers`` (sorted), whose rows it becomes."""
        self.server_bytes += len(receivers) * rows_CP.shape[1] * rows_CP.element_size()
        if self.clock is not None and (message_bytes := self.message_bytes(rows_CP)):
            self.clock.downloaded(receivers, message_bytes)
        receives = np.isin(self.present, receivers)
        if receives.all():
            rows_CP.copy_(vector_P)
            return
        for slot in np.flatnonzero(receives).tolist():
            rows_CP[slot] = vector_P

    @abstractmethod
    def share(self, messages_CB: Tensor, support_NN: np.ndarray) -> SharedMessages:
        """Begin to send every client's packed message to those that need it; returns at once.

        The caller counts what it costs, once for all parts of a message: :meth:`count_messages`.

        Args:
            messages_CB: uint8, one message a client of this rank, of one length B everywhere. Leave it unchanged until
                the messages have come.
            support_NN: client i needs the message of each j with ``support[i, j] != 0``, the same on every rank. Pass
                the *same array object* for equal matrices.
        """

    def count_messages(self, support_NN: np.ndarray, message_bytes: int) -> None:
        """Count a message of so many bytes from j to every other i with ``support[i, j] != 0``, and its time."""
        support = support_NN != 0
        self.sent_bytes += (support.sum(axis=0) - np.diag(support)) * message_bytes
        if self.clock is not None:
            riders = self.riders.row_bytes if self.riders is not None else 0
            self.clock.mixed(support, message_bytes + riders)

    def gather_rows(self, values_C: np.ndarray) -> np.ndarray:
        """All clients' numbers ``[N]`` from each rank's own ``[C]``; float64, for decisions and logs.

        0 for clients without rows.
        """
        values_N = torch.zeros(self.layout.num_clients, dtype=torch.float64)
        values_N[self.present] = torch.as_tensor(values_C, dtype=torch.float64)
        return self.sum(values_N).numpy()

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the hosts, the same bits on every rank. May reuse the memory of ``tensor``."""

    @abstractmethod
    def _mix(self, rows_CP: Tensor, plan: MixingPlan) -> None:
        """Apply a plan to the rows in place, receiving what it needs from other ranks."""

    def _mixed(self, block: Tensor, remote: Tensor, plan: MixingPlan) -> Tensor:
        """``W X`` of some columns ``[C, columns]``, given those of remote rows ``[H, columns]`` as they were sent."""
        sent = block.to(self._sent_as(block)).to(block.dtype)
        mixed = plan.weights @ torch.cat([remote[: plan.before], sent, remote[plan.before :]])
        return mixed if sent is block else mixed.addcmul_(plan.own, block - sent)  # the own row has not travelled

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


def columns_per_block(rows_CP: Tensor) -> int:
    """How many columns to mix at a time."""
    least, most = COLUMNS_PER_BLOCK
    return min(max(BLOCK_BYTES // max(rows_CP.element_size() * len(rows_CP), 1), least), most)


class LoopbackExchange(Exchange):
    """All clients on one rank: mixing is a matrix product."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def _mix(self, rows_CP: Tensor, plan: MixingPlan) -> None:
        for block in rows_CP.split(columns_per_block(rows_CP), dim=1):
            block.copy_(self._mixed(block, block[:0], plan))

    def share(self, messages_CB: Tensor, support_NN: np.ndarray) -> SharedMessages:
        return SharedMessages(self.clients, lambda: messages_CB)


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
        tensor = tensor.to(self._wire(tensor))
        dist.all_reduce(tensor, group=self.group)
        return tensor.to(device)

    def _mix(self, rows_CP: Tensor, plan: MixingPlan) -> None:
        row_bytes = rows_CP.element_size() * max(plan.remote, 1)
        width = min(rows_CP.shape[1], max(REMOTE_BLOCK_BYTES // row_bytes, 1))
        step = columns_per_block(rows_CP)
        for block in rows_CP.split(max(width, 1), dim=1):
            received = self._swap(block, plan, self._sent_as(block))()
            for columns, remote in zip(block.split(step, dim=1), received.split(step, dim=1)):
                columns.copy_(self._mixed(columns, remote.to(columns.dtype), plan))

    def share(self, messages_CB: Tensor, support_NN: np.ndarray) -> SharedMessages:
        plan = self._plan(support_NN, messages_CB)
        if plan.reaches_everyone:
            return SharedMessages(range(self.layout.num_clients), self._gather(messages_CB))
        receive = self._swap(messages_CB, plan, messages_CB.dtype)

        def in_order() -> Tensor:
            remote = receive()
            return torch.cat([remote[: plan.before], messages_CB, remote[plan.before :]])

        return SharedMessages(plan.columns, in_order)

    def _gather(self, messages_CB: Tensor) -> Callable[[], Tensor]:
        """Begin to give every host the messages of all; the result waits, and returns them ``[N, B]``."""
        sizes = [len(self.layout.clients_of(host)) for host in range(self.layout.num_hosts)]
        mine = nn.functional.pad(messages_CB, (0, 0, 0, max(sizes) - len(messages_CB))).to(self._wire(messages_CB))
        everyone = mine.new_empty((len(sizes) * len(mine), mine.shape[1]))
        work = dist.all_gather_into_tensor(everyone, mine, group=self.group, async_op=True)
        self.wire_bytes += messages_CB.numel() * (len(sizes) - 1)

        def receive() -> Tensor:
            assert work is not None
            work.wait()
            blocks = everyone.to(messages_CB.device).split(len(mine))
            return torch.cat([block[:size] for block, size in zip(blocks, sizes)])

        return receive

    def _swap(self, block: Tensor, plan: MixingPlan, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Begin to send what the peers need of a block; the result waits, and returns their rows ``[H, columns]``."""
        received = torch.empty((plan.remote, block.shape[1]), dtype=dtype, device=self._wire(block))
        operations = []
        for peer, part in zip(plan.receive, received.split(list(plan.receive.values()))):
            operations.append(dist.P2POp(dist.irecv, part, group=self.group, group_peer=peer))
        for peer, rows in plan.send.items():
            message = block[rows].to(received)
            self.wire_bytes += message.numel() * message.element_size()
            operations.append(dist.P2POp(dist.isend, message, group=self.group, group_peer=peer))
        works = dist.batch_isend_irecv(operations) if operations else []

        def receive() -> Tensor:
            for work in works:
                work.wait()
            operations.clear()  # which kept the sent messages alive
            return received.to(block.device)

        return receive

    def _wire(self, tensor: Tensor) -> torch.device:
        """Where the backend takes tensors from."""
        if self._stages_on_cpu:
            return torch.device("cpu")
        return tensor.device if tensor.is_cuda else torch.device("cuda", torch.cuda.current_device())
