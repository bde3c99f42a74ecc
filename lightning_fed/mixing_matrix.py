"""Weights of a graph's edges: making, checking and restricting mixing matrices.

Shapes: N = clients. A mixing matrix is float64 ``[N, N]``, non-negative and doubly stochastic.
"""

from __future__ import annotations

import networkx as nx
import numpy as np

SUM_TOLERANCE = 1e-8


def metropolis_weights(graph: nx.Graph, name: str) -> np.ndarray:
    """Metropolis-Hastings weights ``[N, N]`` of an undirected graph; ``name`` is for the message."""
    if graph.is_directed():
        raise ValueError(
            f"{name} is directed, where mixing='metropolis' is not doubly stochastic: make it undirected, or use "
            "mixing='uniform' if all in- and out-degrees are equal."
        )
    adjacency = nx.to_numpy_array(graph, nodelist=range(len(graph)), weight=None)
    degrees = adjacency.sum(axis=1)
    weights: np.ndarray = adjacency / (1 + np.maximum.outer(degrees, degrees))
    np.fill_diagonal(weights, 1 - weights.sum(axis=1))
    return weights


def uniform_weights(graph: nx.Graph, name: str) -> np.ndarray:
    """``1 / (1 + degree)`` for every in-neighbour and oneself, ``[N, N]``; ``name`` is for the message."""
    receives_from = nx.to_numpy_array(graph, nodelist=range(len(graph)), weight=None).T
    degrees = np.concatenate([receives_from.sum(axis=0), receives_from.sum(axis=1)]).astype(int)
    if degrees.min() != degrees.max():
        way_out = "make them equal" if graph.is_directed() else "use mixing='metropolis'"
        raise ValueError(
            f"mixing='uniform' of {name} with num_clients={len(graph)} is not doubly stochastic, because its degrees "
            f"range from {degrees.min()} to {degrees.max()}: {way_out}."
        )
    weights: np.ndarray = (receives_from + np.eye(len(graph))) / (1 + degrees[0])
    return weights


def checked_doubly_stochastic(weights: np.ndarray, name: str) -> np.ndarray:
    """Return the weights, or refuse them with the entry, row or column that is worst.

    Raises:
        ValueError: if an entry is negative, or a row or column sum differs from 1 by more than 1e-8.
    """
    if not weights.min() >= -SUM_TOLERANCE:  # also true of nan
        row, column = np.unravel_index(weights.argmin(), weights.shape)
        raise ValueError(
            f"the mixing matrix of {name} has the entry W[{row}, {column}] = {weights[row, column]:.6g}, but no weight "
            "may be negative: lower the weights of that client's edges."
        )
    for axis, line in ((1, "row"), (0, "column")):
        sums = weights.sum(axis=axis)
        worst = int(np.abs(sums - 1).argmax())
        if abs(sums[worst] - 1) > SUM_TOLERANCE:
            raise ValueError(
                f"the mixing matrix of {name} is not doubly stochastic: {line} {worst} sums to {sums[worst]:.6g}, "
                "not 1. Correct the weights, or use mixing='metropolis' on an undirected graph."
            )
    np.maximum(weights, 0, out=weights)
    return weights


def frozen(weights: np.ndarray) -> np.ndarray:
    """The same array, read-only: matrices are shared between rounds."""
    weights.setflags(write=False)
    return weights


def restrict(weights: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The mixing matrix of a round in which some clients are absent: they neither send nor receive.

    The weight that a client gives to an absent neighbour goes to itself; an absent client keeps its row.

    Args:
        weights: symmetric and doubly stochastic, ``[N, N]``.
        present: bool ``[N]``.

    Returns:
        Read-only, symmetric and doubly stochastic ``[N, N]``; ``weights`` itself if everybody is present.

    Raises:
        ValueError: if the weights are not symmetric, where the result would not be doubly stochastic.
    """
    if present.shape != weights.shape[:1]:
        raise ValueError(f"present has shape {present.shape}, but there are {len(weights)} clients.")
    if present.all():
        return weights
    if not np.allclose(weights, weights.T, rtol=0, atol=SUM_TOLERANCE):
        raise ValueError(
            "the weights of a directed topology are not doubly stochastic when clients are absent: use full "
            "participation (participation=None) or an undirected topology (ring, torus, star, complete, ...)."
        )
    restricted = np.where(np.logical_and.outer(present, present), weights, 0.0)
    np.fill_diagonal(restricted, 0.0)
    np.fill_diagonal(restricted, np.maximum(1 - restricted.sum(axis=1), 0))
    return frozen(restricted)
