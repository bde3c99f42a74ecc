"""Who holds which samples: partitions of a data set over clients.

Shapes: S = samples, N = clients, K = classes.

A partitioner is called with the labels and returns one array of sample numbers per client. The arrays are disjoint; a
partition is a function of the labels, the number of clients and the seed, and of nothing else. A partitioner of your
own is one method, ``split``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from heapq import heapreplace
from pathlib import Path

import numpy as np

from lightning_fed.checks import check_counts, check_flags, check_kinds, check_numbers

DRAWS = 1000
# What a client may still want of a class that its own draw left out, once the classes it prefers are used up.
FALLBACK_PREFERENCE = 1e-12


class Partitioner(ABC):
    """Deals the samples of a data set to clients.

    Attributes:
        needs_labels: whether the labels decide who gets what. If not, data without class labels can be partitioned too,
            with zeros for labels.
    """

    needs_labels = True

    def __call__(self, labels: np.ndarray, num_clients: int, seed: int) -> list[np.ndarray]:
        """Partition samples.

        Args:
            labels: integer class of each sample, ``[S]``.
            num_clients: N.
            seed: of the random draws, not negative.

        Returns:
            For each client its sample numbers, int64 and ascending; no sample is given twice.

        Raises:
            ValueError: if the samples do not suffice for this number of clients.
        """
        labels = np.asarray(labels)
        if labels.ndim != 1:
            raise ValueError(f"labels have shape {labels.shape}, but a partition needs one class per sample, [S].")
        if num_clients < 1:
            raise ValueError(f"num_clients={num_clients} must be at least 1.")
        if seed < 0:
            raise ValueError(f"seed={seed} of the partition must not be negative.")
        parts = self.split(labels, num_clients, np.random.default_rng(seed))
        return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]

    @abstractmethod
    def split(self, labels: np.ndarray, num_clients: int, draw: np.random.Generator) -> Sequence[np.ndarray]:
        """The sample numbers of each client, in any order; takes every random number from ``draw``."""


class IID(Partitioner):
    """A random split into equal parts (sizes differ by one at most)."""

    needs_labels = False

    def split(self, labels: np.ndarray, num_clients: int, draw: np.random.Generator) -> list[np.ndarray]:
        return np.array_split(draw.permutation(len(labels)), num_clients)


class Dirichlet(Partitioner):
    """Label skew by Dirichlet draws. Two constructions share the name, and their results are not comparable.

    The default draws *per class over clients*: the samples of class k are cut in proportions ``p_k ~ Dir(alpha 1_N)``
    (Yurochkin et al. 2019; Li et al. 2022), so clients differ in size too, and every sample is used. The whole
    partition is drawn again until every client has ``min_samples``.

    ``balanced=True`` draws *per client over classes* (Hsu, Qi, Brown 2019): client sizes are equal (within one), and
    each sample of client i is of a class drawn from ``q_i ~ Dir(alpha 1_K)``. A class that is used up is no longer
    drawn, so late samples follow ``q_i`` renormalised to what is left: every sample is used exactly once. Some
    published code refills a used-up class instead, and so repeats some samples and leaves out others.

    Args:
        alpha: concentration, above 0. Small: few classes a client; large: nearly IID.
        min_samples: samples that every client must have.
        balanced: equal client sizes; see above.
    """

    def __init__(self, alpha: float = 0.3, min_samples: int = 1, balanced: bool = False) -> None:
        check_concentration(alpha, min_samples)
        check_flags(balanced=balanced)
        self.alpha = alpha
        self.min_samples = min_samples
        self.balanced = balanced

    def split(self, labels: np.ndarray, num_clients: int, draw: np.random.Generator) -> list[np.ndarray]:
        class_sizes = np.unique(labels, return_counts=True)[1]
        deal = self._per_client if self.balanced else self._per_class
        counts_KN = deal(class_sizes, num_clients, draw)
        owner = np.tile(np.arange(num_clients), len(class_sizes)).repeat(counts_KN.ravel())
        order = shuffled_by_label(labels, draw)
        return [order[owner == client] for client in range(num_clients)]

    def _per_class(self, class_sizes: np.ndarray, num_clients: int, draw: np.random.Generator) -> np.ndarray:
        """Samples of each class for each client ``[K, N]``: each class is cut in its own proportions."""
        for _ in range(DRAWS):
            proportions_KN = draw.dirichlet(np.full(num_clients, self.alpha), size=len(class_sizes))
            counts_KN = np.stack([cut(proportions, size) for proportions, size in zip(proportions_KN, class_sizes)])
            if counts_KN.sum(axis=0).min() >= self.min_samples:
                return counts_KN
        raise ValueError(
            f"in {DRAWS} Dirichlet draws with alpha={self.alpha} over num_clients={num_clients} some client always had "
            f"fewer than min_samples={self.min_samples} of the {class_sizes.sum()} samples: raise alpha, lower "
            "num_clients or min_samples, or use balanced=True for clients of equal size."
        )

    def _per_client(self, class_sizes: np.ndarray, num_clients: int, draw: np.random.Generator) -> np.ndarray:
        """Samples of each class for each client ``[K, N]``: clients in random order take one sample at a time."""
        total = int(class_sizes.sum())
        if total // num_clients < self.min_samples:
            raise ValueError(
                f"{total} samples over num_clients={num_clients} clients of equal size are fewer than min_samples="
                f"{self.min_samples} each: lower num_clients or min_samples."
            )
        preferences_NK = draw.dirichlet(np.full(len(class_sizes), self.alpha), size=num_clients) + FALLBACK_PREFERENCE
        thresholds_NK = preferences_NK.cumsum(axis=1)
        left_K, counts_KN = class_sizes.copy(), np.zeros((len(class_sizes), num_clients), dtype=np.int64)
        for client, uniform in zip(draw.permutation(np.arange(total) % num_clients), draw.random(total)):
            thresholds = thresholds_NK[client]
            label = int(thresholds.searchsorted(uniform * thresholds[-1], side="right"))
            counts_KN[label, client] += 1
            left_K[label] -= 1
            if left_K[label] == 0:
                preferences_NK[:, label] = 0
                thresholds_NK = preferences_NK.cumsum(axis=1)
        return counts_KN


class Shards(Partitioner):
    """The pathological split (McMahan et al. 2017): samples sorted by label, cut into equal shards, a few a client.

    With 2 shards most clients see 2 classes.

    Args:
        shards_per_client: shards that each client gets, at random.
    """

    def __init__(self, shards_per_client: int = 2) -> None:
        check_counts(shards_per_client=shards_per_client)
        self.shards_per_client = shards_per_client

    def split(self, labels: np.ndarray, num_clients: int, draw: np.random.Generator) -> list[np.ndarray]:
        num_shards = num_clients * self.shards_per_client
        if num_shards > len(labels):
            raise ValueError(
                f"{len(labels)} samples cannot be cut into num_clients={num_clients} x shards_per_client="
                f"{self.shards_per_client} = {num_shards} shards: lower one of them."
            )
        shards = np.array_split(shuffled_by_label(labels, draw), num_shards)
        hands = draw.permutation(num_shards).reshape(num_clients, self.shards_per_client)
        return [np.concatenate([shards[shard] for shard in hand]) for hand in hands]


class QuantitySkew(Partitioner):
    """Clients of unequal size with the same mix of classes: sizes in proportions ``Dir(alpha 1_N)`` (Li et al. 2022).

    Args:
        alpha: concentration, above 0. Small: a few clients have nearly everything.
        min_samples: samples that every client must have; sizes are drawn again until they do.
    """

    needs_labels = False

    def __init__(self, alpha: float = 0.5, min_samples: int = 1) -> None:
        check_concentration(alpha, min_samples)
        self.alpha = alpha
        self.min_samples = min_samples

    def split(self, labels: np.ndarray, num_clients: int, draw: np.random.Generator) -> list[np.ndarray]:
        for _ in range(DRAWS):
            sizes = cut(draw.dirichlet(np.full(num_clients, self.alpha)), len(labels))
            if sizes.min() >= self.min_samples:
                return np.split(draw.permutation(len(labels)), sizes.cumsum()[:-1])
        raise ValueError(
            f"in {DRAWS} draws of client sizes with alpha={self.alpha} over num_clients={num_clients} some client "
            f"always had fewer than min_samples={self.min_samples} of the {len(labels)} samples: raise alpha, or lower "
            "num_clients or min_samples."
        )


class ByAttribute(Partitioner):
    """Natural clients: samples that share an attribute (writer, hospital, device) stay together.

    With as many values as clients each client is one value. With more, whole groups are dealt, the largest first, each
    to the client that has the fewest samples so far.

    Args:
        attribute: the value of each training sample, in the order of the data set, ``[S]``; or a file of them:
            ``.npy``, or text (``.csv``) with one value a line and no header.
    """

    needs_labels = False

    def __init__(self, attribute: list[int] | list[str] | str | Path) -> None:
        check_kinds((list, tuple, np.ndarray, str, Path), attribute=attribute)
        self.attribute = attribute

    def split(self, labels: np.ndarray, num_clients: int, draw: np.random.Generator) -> list[np.ndarray]:
        values = self._values()
        if values.shape != labels.shape:
            raise ValueError(
                f"attribute has shape {values.shape}, but there are {len(labels)} training samples: give one value for "
                "each sample."
            )
        group_of, sizes = np.unique(values, return_inverse=True, return_counts=True)[1:]
        if len(sizes) < num_clients:
            raise ValueError(
                f"attribute has {len(sizes)} different values, too few for num_clients={num_clients}, because a group "
                f"is never split: set num_clients={len(sizes)} or lower."
            )
        shuffled = draw.permutation(len(sizes))
        largest_first = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
        client_of_group = np.empty(len(sizes), dtype=np.int64)
        held = [(0, client) for client in range(num_clients)]  # a heap: the client with the fewest samples is on top
        for group in largest_first:
            samples, client = held[0]
            client_of_group[group] = client
            heapreplace(held, (samples + int(sizes[group]), client))
        owner = client_of_group[group_of]
        return [np.flatnonzero(owner == client) for client in range(num_clients)]

    def _values(self) -> np.ndarray:
        if not isinstance(self.attribute, (str, Path)):
            return np.asarray(self.attribute)
        path = Path(self.attribute)
        if not path.is_file():
            raise ValueError(f"the attribute file {str(path)!r} does not exist.")
        if path.suffix == ".npy":
            values: np.ndarray = np.load(path, allow_pickle=False)
            return values
        return np.array([line.strip() for line in path.read_text().splitlines() if line.strip()])


def label_counts(indices: Sequence[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many samples of each class each client holds.

    Args:
        indices: sample numbers of each of N clients.
        labels: integer class of each sample, ``[S]``.
        num_classes: K.

    Returns:
        int64 ``[N, K]``.

    Raises:
        ValueError: if a label is not in ``0 .. num_classes - 1``.
    """
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"labels range from {labels.min()} to {labels.max()}, but num_classes={num_classes} allows 0 .. "
            f"{num_classes - 1}."
        )
    return np.stack([np.bincount(labels[samples], minlength=num_classes) for samples in indices])


def shuffled_by_label(labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """All sample numbers ``[S]``, sorted by label and in random order within a label."""
    order = draw.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def cut(proportions: np.ndarray, total: int) -> np.ndarray:
    """Divide ``total`` into whole numbers in these proportions, which sum to 1; int64, of the same shape."""
    edges = np.floor(proportions.cumsum() * total).astype(np.int64)
    edges[-1] = total
    return np.diff(np.minimum(edges, total), prepend=0)


def check_concentration(alpha: float, min_samples: int) -> None:
    check_numbers("(0, inf)", alpha=alpha)
    check_counts(0, min_samples=min_samples)
