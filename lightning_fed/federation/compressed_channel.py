"""Rows that travel compressed: packed part by part, each part on its way while the next one is packed.

Shapes: N = clients, C = clients on this rank, M = clients whose messages come here, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lightning_fed.compression import Compressor, DenseVector, Layer, SparseVector
from lightning_fed.federation.exchange import Exchange, SharedMessages
from lightning_fed.federation.randomness import Stream, derive_seed

# Layers are packed and sent in groups of about so many numbers: enough to fill a link, few enough to overlap.
NUMBERS_PER_PART = 2**20
# Vectors are packed in blocks of about so many bytes: little beside the rows, and such as a CPU's cache holds.
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 2**20, 2**26
# So much of what messages say is kept until they come back, if it is dense: to unpack it again takes time.
KEPT_BYTES = 2**25

# The vectors of some clients in some columns, in the memory that comes second or their own; they are used up.
Vectors = Callable[[tuple[slice, slice], Tensor], Tensor]
Weighted = tuple[Tensor, float]  # rows [C, P] of this rank's clients, and the weight with which something is added


@dataclass
class Part:
    """A stretch of the row that is packed and sent by itself.

    Attributes:
        columns: of the row.
        compressor: bound to the layers of the stretch.
    """

    columns: slice
    compressor: Compressor


class CompressedChannel:
    """Sends one kind of vector, for example gradients, from each client.

    Args:
        compressor: of the messages.
        layers: of a row.
        rows_CP: tells C, dtype and device of what is going to be sent.
        seed: of the federation.
        number: tells channels of one algorithm apart, whose random numbers must differ.

    Raises:
        ValueError: if the compressor does not suit the layers.
    """

    def __init__(
        self, compressor: Compressor, layers: Sequence[Layer], rows_CP: Tensor, seed: int, number: int = 0
    ) -> None:
        self._key = seed, number
        self._dtype, self._device = rows_CP.dtype, rows_CP.device
        # 2-norms of the last vectors, and of what their messages left out: [2, parts, C].
        self._norms: Tensor | None = None
        self._scratch = rows_CP.new_empty(0)
        self._kept: dict[tuple[int, int], DenseVector] = {}
        self._dense_bytes = rows_CP.shape[1] * rows_CP.element_size()
        groups = grouped(layers) if compressor.scope == "layer" else [list(layers)]
        ends = list(accumulate(sum(layer.size for layer in group) for group in groups))
        columns = [slice(start, end) for start, end in zip([0, *ends], ends)]
        self.parts = [Part(place, compressor.bind(group, rows_CP[:, place])) for place, group in zip(columns, groups)]

    @property
    def message_bytes(self) -> int:
        """Bytes of one client's message, all parts."""
        return sum(part.compressor.message_bytes for part in self.parts)

    @property
    def delta(self) -> float:
        """Contraction of the whole message: that of the worst part."""
        return min(part.compressor.delta for part in self.parts)

    @property
    def delta_is_typical(self) -> bool:
        """Whether that says something about vectors as they occur."""
        return all(part.compressor.delta_is_typical for part in self.parts)

    def send(
        self, vectors: Vectors, support_NN: np.ndarray, exchange: Exchange, step: int, own: Sequence[Weighted] = ()
    ) -> SentMessages:
        """Begin to send every client's compressed vector; a collective call.

        Vectors are made, packed and forgotten a few clients at a time: what this takes does not grow with C.

        Args:
            vectors: of this rank's clients.
            support_NN: client i needs the message of each j with ``support[i, j] != 0``; pass the same array object for
                equal matrices.
            exchange: of this rank.
            step: never twice the same.
            own: what each client adds of its own message to its own row at once.
        """
        exchange.count_messages(support_NN, self.message_bytes)
        warm_starts = [None if part.compressor.state is None else part.compressor.state.clone() for part in self.parts]
        shape = (2, len(self.parts), len(exchange.clients))
        self._norms = norms = torch.zeros(shape, dtype=self._dtype, device=self._device)
        sent: list[SharedMessages] = []
        for index in range(len(self.parts)):
            messages = self._pack(index, vectors, exchange.clients, step, own, norms[:, index])
            sent.append(exchange.share(messages, support_NN))
        kept, self._kept = self._kept, {}
        return SentMessages(self, exchange.clients, step, sent, warm_starts, kept)

    def _pack(
        self, index: int, vectors: Vectors, clients: range, step: int, own: Sequence[Weighted], norms: Tensor
    ) -> Tensor:
        """One part of all messages ``[C, B]``; ``norms [2, C]`` become those of the vectors and of what is left out."""
        columns, compressor = self.parts[index].columns, self.parts[index].compressor
        messages = torch.empty((len(clients), compressor.message_bytes), dtype=torch.uint8, device=self._device)
        for rows in blocks(len(clients), compressor.width * self._dtype.itemsize, self._device):
            block = vectors((rows, columns), self._space(rows.stop - rows.start, compressor.width))
            seeds = [self._seed(client, step, index) for client in clients[rows]]
            messages[rows] = compressor.of_rows(rows).pack(block, seeds)
            norms[0, rows] = torch.linalg.vector_norm(block, dim=1)
            for slot, left_out, seed in zip(range(rows.start, rows.stop), block, seeds):
                sent = compressor.unpack(messages[slot], seed)
                for matrix, weight in own:
                    sent.add_to_(matrix[slot, columns], weight)
                sent.add_to_(left_out, -1.0)
                if isinstance(sent, DenseVector) and (len(self._kept) + 1) * sent.values.nbytes <= KEPT_BYTES:
                    self._kept[index, clients[slot]] = sent
            norms[1, rows] = torch.linalg.vector_norm(block, dim=1)
        return messages

    def _space(self, num_rows: int, width: int) -> Tensor:
        """Memory for as many vectors; kept, because fresh memory costs a CPU more than what is written into it."""
        if self._scratch.numel() < num_rows * width:
            self._scratch = torch.empty(num_rows * width, dtype=self._dtype, device=self._device)
        return self._scratch[: num_rows * width].view(num_rows, width)

    def measure(self, exchange: Exchange) -> dict[str, float]:
        """What a message costs, and the part ``||v - C(v)|| / ||v||`` that the last ones left out; collective."""
        numbers = {"message_bytes": float(self.message_bytes), "dense_bytes": float(self._dense_bytes)}
        if self._norms is not None:
            vectors, left_out = torch.linalg.vector_norm(self._norms.double(), dim=1).cpu().numpy()
            relative = left_out / np.maximum(vectors, np.finfo(np.float64).tiny)
            numbers["compression_error"] = float(exchange.gather_rows(relative).mean())
        return numbers

    def unpack(self, index: int, message: Tensor, client: int, step: int) -> SparseVector | DenseVector:
        """One part of a client's message."""
        return self.parts[index].compressor.unpack(message, self._seed(client, step, index))

    def _seed(self, client: int, step: int, index: int) -> int:
        return derive_seed(Stream.COMPRESSION, *self._key, step, client, index)

    def client_matrices(self, name: str) -> dict[str, Tensor]:
        """What the compressors keep for each client, for a checkpoint; ``name`` is the channel's."""
        states = {f"{name} {index}": part.compressor.state for index, part in enumerate(self.parts)}
        return {key: state for key, state in states.items() if state is not None}


class SentMessages:
    """Messages of one communication, on their way.

    Args:
        channel: that sent them.
        clients: of this rank.
        step: of the channel.
        parts: the messages of each part.
        warm_starts: what each part's compressor kept before.
        kept: what some of the own messages say, by part and client.
    """

    def __init__(
        self,
        channel: CompressedChannel,
        clients: range,
        step: int,
        parts: list[SharedMessages],
        warm_starts: list[Tensor | None],
        kept: dict[tuple[int, int], DenseVector],
    ) -> None:
        self._warm_starts = warm_starts
        self._kept = kept
        self._channel = channel
        self._clients = clients
        self._step = step
        self._parts = parts

    def add_received_(self, rows_CP: Tensor, weights_CN: np.ndarray, own: Sequence[Weighted] = ()) -> None:
        """``row_i += sum_j w_ij C(v_j)``, in the order of j on every rank; waits for the messages.

        Args:
            rows_CP: of this rank's clients, or one row that is the same for all.
            weights_CN: a row for each of them.
            own: what each client of this rank adds of its own message to its own row.
        """
        for index, (part, shared) in enumerate(zip(self._channel.parts, self._parts)):
            for client, message in zip(shared.senders, shared.receive()):
                vector = self._kept.pop((index, client), None) or self._channel.unpack(
                    index, message, client, self._step
                )
                for slot in np.flatnonzero(weights_CN[:, client]).tolist():
                    vector.add_to_(rows_CP[slot, part.columns], float(weights_CN[slot, client]))
                if client in self._clients:
                    for matrix, weight in own:
                        vector.add_to_(matrix[client - self._clients.start, part.columns], weight)

    def discard(self) -> None:
        """Let the messages come, for nothing, as if they had never been sent."""
        for shared in self._parts:
            shared.receive()
        for part, before in zip(self._channel.parts, self._warm_starts):
            if part.compressor.state is not None and before is not None:
                part.compressor.state.copy_(before)


def blocks(num_rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Few rows at a time: what is computed of them takes little memory beside all rows."""
    most = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    height = max(most // max(row_bytes, 1), 1)
    return (slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height))


def row_norms(rows_CP: Tensor) -> np.ndarray:
    """2-norms ``[C]``."""
    norms: np.ndarray = torch.linalg.vector_norm(rows_CP, dim=1).double().cpu().numpy()
    return norms


def grouped(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Consecutive layers in groups of at least ``NUMBERS_PER_PART`` numbers, but for the last."""
    groups: list[list[Layer]] = [[]]
    for layer in layers:
        if sum(member.size for member in groups[-1]) >= NUMBERS_PER_PART:
            groups.append([])
        groups[-1].append(layer)
    return groups
