"""EControl, EF, EF21 and plain compression as the papers write them, in NumPy: it knows neither torch nor this package.

Shapes: N = clients, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from paper_problem import CLASSES, CLIENTS, ETA, FEATURES, HIDDEN, START_P, gradient, local_sgd, pass_over_shard

STEPS = 50
WIDTH = len(START_P)
LAYERS = [HIDDEN * FEATURES, HIDDEN, CLASSES * HIDDEN, CLASSES]

Compress = Callable[[np.ndarray], np.ndarray]
Optimizer = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # (x, h, step) -> x
History = dict[str, np.ndarray]


def top_k(v_P: np.ndarray, ratio: float) -> np.ndarray:
    """The K entries of largest magnitude, K the rounded share of all and at least 1; 0 elsewhere."""
    kept = np.argsort(-np.abs(v_P), kind="stable")[: max(1, round(ratio * len(v_P)))]
    sent = np.zeros_like(v_P)
    sent[kept] = v_P[kept]
    return sent


def top_k_of_layers(v_P: np.ndarray, ratio: float) -> np.ndarray:
    return np.concatenate([top_k(layer, ratio) for layer in np.split(v_P, np.cumsum(LAYERS)[:-1])])


def uncompressed(v_P: np.ndarray) -> np.ndarray:
    return v_P


class Papers:
    """The estimates of the clients' mean vector.

    EControl: Gao, Islamov, Stich, ICLR 2024. EF21: Richtarik, Sokolov, Fatkhullin, NeurIPS 2021. EF: Seide et al. 2014.
    """

    def __init__(self, method: str, compress: Compress, eta: float = 0.1, h0: str = "compressed") -> None:
        self.method, self.compress, self.eta, self.h0 = method, compress, eta, h0
        self.e = self.h_i = self.h = np.zeros(0)
        self.step = 0

    def estimate(self, g_NP: np.ndarray) -> np.ndarray:
        if self.step == 0:
            self.e, self.h_i, self.h = np.zeros_like(g_NP), np.zeros_like(g_NP), np.zeros(g_NP.shape[1])
        sent = np.stack([self.client(i, g) for i, g in enumerate(g_NP)])
        self.step += 1
        if self.method in ("econtrol", "ef21"):
            self.h = self.h + sent.mean(axis=0)
        else:
            self.h = sent.mean(axis=0)
        return self.h

    def client(self, i: int, g: np.ndarray) -> np.ndarray:
        """What client i sends; e and h_i are its own."""
        if self.method == "none":
            return self.compress(g)
        if self.method == "ef":
            sent = self.compress(self.e[i] + g)
            self.e[i] = self.e[i] + g - sent
            return sent
        if self.step == 0 and self.h0 != "zero":
            self.h_i[i] = sent = g if self.h0 == "exact" else self.compress(g)
            return sent
        if self.method == "ef21":
            sent = self.compress(g - self.h_i[i])
        else:
            sent = self.compress(self.eta * self.e[i] + g - self.h_i[i])
            self.e[i] = self.e[i] + g - self.h_i[i] - sent
        self.h_i[i] = self.h_i[i] + sent
        return sent


def sgd(lr: float = ETA, theta: float = 0, clip: float = np.inf, halved_every: int = STEPS + 1) -> Optimizer:
    """Along h, made as short as ``clip`` (torch divides by the norm plus 1e-6)."""
    m: Any = 0.0

    def step(x: np.ndarray, h: np.ndarray, t: int) -> np.ndarray:
        nonlocal m
        h = h * min(1, clip / (np.sqrt(np.sum(h**2)) + 1e-6)) if clip < np.inf else h
        m = theta * m + h
        return x - lr * 0.5 ** (t // halved_every) * m

    return step


def adamw(lr: float, decay: float) -> Optimizer:
    """Loshchilov and Hutter 2019, Algorithm 2, with the decay times the learning rate as torch has it."""
    m: Any = 0.0
    v: Any = 0.0

    def step(x: np.ndarray, h: np.ndarray, t: int) -> np.ndarray:
        nonlocal m, v
        m, v = 0.9 * m + 0.1 * h, 0.99 * v + 0.01 * h**2
        m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.99 ** (t + 1))
        return x - lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * x)

    return step


def minibatches(client: int, first: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """From the client's endless stream of passes over its shard."""
    batches = pass_over_shard(client)
    return [batches[number % len(batches)] for number in range(first, first + count)]


def every_step(papers: Papers, optimizer: Optimizer, accumulated: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """``x <- optimizer(x, h)``, with g_i the gradient of one minibatch or the mean of several."""
    x = START_P
    for t in range(STEPS):
        g = [
            np.mean([gradient(x, *batch) for batch in minibatches(i, t * accumulated, accumulated)], axis=0)
            for i in range(CLIENTS)
        ]
        x = optimizer(x, papers.estimate(np.stack(g)), t)
        yield {"x": x, "e": papers.e.copy(), "h_i": papers.h_i.copy(), "h": papers.h}


def every_round(papers: Papers, local_steps: int | None, server: Optimizer) -> Iterator[dict[str, np.ndarray]]:
    """``g_i = x - y_i`` after some local steps of SGD (None: a pass over the shard)."""
    x = START_P
    for t in range(STEPS):
        work = [
            pass_over_shard(i) if local_steps is None else minibatches(i, t * local_steps, local_steps)
            for i in range(CLIENTS)
        ]
        y_NP = np.stack([local_sgd(x, batches) for batches in work])
        x = server(x, papers.estimate(x - y_NP), t)
        yield {"x": x, "e": papers.e.copy(), "h_i": papers.h_i.copy(), "h": papers.h}


def as_it_is(x: np.ndarray, h: np.ndarray, t: int) -> np.ndarray:
    return x - h
