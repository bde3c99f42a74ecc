"""Simulated time: what local steps and transfers would take on machines and links that differ, without any waiting.

Shapes: N = clients. Seconds are float64. Every rank computes the whole clock from numbers that all ranks know.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_fed.checks import check_numbers, check_paths, given
from lightning_fed.federation.randomness import Stream, derive_seed
from lightning_fed.federation.tables import read_table

# Of no paper: round numbers for a computer at home that trains a small model.
SECONDS_PER_STEP = 0.1
LATENCY = 0.05
BANDWIDTH = 12.5e6  # 100 Mbit/s


class Distribution(ABC):
    """Where a quantity that is not negative comes from."""

    @abstractmethod
    def draw(self, generator: np.random.Generator, size: int) -> np.ndarray:
        """``size`` independent values, float64."""


class Constant(Distribution):
    """The same value everywhere.

    Args:
        value: at least 0.

    Raises:
        ValueError: for a negative value.
    """

    def __init__(self, value: float) -> None:
        check_numbers("[0, inf]", value=value)
        self.value = value

    def draw(self, generator: np.random.Generator, size: int) -> np.ndarray:
        return np.full(size, self.value, dtype=np.float64)


class Uniform(Distribution):
    """Any value of an interval.

    Args:
        low: the smallest value, at least 0.
        high: the largest value.

    Raises:
        ValueError: if the interval is empty, or not in [0, inf).
    """

    def __init__(self, low: float, high: float) -> None:
        check_numbers("[0, inf)", low=low, high=high)
        if low > high:
            raise ValueError(f"Uniform: low={low} and high={high} must be finite, with 0 <= low <= high.")
        self.low = low
        self.high = high

    def draw(self, generator: np.random.Generator, size: int) -> np.ndarray:
        return generator.uniform(self.low, self.high, size)


class LogNormal(Distribution):
    """A value whose logarithm is normal: most are near the median, some are many times larger.

    Args:
        median: above 0.
        sigma: standard deviation of the natural logarithm; two thirds of the values are within a factor
            ``exp(sigma)`` of the median.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(self, median: float, sigma: float) -> None:
        check_numbers("(0, inf)", median=median)
        check_numbers("[0, inf)", sigma=sigma)
        self.median = median
        self.sigma = sigma

    def draw(self, generator: np.random.Generator, size: int) -> np.ndarray:
        return self.median * np.exp(self.sigma * generator.standard_normal(size))


class VirtualClock:
    """What local steps and transfers would take, and each client's own time in the run.

    A message from i to j takes ``latency[i, j] + bytes / min(upload[i], download[j])``. Messages of one sender leave in
    parallel and at its full rate each, and sending does not keep a client from going on. A (virtual) server has
    unlimited bandwidth; its latency from and to a client is drawn like any other, or, with ``latency_csv``, the mean
    of that client's latencies.

    Args:
        seconds_per_step: of one optimizer step of a client; by default 0.1.
        latency: seconds on the way of a message, for each ordered pair; by default 0.05.
        bandwidth: bytes per second, of a client's upload and its download alike; ``inf`` is unlimited; by default
            12.5e6 (100 Mbit/s). The defaults are round numbers of no paper.
        devices_csv: a file with the columns ``client,seconds_per_step,upload,download``, one line a client, instead of
            ``seconds_per_step`` and ``bandwidth``.
        latency_csv: a file with the columns ``from,to,seconds``, instead of ``latency``; one direction of a pair
            stands for both, if the other has no line.

    Attributes:
        now: float64 ``[N]``, each client's own time.
        server_now: the server's.
        training_seconds: local steps of all clients, added up: the *training resources* that a run uses.

    Raises:
        ValueError: if a quantity is given twice, or is out of range; files are read, and checked, at set-up.
    """

    def __init__(
        self,
        seconds_per_step: Distribution | float | None = None,
        latency: Distribution | float | None = None,
        bandwidth: Distribution | float | None = None,
        devices_csv: str | None = None,
        latency_csv: str | None = None,
    ) -> None:
        for name, value, file_name, path in (
            ("seconds_per_step", seconds_per_step, "devices_csv", devices_csv),
            ("bandwidth", bandwidth, "devices_csv", devices_csv),
            ("latency", latency, "latency_csv", latency_csv),
        ):
            if value is not None and path is not None:
                raise ValueError(f"{name} and {file_name}={path!r} both say the same: give one of them.")
        check_paths(**given(devices_csv=devices_csv, latency_csv=latency_csv))
        self.seconds_per_step = as_distribution("seconds_per_step", seconds_per_step, SECONDS_PER_STEP, "[0, inf)")
        self.latency = as_distribution("latency", latency, LATENCY, "[0, inf)")
        self.bandwidth = as_distribution("bandwidth", bandwidth, BANDWIDTH, "(0, inf]")
        self.devices_csv = devices_csv
        self.latency_csv = latency_csv
        self._bound: tuple[int, int] | None = None

    # ------------------------------------------------------------------------------------------------------- set-up

    def bind(self, num_clients: int, seed: int) -> None:
        """Draw or read what is fixed for each client and pair, and begin at 0; nothing happens the second time.

        Raises:
            ValueError: naming the file and line, or the setting, that does not fit.
        """
        if self._bound == (num_clients, seed):
            return
        if self.devices_csv is not None:
            steps, upload, download = read_devices(self.devices_csv, num_clients)
        else:
            steps = self.seconds_per_step.draw(draws("steps", seed), num_clients)
            upload = download = self.bandwidth.draw(draws("bandwidth", seed), num_clients)
        if not np.isfinite(steps).all():
            raise ValueError("seconds_per_step must be finite: a client would never end its first step.")
        if not (upload > 0).all():
            raise ValueError("bandwidth (bytes per second) must be above 0: a transfer would never end.")
        self._seconds_per_step = steps
        # The last entry is the server's.
        self._upload, self._download = np.append(upload, np.inf), np.append(download, np.inf)
        self._latency = self._latencies(num_clients, seed)
        self._bound = num_clients, seed
        self.reset()

    def reset(self) -> None:
        """Set all times to 0."""
        assert self._bound is not None, "a clock is bound to its clients before it runs"
        self.now = np.zeros(self._bound[0])
        self.server_now = 0.0
        self.training_seconds = 0.0

    def _latencies(self, num_clients: int, seed: int) -> np.ndarray:
        """Seconds from row to column ``[N + 1, N + 1]``; the last row and column are the server's."""
        if self.latency_csv is not None:
            return read_latencies(self.latency_csv, num_clients)
        shape = num_clients + 1, num_clients + 1
        if isinstance(self.latency, Constant):
            latency = np.broadcast_to(np.float64(self.latency.value), shape)
        else:
            # Drawn by rows into float32: 4 MB for 1,000 clients, and no larger array on the way.
            latency, generator = np.empty(shape, dtype=np.float32), draws("latency", seed)
            for row in latency:
                row[:] = self.latency.draw(generator, len(row))
        if not np.isfinite(latency).all():
            raise ValueError("latency (seconds) must be finite: a message would never arrive.")
        return latency

    # ---------------------------------------------------------------------------------------------- what things take

    def compute_seconds(self, client: int, local_steps: int) -> float:
        """Seconds that a client takes for some optimizer steps."""
        return float(self._seconds_per_step[client]) * local_steps

    def transfer_seconds(self, sender: int, receiver: int, num_bytes: int) -> float:
        """Seconds until a message between two clients has arrived; 0 to oneself."""
        return float(self._transfer(np.array(sender), np.array(receiver), num_bytes))

    def _transfer(self, senders: np.ndarray, receivers: np.ndarray, num_bytes: int) -> np.ndarray:
        rate = np.minimum(self._upload[senders], self._download[receivers])
        return np.where(senders == receivers, 0.0, self._latency[senders, receivers] + num_bytes / rate)

    @property
    def elapsed(self) -> float:
        """Seconds since the start, of whoever is furthest on."""
        return float(max(self.now.max(), self.server_now))

    # ------------------------------------------------------------------------------------------------ what happens

    def local_work(self, clients: np.ndarray, local_steps: Sequence[int] | np.ndarray) -> None:
        """Clients take optimizer steps, each its own number of them.

        Args:
            clients: int64 ``[cohort]``.
            local_steps: ``[cohort]``, in the order of ``clients``.
        """
        seconds = self._seconds_per_step[clients] * np.asarray(local_steps)
        self.now[clients] += seconds
        self.training_seconds += float(seconds.sum())

    def mixed(self, support_NN: np.ndarray, row_bytes: int) -> None:
        """Synchronous gossip: a client goes on when it has the messages of all its in-neighbours.

        Args:
            support_NN: bool; client i waits for each j with ``support[i, j]``.
            row_bytes: of one message.
        """
        receivers, senders = np.nonzero(support_NN)
        arrivals = self.now[senders] + self._transfer(senders, receivers, row_bytes)
        np.maximum.at(self.now, receivers, arrivals)

    def uploaded(self, clients: np.ndarray, row_bytes: int) -> None:
        """Clients send to the server, which goes on when it has all the messages."""
        server = np.full(len(clients), len(self.now))
        arrivals = self.now[clients] + self._transfer(np.asarray(clients), server, row_bytes)
        self.server_now = float(arrivals.max(initial=self.server_now))

    def downloaded(self, clients: np.ndarray, row_bytes: int) -> None:
        """The server sends to clients, each of which goes on when it has the message."""
        server = np.full(len(clients), len(self.now))
        arrivals = self.server_now + self._transfer(server, np.asarray(clients), row_bytes)
        self.now[clients] = np.maximum(self.now[clients], arrivals)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """All times, and what the clock is bound to: plain values."""
        assert self._bound is not None
        num_clients, seed = self._bound
        return {
            "num_clients": num_clients,
            "seed": seed,
            "now": self.now.tolist(),
            "server_now": self.server_now,
            "training_seconds": self.training_seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`: the devices and links of that seed, and the times."""
        self.bind(state["num_clients"], state["seed"])
        self.now = np.array(state["now"], dtype=np.float64)
        self.server_now = state["server_now"]
        self.training_seconds = state["training_seconds"]


def as_distribution(name: str, value: Distribution | float | None, default: float, interval: str) -> Distribution:
    """A plain number as the distribution that always gives it.

    Raises:
        ValueError: naming the setting, if a number is out of its interval.
    """
    if isinstance(value, Distribution):
        return value
    value = default if value is None else value
    check_numbers(interval, **{name: value})
    return Constant(float(value))


def draws(quantity: str, seed: int) -> np.random.Generator:
    """The random numbers of one quantity of the clock."""
    number = ("steps", "bandwidth", "latency").index(quantity)
    return np.random.default_rng(derive_seed(Stream.CLOCK, seed, number))


def read_devices(path: str, num_clients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds per step, upload and download ``[N]`` (bytes per second) of every client.

    Raises:
        ValueError: for a client that is unknown, named twice or missing, and for numbers out of range.
    """
    columns = "seconds_per_step", "upload", "download"
    devices = np.full((num_clients, len(columns)), np.nan)
    for line in read_table("devices_csv", path, ("client", *columns)):
        client = line.client("client", num_clients)
        if not np.isnan(devices[client, 0]):
            raise line.error(f"client {client} has a line already: keep one of them.")
        devices[client] = [line.values[column] for column in columns]
        if not (0 <= devices[client, 0] < math.inf and devices[client, 1] > 0 and devices[client, 2] > 0):
            raise line.error(
                "seconds_per_step must be finite and at least 0, upload and download (bytes per second) above 0."
            )
    missing = np.flatnonzero(np.isnan(devices[:, 0]))
    if len(missing):
        raise ValueError(
            f"devices_csv={path!r} has no line for clients {missing[:10].tolist()}: add them, or lower "
            f"num_clients={num_clients}."
        )
    seconds, upload, download = devices.T
    return seconds, upload, download


def read_latencies(path: str, num_clients: int) -> np.ndarray:
    """Seconds from row to column ``[N + 1, N + 1]``; the server's, last, are the means of each client's.

    Raises:
        ValueError: for a client that is unknown, a pair that is named twice or missing, and a time out of range.
    """
    latency = np.full((num_clients, num_clients), np.nan, dtype=np.float64)
    for line in read_table("latency_csv", path, ("from", "to", "seconds")):
        pair, seconds = (line.client("from", num_clients), line.client("to", num_clients)), line.values["seconds"]
        if not np.isnan(latency[pair]):
            raise line.error(f"the pair from={pair[0]}, to={pair[1]} has a line already: keep one of them.")
        if not 0 <= seconds < math.inf:
            raise line.error(f"seconds={seconds:g} must be finite and at least 0.")
        latency[pair] = seconds
    latency = np.where(np.isnan(latency), latency.T, latency)
    np.fill_diagonal(latency, 0.0)
    missing = np.argwhere(np.isnan(latency))
    if len(missing):
        raise ValueError(
            f"latency_csv={path!r} has no line between clients {missing[0][0]} and {missing[0][1]}: add one direction "
            f"of every pair, or lower num_clients={num_clients}."
        )
    others = max(num_clients - 1, 1)
    complete = np.zeros((num_clients + 1, num_clients + 1))
    complete[:-1, :-1] = latency
    complete[:-1, -1] = latency.sum(axis=1) / others
    complete[-1, :-1] = latency.sum(axis=0) / others
    return complete
