"""Rows that meet over a network whose ranks may die, stop or come back.

Nobody waits for everybody. In gossip a rank waits for its neighbours, as long as they answer pings, and two ranks agree
in the store whether their exchange has taken place, so the mixing matrix stays symmetric and doubly stochastic on those
that live. A server's average is made by the leader. A rank that was away finds that rounds have passed without it: it
skips its local work until it meets the others again.

A *step* is ``(round, number of the communication in the round)``, by which ranks tell late messages from new ones.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fed.federation.elastic_server import Average, ElasticServer
from lightning_fed.federation.exchange import CACHED_MATRICES, Exchange, MixingPlan, SharedMessages, columns_per_block
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.pair_record import PairRecord, Step
from lightning_fed.federation.peer_mail import PeerMail
from lightning_fed.federation.peer_network import Received
from lightning_fed.federation.peers import Peers
from lightning_fed.federation.virtual_clock import VirtualClock


class ElasticExchange(Exchange):
    """Clients over ranks that may die.

    ``sum`` and ``gather_rows`` know this rank's clients only. ``sent_bytes`` is exact for them; of the others it holds
    what they should have sent, which the leader corrects whenever it evaluates.

    Args:
        layout: which host has which clients.
        peers: of this rank.
    """

    def __init__(self, layout: Layout, peers: Peers) -> None:
        super().__init__(layout, peers.network.rank)
        self.peers = peers
        self.mail = PeerMail(peers)
        self.network, self.events, self.survivors = peers.network, peers.events, peers.survivors
        self._server = ElasticServer(self.mail, self._send)
        self._others = [rank for rank in range(self.network.num_ranks) if rank != self.host]
        self._step: Step = (-1, 0)
        self._evaluation: Step = (-1, 0)
        self._excluded: frozenset[int] = frozenset()
        self._pairs: dict[int, PairRecord] = {}
        self._remote: list[Tensor] = []
        self._realised: OrderedDict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        for kind, handler in (
            ("rows", self.mail.keep),
            ("sum", self.mail.keep),
            ("settled", self.mail.heard),
            ("alive", self.mail.heard),
        ):
            self.events.on(kind, handler)

    # ------------------------------------------------------------------------------------------------------- rounds

    def begin_round(self, round: int, excluded: Iterable[int]) -> None:
        """The communication of a round begins.

        Args:
            round: its number.
            excluded: clients of this rank whose rows nobody should see; gossip gives them their neighbours' mean.
        """
        self._step = self._evaluation = (round, 0)
        self._excluded = frozenset(excluded)

    def takes_part(self, round: int) -> bool:
        """Whether the others have not finished a round without this rank."""
        return self._server.held((round, 0)) is None and all(
            pair.newest_step() < (round, 0) for pair in self._pairs.values()
        )

    def keep_time(self, clock: VirtualClock | None, seed: int) -> None:
        if clock is not None:
            raise ValueError(
                "a virtual clock counts simulated time, but with on_peer_loss='drop' ranks live and die in real time: "
                "leave the clock out, or use on_peer_loss='raise'."
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """Of this rank alone."""
        return tensor

    def gather_rows(self, values_C: np.ndarray) -> np.ndarray:
        """The numbers of this rank's clients; NaN for the others."""
        values_N = np.full(self.layout.num_clients, np.nan)
        values_N[self.clients.start : self.clients.stop] = values_C
        return values_N

    def share(self, messages_CB: Tensor, support_NN: np.ndarray) -> SharedMessages:
        """Refused: who misses one packed message can never again follow the sender's state.

        Raises:
            ValueError: always.
        """
        raise ValueError("compressed messages need all ranks to live: use on_peer_loss='raise', or no compressor.")

    # ------------------------------------------------------------------------------------------------------- gossip

    @torch.no_grad()
    def mix_(self, rows_CP: Tensor, weights_NN: np.ndarray) -> None:
        """One gossip step with the neighbours that live; the weight of the others goes to the client itself."""
        plan = self._plan(weights_NN, rows_CP)
        arrived = self._swap(rows_CP, plan)
        lost = frozenset((plan.send.keys() | plan.receive.keys()) - arrived.keys())
        excluded = self._excluded.union(*(message.header["excluded"] for message in arrived.values()))
        remote: dict[int, Tensor] = {}
        for message in arrived.values():
            if message.tensors:
                remote.update(zip(message.header["clients"], message.tensors[0]))
        realised = self._realise(weights_NN, lost, excluded)
        needed = np.flatnonzero((realised[self.clients.start : self.clients.stop] != 0).any(axis=0))
        self._remote = [remote[client] for client in needed.tolist() if client not in self.clients]
        super().mix_(rows_CP, realised)
        self._remote = []

    def _mix(self, rows_CP: Tensor, plan: MixingPlan) -> None:
        step = columns_per_block(rows_CP)
        for start in range(0, rows_CP.shape[1], step):
            block = rows_CP[:, start : start + step]
            rows = [row[start : start + step].to(block) for row in self._remote]
            block.copy_(self._mixed(block, torch.stack(rows) if rows else block[:0], plan))

    def _swap(self, rows_CP: Tensor, plan: MixingPlan) -> dict[int, Received]:
        """Send rows to the ranks that need them; returns what has come from those that have got this rank's, too."""
        step = self._next_step()
        waiting = plan.send.keys() | plan.receive.keys()
        with self.events.changed:
            self.mail.forget_before("rows", step)
            self.mail.lost.clear()
            present, cut_off = waiting - self.mail.suspects, waiting & self.mail.cut_off
        # Those that have gone on without this rank are not sent anything.
        present = {peer for peer in present if self._pair(peer).newest_step() < step}
        absent = waiting - (present - cut_off)
        for peer in sorted(present):
            if peer not in cut_off or not self.network.is_sending(peer):
                self._send_rows(peer, step, rows_CP, plan)
        arrived: dict[int, Received] = {}
        news, next_look = set(waiting), time.monotonic() + self.mail.look_interval
        while True:
            with self.events.changed:
                messages = dict(self.mail.messages.get(("rows", step), {}))
                given_up = self.mail.suspects | self.mail.lost | absent
            for peer in sorted(waiting & news):
                happened = self._pair(peer).settle(step, has_rows=peer in messages, gives_up=peer in given_up)
                if happened:
                    arrived[peer] = messages[peer]
                elif happened is False and peer not in self.mail.suspects:
                    self.network.note(peer, {"kind": "alive"})
                waiting = waiting if happened is None else waiting - {peer}
            if not waiting:
                return arrived
            news = self.mail.await_news(next_look - time.monotonic())
            if time.monotonic() >= next_look:
                self.mail.look_after(waiting)
                news, next_look = set(waiting), time.monotonic() + self.mail.look_interval

    def _send_rows(self, peer: int, step: Step, rows_CP: Tensor, plan: MixingPlan) -> None:
        slots = plan.send.get(peer)
        clients = [] if slots is None else [self.clients.start + slot for slot in slots.tolist()]
        tensors = [] if slots is None else [rows_CP[slots].to(self._sent_as(rows_CP))]
        header = {"kind": "rows", "step": step, "clients": clients, "excluded": sorted(self._excluded)}
        self._send(peer, header, tensors)

    def _realise(self, weights_NN: np.ndarray, lost: frozenset[int], excluded: frozenset[int]) -> np.ndarray:
        """The mixing matrix without the edges to lost ranks and excluded clients; right in this rank's rows only."""
        if not lost and not excluded:
            return weights_NN
        key = (id(weights_NN), lost, excluded)
        if key not in self._realised:
            mine, gone = list(self.clients), [client for peer in lost for client in self.layout.clients_of(peer)]
            realised = weights_NN.copy()
            realised[np.ix_(mine, gone)] = realised[np.ix_(gone, mine)] = 0
            realised[:, sorted(excluded)] = 0
            for client in sorted(excluded.intersection(mine)):
                if not realised[client].any():
                    raise RuntimeError(f"client {client} is not finite and has no neighbour from which to start again.")
                realised[client] /= realised[client].sum()
            realised[np.diag_indices_from(realised)] += weights_NN.sum(axis=1) - realised.sum(axis=1)
            self._realised[key] = weights_NN, realised
            if len(self._realised) > CACHED_MATRICES:
                self._realised.popitem(last=False)
        return self._realised[key][1]

    # ------------------------------------------------------------------------------------------------------- server

    @torch.no_grad()
    def upload_mean(self, rows_CP: Tensor, weights_N: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        average = self._agree(rows_CP, weights_N)
        uploaded = np.zeros(self.layout.num_clients, dtype=bool)
        for rank in average.ranks:
            uploaded[list(self.layout.clients_of(rank))] = True
        self.sent_bytes += (uploaded & (weights_N != 0)) * rows_CP.shape[1] * rows_CP.element_size()
        return average.vector.to(rows_CP.device, dtype or rows_CP.dtype)

    @torch.no_grad()
    def average(self, rows_CP: Tensor, weights_N: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        return self._agree(rows_CP, weights_N).vector.to(rows_CP.device, dtype or rows_CP.dtype)

    def _agree(self, rows_CP: Tensor, weights_N: np.ndarray) -> Average:
        mine = self._own(weights_N)
        part = [self._weighted_sum(rows_CP, mine, torch.float64)] if mine.any() else []
        return self._server.agree(self._next_step(), part, float(mine.sum()), like=rows_CP[0])

    # --------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def mean(self, rows_CP: Tensor, weights_N: np.ndarray | None = None) -> Tensor:
        """The weighted mean for evaluation: on the leader of all that answer in time, elsewhere of the own clients."""
        weights_N = self._mean_weights(weights_N)
        mine = self._own(weights_N)
        total, weight = self._weighted_sum(rows_CP, mine, rows_CP.dtype), float(mine.sum())
        if np.count_nonzero(weights_N) > np.count_nonzero(mine):
            step, self._evaluation = self._evaluation, (self._evaluation[0], self._evaluation[1] + 1)
            self.survivors.update()
            own_bytes = self.sent_bytes[self.clients.start : self.clients.stop].tolist()
            header = {"kind": "sum", "step": step, "weight": weight, "bytes": own_bytes}
            if not self.survivors.is_leader:
                self.network.send(self.survivors.leader, header, [total])
            else:
                for message in self._sums(step):
                    total = total + message.tensors[0].to(total)
                    weight += message.header["weight"]
                    clients = self.layout.clients_of(message.sender)
                    self.sent_bytes[clients.start : clients.stop] = message.header["bytes"]
        return total / weight if weight else rows_CP.mean(dim=0)

    def _sums(self, step: Step) -> list[Received]:
        """What the other ranks have sent for a step, or send soon."""
        deadline = time.monotonic() + self.survivors.ping_timeout
        with self.events.changed:
            self.mail.forget_before("sum", step)
            sums = self.mail.messages.setdefault(("sum", step), {})
            missing = set(self._others) - sums.keys() - self.mail.suspects
        self.mail.look_after(missing)
        self.events.wait_for(
            lambda: sums.keys() >= set(self._others) - self.mail.suspects, max(deadline - time.monotonic(), 0)
        )
        with self.events.changed:
            return [sums[rank] for rank in sorted(sums)]

    # ------------------------------------------------------------------------------------------------------ helpers

    def _next_step(self) -> Step:
        step, self._step = self._step, (self._step[0], self._step[1] + 1)
        return step

    def _pair(self, peer: int) -> PairRecord:
        if peer not in self._pairs:
            self._pairs[peer] = PairRecord(self.network, peer)
        return self._pairs[peer]

    def _own(self, weights_N: np.ndarray) -> np.ndarray:
        """The weights of this rank's clients that are not excluded; zero for all others, ``[N]``."""
        mine = np.zeros_like(weights_N)
        chosen = [client for client in self.clients if client not in self._excluded]
        mine[chosen] = weights_N[chosen]
        return mine

    def _send(self, rank: int, header: dict[str, Any], tensors: list[Tensor]) -> None:
        with self.events.changed:
            self.wire_bytes += sum(tensor.nbytes for tensor in tensors)
        self.network.send(rank, header, tensors)
