"""Who takes part in a round: the cohort."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from lightning_fed.checks import check_counts, check_numbers, given
from lightning_fed.federation.randomness import Stream, derive_seed


class Participation(ABC):
    """A rule that names the cohort of each round, equal on every rank because it depends on (seed, round) alone."""

    @abstractmethod
    def cohort(self, round: int, num_clients: int, seed: int) -> np.ndarray:
        """The sorted clients of one round, int64 ``[cohort_size]``."""

    @abstractmethod
    def validate(self, num_clients: int) -> None:
        """Refuse a number of clients that the rule cannot serve.

        Raises:
            ValueError: naming the setting and the way out.
        """


class FullParticipation(Participation):
    """Every client takes part in every round."""

    def cohort(self, round: int, num_clients: int, seed: int) -> np.ndarray:
        return np.arange(num_clients)

    def validate(self, num_clients: int) -> None:
        pass


class UniformSample(Participation):
    """A fixed-size cohort drawn without replacement, uniformly, afresh each round (McMahan et al. 2017, Algorithm 1).

    Args:
        size: clients in a cohort, S. Give either this or ``fraction``.
        fraction: C in the paper: the cohort has ``max(round(C * N), 1)`` clients.

    Raises:
        ValueError: if both or neither is given, or one is out of range.
    """

    def __init__(self, size: int | None = None, fraction: float | None = None) -> None:
        if (size is None) == (fraction is None):
            raise ValueError(f"give exactly one of size={size} and fraction={fraction} for the cohort.")
        check_counts(**given(size=size))
        check_numbers("(0, 1]", **given(fraction=fraction))
        self.size = size
        self.fraction = fraction

    def cohort_size(self, num_clients: int) -> int:
        return self.size if self.size is not None else max(round((self.fraction or 0) * num_clients), 1)

    def cohort(self, round: int, num_clients: int, seed: int) -> np.ndarray:
        draw = np.random.default_rng(derive_seed(Stream.COHORT, seed, round))
        return np.sort(draw.choice(num_clients, self.cohort_size(num_clients), replace=False))

    def validate(self, num_clients: int) -> None:
        if self.cohort_size(num_clients) > num_clients:
            raise ValueError(
                f"a cohort of size={self.size} is larger than num_clients={num_clients}: lower the cohort size or use "
                "full participation."
            )
