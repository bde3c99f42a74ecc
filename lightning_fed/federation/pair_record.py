"""How two ranks agree, whatever happens to either, which of their exchanges have taken place."""

from __future__ import annotations

import json

from lightning_fed.federation.peer_network import PeerNetwork

Step = tuple[int, int]
BEFORE_ALL: Step = (-1, -1)
BOTH, BROKEN = "both", "broken"


class PairRecord:
    """What the store says of one pair of ranks: a single key, which either of them changes atomically.

    It holds ``[step, state, last]``: the newest step of which either has spoken, its state, and the last step that took
    place. The state is the rank that has the other's rows, ``"both"`` when both have, or ``"broken"`` when one has
    given up waiting. ``last`` is for a rank that slept after it had spoken, while the other one went on.

    Args:
        network: of this rank.
        peer: the other one.
    """

    def __init__(self, network: PeerNetwork, peer: int) -> None:
        self.network, self.peer = network, peer
        self._key = f"pair/{min(network.rank, peer)}-{max(network.rank, peer)}"
        self._spoke_of = BEFORE_ALL

    def newest_step(self) -> Step:
        """The newest step of which either rank has spoken."""
        return decode(self._read())[0]

    def settle(self, step: Step, has_rows: bool, gives_up: bool) -> bool | None:
        """Say what this rank knows of a step, and hear whether the exchange has taken place.

        Args:
            step: this rank's present one.
            has_rows: whether the other's rows are here.
            gives_up: whether this rank waits no longer.

        Returns:
            True: both ranks have each other's rows. False: at least one has gone on without the other's. None: not
            settled yet.
        """
        text = self._read()
        while True:
            newest, state, last = decode(text)
            if newest > step:  # the other has gone on
                return last == step == self._spoke_of
            if newest < step:
                state = ""
            if state == BROKEN:
                return False
            if state == BOTH:
                return self._spoke_of == step  # else this process was started after the exchange
            was_restarted = state == str(self.network.rank) and self._spoke_of != step
            if gives_up or was_restarted:
                state = BROKEN
            elif has_rows and state != str(self.network.rank):
                state = BOTH if state else str(self.network.rank)
            else:
                return None
            proposal = json.dumps([step, state, step if state == BOTH else last])
            found = self.network.store.compare_set(self._key, text, proposal).decode()
            if found == proposal:
                self._spoke_of = step
                if state in (BOTH, BROKEN):
                    self.network.note(self.peer, {"kind": "settled"})
            text = found

    def _read(self) -> str:
        return self.network.store.compare_set(self._key, "", "").decode()  # `get` would wait for a key


def decode(text: str) -> tuple[Step, str, Step]:
    if not text:
        return BEFORE_ALL, "", BEFORE_ALL
    (round, number), state, (last_round, last_number) = json.loads(text)
    return (round, number), state, (last_round, last_number)
