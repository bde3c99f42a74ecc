"""Who is there, as far as one node knows, and the order in which a round asks for them.

Shapes: N = clients of the federation (the nodes).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

UNKNOWN, NEVER_ACTIVE = 0, -1


def digest(client: int, round: int) -> bytes:
    """``md5("<client>-<round>")``, both numbers in ASCII decimals: the format that all nodes must share."""
    return hashlib.md5(b"%d-%d" % (client, round), usedforsecurity=False).digest()


@lru_cache(maxsize=256)
def hash_order(num_clients: int, round: int) -> np.ndarray:
    """All clients in the order in which ``round`` asks for them; int64 ``[N]``, read-only.

    Sorted by :func:`digest`, equal digests by client number (MoDeST 2023, consistent hashing).
    """
    order = np.array(sorted(range(num_clients), key=lambda client: (digest(client, round), client)), dtype=np.int64)
    order.setflags(write=False)
    return order


class View:
    """What one node knows of all others: when each was last active, and whether it is a member.

    A membership is a pair (counter, JOIN or LEAVE); a node raises its counter with every change of its own. The pair is
    kept as the number ``2 counter + (1 if JOIN)``, so the newest knowledge is the larger number, and merging two views
    is an elementwise maximum: commutative, associative and idempotent. JOIN wins between equal counters, which do not
    occur, because only the node itself raises its counter.

    Args:
        members: bool ``[N]``, the clients that are known to be members at first, with counter 0.

    Attributes:
        last_active: int32 ``[N]``, the last round in which each client was seen; -1 for never.
        membership: int32 ``[N]``, as above; 0 for a client that is unknown.
    """

    BYTES_PER_CLIENT = 8

    def __init__(self, members: np.ndarray) -> None:
        self.last_active = np.full(len(members), NEVER_ACTIVE, dtype=np.int32)
        self.membership = members.astype(np.int32)

    @property
    def num_bytes(self) -> int:
        """Length of :meth:`to_array` on the wire."""
        return self.BYTES_PER_CLIENT * len(self.membership)

    @property
    def joined(self) -> np.ndarray:
        """Who is a member, bool ``[N]``."""
        return (self.membership & 1).astype(bool)

    @property
    def newest_round(self) -> int:
        """The highest round in which anybody was seen; -1 if nobody was."""
        return int(self.last_active.max())

    def counter(self, client: int) -> int:
        """How often a client has changed its membership."""
        return int(self.membership[client] >> 1)

    def copy(self) -> View:
        return View.from_array(self.to_array())

    def to_array(self) -> np.ndarray:
        """int32 ``[2, N]``: last active rounds and memberships."""
        return np.stack([self.last_active, self.membership])

    @classmethod
    def from_array(cls, array: np.ndarray) -> View:
        """Inverse of :meth:`to_array`."""
        view = cls.__new__(cls)
        view.last_active, view.membership = array.astype(np.int32)
        return view

    def merge(self, other: View) -> None:
        """Adopt whatever the other view knows better."""
        np.maximum(self.last_active, other.last_active, out=self.last_active)
        np.maximum(self.membership, other.membership, out=self.membership)

    def saw(self, client: int, round: int) -> None:
        """A sign of life."""
        self.last_active[client] = max(self.last_active[client], round)

    def change(self, client: int, counter: int, joins: bool) -> None:
        """A client's announcement; an older one than what is known changes nothing."""
        self.membership[client] = max(self.membership[client], 2 * counter + joins)

    def candidates(self, round: int, activity_window: int, myself: int) -> np.ndarray:
        """Whom a node may ask for a round, in hash order; int64.

        Members that were active in the last ``activity_window`` rounds before ``round``, and the node itself.
        """
        eligible = self.joined & (self.last_active >= round - activity_window)
        eligible[myself] = True
        order = hash_order(len(eligible), round)
        return order[eligible[order]]
