"""User-level differential privacy: what a server's model may tell of any one client, and how much that is.

The unit of protection is a client with all its data. docs/privacy.md says what the guarantee covers and what not.

Shapes: N = clients, S = clients in a cohort, P = numbers in a row.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fed.checks import check_choice, check_counts, check_numbers, given
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.randomness import Stream
from lightning_fed.federation.update_clipping import Clipping

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_fed.strategies.fedavg import FedAvgStrategy

SECRET_BYTES = 32


class UserLevelPrivacy:
    """DP-FedAvg (McMahan, Ramage, Talwar, Zhang 2018): clipped updates, a fixed denominator, Gaussian noise.

    In every round ``x <- x + 1/S (sum_k clip(x_k - x) + N(0, (z C)^2))``. Epsilon is that of the Renyi accountant of
    `dp-accounting`, for federations that differ in all data of one client (replaced by any other; N is public). Such a
    change moves the sum by up to 2 C, so the accountant is given the noise multiplier ``z / 2``. A cohort that is drawn
    uniformly without replacement amplifies privacy (Wang, Balle, Kasiviswanathan 2019, Theorem 27).

    Both the noise and the cohorts are kept secret: they come from 256 bits of the operating system's entropy, drawn
    when a fit starts, which are neither printed nor a function of the federation's ``seed``. Checkpoints hold them
    beside the clients' rows, so that a resumed run repeats rounds with the same noise.

    Args:
        clip: C, the largest 2-norm of a client's update.
        noise_multiplier: z, the noise's standard deviation (of each number of the sum) in units of C.
        delta: the probability that the bound by epsilon may fail; below 1/N.
        clipping: clip an update as a ``"whole"`` (as in the paper), or set ``"layers"`` to norms ``C / sqrt(L)``, or
            ``"layers_by_size"`` to ``C sqrt(d_l / d)``, of every update that is longer than C (Pelikan et al. 2023).
        secret_seed: makes noise and cohorts a function of this number, to repeat an experiment. Whoever knows or
            guesses it can subtract the noise: leave it out when the model is to be released.

    Raises:
        ValueError: if a setting is out of range.
        ImportError: if dp-accounting is not installed.
    """

    def __init__(
        self,
        clip: float,
        noise_multiplier: float,
        delta: float,
        clipping: Clipping = "whole",
        secret_seed: int | None = None,
    ) -> None:
        check_numbers("(0, inf)", clip=clip)
        check_numbers("(0, inf)", noise_multiplier=noise_multiplier)
        check_numbers("(0, 1)", delta=delta)
        check_choice("clipping", clipping, "whole", "layers", "layers_by_size")
        check_counts(0, **given(secret_seed=secret_seed))
        accounting()
        self.clip = clip
        self.noise_multiplier = noise_multiplier
        self.delta = delta
        self.clipping = clipping
        self.secret_seed = secret_seed

    def epsilon(self, rounds: int, cohort_size: int, num_clients: int) -> float:
        """What the accountant states after so many rounds; 0 before the first one."""
        if rounds == 0:
            return 0.0
        dp = accounting()
        noise = dp.GaussianDpEvent(self.noise_multiplier / 2)  # in units of the sensitivity, 2 C
        of_round = dp.SampledWithoutReplacementDpEvent(num_clients, cohort_size, noise)
        accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        return float(accountant.compose(dp.SelfComposedDpEvent(of_round, rounds)).get_epsilon(self.delta))

    def __repr__(self) -> str:
        return (
            f"UserLevelPrivacy(clip={self.clip}, noise_multiplier={self.noise_multiplier}, clipping={self.clipping!r})"
        )


class Secret:
    """What noise and cohorts are drawn from: the same on every rank, and for nobody else to know.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key

    @classmethod
    def draw(cls, seed: int | None) -> Secret:
        """A fresh secret from the operating system, or the one of a seed."""
        if seed is None:
            return cls(secrets.token_bytes(SECRET_BYTES))
        return cls(hashlib.blake2b(str(seed).encode(), digest_size=SECRET_BYTES).digest())

    def generator(self, stream: Stream, round: int) -> np.random.Generator:
        """A stream with a key of 128 bits: torch's own generator would start from one of 2^32 states."""
        digest = hashlib.blake2b(struct.pack("<2q", stream, round), key=self.key, digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def noise(self, round: int, size: int) -> np.ndarray:
        """N(0, 1) for a round, float64 ``[size]``."""
        return self.generator(Stream.PRIVACY, round).standard_normal(size)


class SecretSample(UniformSample):
    """A uniform sample that nobody can predict from the federation's seed; privacy is amplified by that.

    Attributes:
        secret: given when a fit is set up.
    """

    secret: Secret | None = None

    def cohort(self, round: int, num_clients: int, seed: int) -> np.ndarray:
        assert self.secret is not None, "cohorts of a private federation exist from the set-up of `fit` on"
        draw = self.secret.generator(Stream.COHORT, round)
        return np.sort(draw.choice(num_clients, self.cohort_size(num_clients), replace=False))


def accounting() -> ModuleType:
    """The accountant's package.

    Raises:
        ImportError: naming the extra that brings it.
    """
    try:
        import dp_accounting
    except ImportError:
        raise ImportError(
            "UserLevelPrivacy needs dp-accounting, which states its epsilon: pip install 'lightning_fed[privacy]'."
        ) from None
    return dp_accounting


def cohort_size_of(strategy: FedAvgStrategy) -> int:
    """S; of full participation N."""
    sample, everybody = strategy.participation, strategy.num_clients
    return sample.cohort_size(everybody) if isinstance(sample, UniformSample) else everybody


def check_private(strategy: FedAvgStrategy) -> None:
    """Refuse settings under which more than the noisy sum depends on a client's data.

    Raises:
        ValueError: naming the setting and the way out.
    """
    if strategy.max_update_norm is not None:
        raise ValueError(
            f"max_update_norm={strategy.max_update_norm} and privacy both clip updates: leave out max_update_norm, "
            "privacy has its own `clip`."
        )
    if strategy.weighting != "uniform":
        raise ValueError(
            f"weighting={strategy.weighting!r} gives clients weights that depend on their data, so no epsilon can be "
            "stated: with privacy set weighting='uniform'."
        )
    if strategy.on_peer_loss == "drop":
        raise ValueError(
            "on_peer_loss='drop' averages over the ranks that happen to live, without noise that all of them share: "
            "with privacy use on_peer_loss='raise'."
        )
    if strategy.rounds_per_epoch == "pass":
        raise ValueError(
            "rounds_per_epoch='pass' makes the number of rounds depend on the clients' numbers of samples: with "
            "privacy set a number of rounds."
        )


def check_private_training(strategy: FedAvgStrategy, privacy: UserLevelPrivacy) -> None:
    """Refuse modules, schedulers and numbers of clients for which no epsilon can be stated; before the first step.

    Raises:
        ValueError: naming the setting and the way out.
    """
    bank, num_clients = strategy.bank, strategy.num_clients
    if privacy.delta >= 1 / num_clients:
        raise ValueError(
            f"delta={privacy.delta} is not below 1/num_clients={1 / num_clients}: so large a delta would be kept by "
            "publishing all data of one client; lower it."
        )
    if bank.buffers.width and (strategy.float_buffers == "mix" or strategy.on_nonfinite == "drop"):
        raise ValueError(
            f"the module has {bank.buffers.width} numbers in float buffers (BatchNorm statistics), which would be "
            f"averaged without noise (float_buffers={strategy.float_buffers!r}, on_nonfinite="
            f"{strategy.on_nonfinite!r}): use a module without them (GroupNorm), or, if they never change, "
            "float_buffers='local' and on_nonfinite='raise', where the server's model keeps those that it began with."
        )
    if bank.counters.width:
        raise ValueError(
            f"the module has {bank.counters.width} integers in buffers (BatchNorm counts its batches), and the "
            "exported model takes over those of client 0 without noise: use a module without them (GroupNorm), or "
            "register them with persistent=False."
        )
    watching = [config for config in strategy.lr_scheduler_configs if config.reduce_on_plateau]
    if watching:
        raise ValueError(
            f"the scheduler {type(watching[0].scheduler).__name__} watches {watching[0].monitor!r}, and what is logged "
            "has no noise: with privacy use a scheduler that depends on the epoch alone."
        )


def announce(strategy: FedAvgStrategy, privacy: UserLevelPrivacy, trainer: Trainer) -> None:
    """Print what the planned rounds will cost, with the relation that epsilon is meant for.

    Raises:
        ValueError: if the noise is so small that there is no such number.
    """
    size, num_clients = cohort_size_of(strategy), strategy.num_clients
    rounds = (trainer.max_epochs or 0) * int(strategy.rounds_per_epoch)  # -1: nobody knows
    epsilon = strategy.epsilon(max(rounds, 1))
    if math.isinf(epsilon):
        raise ValueError(f"noise_multiplier={privacy.noise_multiplier} is so small that epsilon is infinite: raise it.")
    plan = f"epsilon={epsilon} at delta={privacy.delta} after {rounds} rounds"
    drawn = "" if size == num_clients else ", drawn without replacement"
    rank_zero_info(
        f"User-level differential privacy: {plan if rounds > 0 else 'the number of rounds is open, watch fed/epsilon'} "
        f"({size} of {num_clients} clients a round{drawn}), for federations that differ in all data of one client "
        "(replaced by any other). It covers the server's models; not logged training metrics, clients' rows and full "
        "checkpoints (docs/privacy.md)."
    )
    if privacy.secret_seed is not None:
        rank_zero_info("The noise is a function of secret_seed: epsilon holds for those who cannot guess it.")
