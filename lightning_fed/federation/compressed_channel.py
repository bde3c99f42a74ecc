"""Rows that travel compressed: packed part by part, each part on its way while the next one is packed.

Shapes: N = clients, C = clients on this rank, M = clients whose messages come here, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        self._sent: SentMessages | None = None
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

    def send(self, vectors_CP: Tensor, support_NN: np.ndarray, exchange: Exchange, step: int) -> SentMessages:
        """Begin to send every client's compressed vector; a collective call.

        Args:
            vectors_CP: of this rank's clients; afterwards what the messages leave out, ``v - C(v)``.
            support_NN: client i needs the message of each j with ``support[i, j] != 0``; pass the same array object for
                equal matrices.
            exchange: of this rank.
            step: never twice the same.
        """
        exchange.count_messages(support_NN, self.message_bytes)
        warm_starts = [None if part.compressor.state is None else part.compressor.state.clone() for part in self.parts]
        sent = []
        for index, part in enumerate(self.parts):
            seeds = [self._seed(client, step, index) for client in exchange.clients]
            messages = part.compressor.pack(vectors_CP[:, part.columns], seeds)
            sent.append((messages, exchange.share(messages, support_NN)))
        self._sent = SentMessages(self, exchange.clients, step, sent, vectors_CP, warm_starts)
        self._sent.add_own_(vectors_CP, -1.0)
        return self._sent

    def measure(self, exchange: Exchange) -> dict[str, float]:
        """What a message costs, and the part ``||v - C(v)|| / ||v||`` that the last ones left out; collective."""
        numbers = {"message_bytes": float(self.message_bytes), "dense_bytes": float(self._dense_bytes)}
        if self._sent is not None:
            left_out = row_norms(self._sent.residuals)
            vectors = self._sent.residuals.clone()
            self._sent.add_own_(vectors)
            relative = left_out / np.maximum(row_norms(vectors), np.finfo(np.float64).tiny)
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
    """Messages of one communication: the own ones are known at once, those of others when they have come.

    Args:
        channel: that sent them.
        clients: of this rank.
        step: of the channel.
        parts: of each part, the own messages ``[C, B]``, and what is on its way.
        residuals_CP: what the own messages leave out, ``v - C(v)``.
        warm_starts: what each part's compressor kept before.
    """

    def __init__(
        self,
        channel: CompressedChannel,
        clients: range,
        step: int,
        parts: list[tuple[Tensor, SharedMessages]],
        residuals_CP: Tensor,
        warm_starts: list[Tensor | None],
    ) -> None:
        self.residuals = residuals_CP
        self._warm_starts = warm_starts
        self._channel = channel
        self._clients = clients
        self._step = step
        self._parts = parts
        self._own: list[list[SparseVector | DenseVector]] | None = None

    def add_own_(self, rows_CP: Tensor, weight: float = 1.0) -> None:
        """``row_i += weight * C(v_i)`` for this rank's clients; does not wait."""
        for part, vectors in zip(self._channel.parts, self._own_vectors()):
            for row, vector in zip(rows_CP, vectors):
                vector.add_to_(row[part.columns], weight)

    def add_received_(self, rows_CP: Tensor, weights_CN: np.ndarray) -> None:
        """``row_i += sum_j w_ij C(v_j)``, in the order of j on every rank; waits for the messages."""
        for columns, client, vector in self._received():
            for slot in np.flatnonzero(weights_CN[:, client]).tolist():
                vector.add_to_(rows_CP[slot, columns], float(weights_CN[slot, client]))
        self._own = None  # as large as the rows, if the compressor is dense

    def _received(self) -> Iterator[tuple[slice, int, SparseVector | DenseVector]]:
        for index, (part, own, (_, shared)) in enumerate(zip(self._channel.parts, self._own_vectors(), self._parts)):
            for client, message in zip(shared.senders, shared.receive()):
                if client in self._clients:
                    yield part.columns, client, own[client - self._clients.start]
                else:
                    yield part.columns, client, self._channel.unpack(index, message, client, self._step)

    def _own_vectors(self) -> list[list[SparseVector | DenseVector]]:
        """For each part, what the own messages say: the same bits as those that receivers unpack."""
        if self._own is None:
            self._own = [
                [self._channel.unpack(index, *message, self._step) for message in zip(messages, self._clients)]
                for index, (messages, _) in enumerate(self._parts)
            ]
        return self._own

    def discard(self) -> None:
        """Let the messages come, for nothing, as if they had never been sent."""
        for _, shared in self._parts:
            shared.receive()
        for part, before in zip(self._channel.parts, self._warm_starts):
            if part.compressor.state is not None and before is not None:
                part.compressor.state.copy_(before)


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
