"""Averages that a few hostile or broken clients cannot move far.

A rule takes the place of the mean: of the rows that a server has got, or of those that a client of a gossip federation
has (its neighbours' and its own). *Byzantine* clients are those that may send anything; a rule bears a number of them.

There are two families, so that no rule needs all rows at once. :class:`CoordinateRule` combines a block of columns at a
time. :class:`DistanceRule` sees how far the rows are from each other, and says with which weights they are combined.

Shapes: K = rows that are combined, B = columns of a block, f = Byzantine clients among the K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from lightning_fed.checks import check_counts, check_numbers

# Rows that are so many times farther away than most are left out of a geometric median: they would only pull it by a
# bounded step, and next to their squared distance float64 could not tell the others apart.
FAR = 1e6


class RobustMix(ABC):
    """A rule that combines K rows.

    Attributes:
        is_centered: the result depends on whose it is: the rule needs an own row, which a server has not.
        uses_weights: rows may count differently (a server's ``weighting="samples"``); if not, each counts once.
    """

    is_centered = False
    uses_weights = False

    @property
    @abstractmethod
    def least(self) -> int:
        """Rows without which the rule does not bear what it should."""

    def check(self, rows: int, way_out: str) -> None:
        """Refuse too few rows.

        Args:
            rows: K.
            way_out: what the user can do for more of them.

        Raises:
            ValueError: naming the rule, both numbers and the way out.
        """
        if rows < self.least:
            raise ValueError(
                f"robust={self!r} needs the rows of at least {self.least} clients, but only {rows} come together: "
                f"{way_out}."
            )

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class CoordinateRule(RobustMix):
    """A rule that looks at each coordinate by itself."""

    @abstractmethod
    def combine(self, block_KB: Tensor) -> Tensor:
        """The result ``[B]``, float64, for some columns of the rows; finite, of any float dtype."""


class DistanceRule(RobustMix):
    """A rule whose result is a linear combination of the rows, chosen by their distances."""

    @abstractmethod
    def weights(self, squared_KK: np.ndarray, shares_K: np.ndarray, own: int) -> np.ndarray:
        """The weights ``[K]``, float64, of sum 1.

        Args:
            squared_KK: ``||x_i - x_j||^2``, float64; infinite where float64 cannot hold it.
            shares_K: how much each row counts, positive, of sum 1. Rules without ``uses_weights`` ignore it.
            own: which row is that of the client whose result it is. Rules without ``is_centered`` ignore it.
        """


class CoordinateMedian(CoordinateRule):
    """The median of each coordinate (Yin, Chen, Ramchandran, Bartlett, ICML 2018, Definition 1).

    Of an even number it is the mean of the middle two. It bears f < K / 2. With non-IID data it is biased towards the
    majority even if all clients are honest.
    """

    @property
    def least(self) -> int:
        return 3

    def combine(self, block_KB: Tensor) -> Tensor:
        ordered, rows = block_KB.sort(dim=0).values, len(block_KB)
        return (ordered[(rows - 1) // 2].double() + ordered[rows // 2].double()) / 2


class TrimmedMean(CoordinateRule):
    """The mean of each coordinate without its f largest and f smallest values (the same paper, Definition 2).

    It bears f of K > 2 f.

    Args:
        byzantine: f, the paper's ``beta K``.

    Raises:
        ValueError: if f is not at least 1.
    """

    def __init__(self, byzantine: int) -> None:
        check_counts(byzantine=byzantine)
        self.byzantine = byzantine

    @property
    def least(self) -> int:
        return 2 * self.byzantine + 1

    def combine(self, block_KB: Tensor) -> Tensor:
        ordered, f = block_KB.sort(dim=0).values, self.byzantine
        return ordered[f : len(ordered) - f].double().mean(dim=0)


class GeometricMedian(DistanceRule):
    """RFA: the point of least ``sum_k a_k ||z - x_k||`` (Pillutla, Kakade, Harchaoui, IEEE TSP 2022, Algorithm 2).

    The smoothed Weiszfeld iteration ``b_k = a_k / max(nu, ||z - x_k||);  z <- sum_k b_k x_k / sum_k b_k``, from the
    mean ``z = sum_k a_k x_k`` as in the authors' code. z is always a combination of the rows, so the distances between
    them are enough. The authors stop after a few iterations, each of which costs them a communication; here none does.

    It bears any Byzantine clients that hold less than half of the weight ``sum_k a_k``. A server's ``a_k`` are those of
    the average, so with ``weighting="samples"`` it is less than half of the samples; in gossip they are equal.
    Rows more than a million times farther away than the nearest half are left out.

    Args:
        iterations: of Weiszfeld. An outlier's influence shrinks by about ``f / (K - f)`` in each.
        smoothing: nu, the distance below which a row pulls no stronger. The paper's is 1e-6.

    Raises:
        ValueError: if a setting is out of range.
    """

    uses_weights = True

    def __init__(self, iterations: int = 100, smoothing: float = 1e-6) -> None:
        check_counts(iterations=iterations)
        check_numbers("(0, inf)", smoothing=smoothing)
        self.iterations = iterations
        self.smoothing = smoothing

    @property
    def least(self) -> int:
        return 3

    def weights(self, squared_KK: np.ndarray, shares_K: np.ndarray, own: int) -> np.ndarray:
        near = within_reach(squared_KK, shares_K)
        squared, a = squared_KK[np.ix_(near, near)], shares_K[near]
        b = a
        for _ in range(self.iterations):
            w = b / b.sum()
            to_each = (squared * w).sum(axis=1)
            distance = np.sqrt(np.maximum(to_each - (to_each * w).sum() / 2, 0))  # ||z - x_k||, z = sum_k w_k x_k
            b = a / np.maximum(self.smoothing, distance)
        weights = np.zeros(len(squared_KK))
        weights[near] = b / b.sum()
        return weights


class Krum(DistanceRule):
    """The row, or the mean of the m rows, with the closest neighbours (Blanchard et al., NeurIPS 2017, section 4).

    A row's score is the sum of its squared distances to the K - f - 2 others that are nearest to it. Krum takes the row
    of the smallest score; Multi-Krum averages the m rows of the smallest scores. Equal scores: the first. It bears f of
    ``K >= 2 f + 3`` (the paper's ``2 f + 2 < K``).

    Args:
        byzantine: f.
        selected: m, at most K - f.

    Raises:
        ValueError: if a setting is not at least 1.
    """

    def __init__(self, byzantine: int, selected: int = 1) -> None:
        check_counts(byzantine=byzantine, selected=selected)
        self.byzantine = byzantine
        self.selected = selected

    @property
    def least(self) -> int:
        return max(2 * self.byzantine + 3, self.selected + self.byzantine)

    def weights(self, squared_KK: np.ndarray, shares_K: np.ndarray, own: int) -> np.ndarray:
        closest = len(squared_KK) - self.byzantine - 2
        to_others = np.sort(squared_KK + np.diag(np.full(len(squared_KK), -np.inf)), axis=1)[:, 1:]
        scores = to_others[:, :closest].sum(axis=1)
        return uniform(np.argsort(scores, kind="stable")[: self.selected], len(scores))


class NearestNeighborAverage(DistanceRule):
    """Each client averages the K - f rows nearest to its own, which is one of them (Farhadkhani et al., ICML 2023).

    The mix of MoNNA. There a node goes on when n - f of n models have come and averages n - 2 f of them; here all K
    have come. It bears f of K > 2 f as far as the honest rows are nearer to each other than to the others; how large a
    fraction the paper's theory allows was not checked. For gossip: a server has no row of its own.

    Args:
        byzantine: f.

    Raises:
        ValueError: if f is not at least 1.
    """

    is_centered = True

    def __init__(self, byzantine: int) -> None:
        check_counts(byzantine=byzantine)
        self.byzantine = byzantine

    @property
    def least(self) -> int:
        return 2 * self.byzantine + 1

    def weights(self, squared_KK: np.ndarray, shares_K: np.ndarray, own: int) -> np.ndarray:
        nearest = np.argsort(squared_KK[own], kind="stable")[: len(squared_KK) - self.byzantine]
        return uniform(nearest, len(squared_KK))


def uniform(chosen: np.ndarray, size: int) -> np.ndarray:
    """Equal weights on some rows, ``[size]``."""
    weights = np.zeros(size)
    weights[chosen] = 1 / len(chosen)
    return weights


def within_reach(squared_KK: np.ndarray, shares_K: np.ndarray) -> np.ndarray:
    """Which rows are not absurdly far from where most are, as numbers in order.

    Most are where the smallest ball around a row lies that holds more than half of the shares: near honest rows, if
    these hold more than half.
    """
    order = np.argsort(squared_KK, axis=1, kind="stable")
    majority = (np.cumsum(shares_K[order], axis=1) > 0.5).argmax(axis=1)
    radius = np.take_along_axis(squared_KK, np.take_along_axis(order, majority[:, None], axis=1), axis=1)[:, 0]
    center = int(radius.argmin())
    near: np.ndarray = np.flatnonzero(squared_KK[center] <= FAR**2 * radius[center])
    return near


def squared_distances(block_KB: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``sum_c (x_i[c] - x_j[c])^2`` over the columns of a block, for pairs of rows; float64 ``[pairs]``.

    The columns are added up by halves, entry by entry, so that a pair's sum has the same bits whichever others are
    computed with it.

    Args:
        block_KB: rows.
        left: i of each pair, int64 ``[pairs]``.
        right: j of each pair.
    """
    rows = block_KB.double()
    squares = (rows[left] - rows[right]).square_()
    squares = torch.nn.functional.pad(squares, (0, (1 << (squares.shape[1] - 1).bit_length()) - squares.shape[1]))
    while (half := squares.shape[1] // 2) > 0:
        squares = squares[:, :half] + squares[:, half:]
    return squares[:, 0]
