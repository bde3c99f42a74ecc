"""CHOCO-SGD, DSGT, DProxSGT, CDProxSGT and BEER as the papers write them, in NumPy, without torch or this package.

W is a ring's, by hand. Shapes: T = rounds, N = clients, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from econtrol_equations import STEPS, Compress, minibatches, top_k
from paper_problem import CLIENTS, ETA, START_P, gradient, local_sgd

State = dict[str, np.ndarray]
RATIO = 0.2


def top_fifth(v_P: np.ndarray) -> np.ndarray:
    return top_k(v_P, RATIO)


def each(compress: Compress, X: np.ndarray) -> np.ndarray:
    return np.stack([compress(x) for x in X])


def ring(X: np.ndarray, t: int = 0) -> np.ndarray:
    """``x_i <- (x_{i-1} + x_i + x_{i+1}) / 3``."""
    return (np.roll(X, 1, axis=0) + X + np.roll(X, -1, axis=0)) / 3


def one_peer_exponential(X: np.ndarray, t: int) -> np.ndarray:
    """``x_i <- (x_i + x_{i-h}) / 2`` with h = 1, 2, 4, 1, 2, 4, ..."""
    return (X + np.roll(X, [1, 2, 4][t % 3], axis=0)) / 2


def soft(X: np.ndarray, threshold: float) -> np.ndarray:
    """The proximal operator of ``threshold ||x||_1``."""
    return np.sign(X) * np.maximum(np.abs(X) - threshold, 0)


def gradients(X: np.ndarray, t: int) -> np.ndarray:
    """Of each client's minibatch of step t."""
    return np.stack([gradient(X[i], *minibatches(i, t, 1)[0]) for i in range(CLIENTS)])


def choco(
    gamma: float,
    work: Callable[[int, int], list] = lambda i, t: minibatches(i, t, 1),
    gossip_steps: int = 1,
    start: float = 0,
    compress: Compress = top_fifth,
    **local: float,
) -> Iterator[State]:
    """Koloskova, Stich, Jaggi 2019, Algorithm 2, with local steps and several communications a round."""
    X = np.tile(START_P, (CLIENTS, 1))
    X_hat = start * X
    for t in range(STEPS):
        X = np.stack([local_sgd(X[i], work(i, t), **local) for i in range(CLIENTS)])
        for _ in range(gossip_steps):
            X_hat = X_hat + each(compress, X - X_hat)
            X = X + gamma * (ring(X_hat) - X_hat)
        yield {"x": X, "x public": X_hat, "x pull": ring(X_hat) - X_hat}


def dsgt(
    average: Callable[[np.ndarray, int], np.ndarray] = ring,
    weight: float = 0,
    theta: float = 0,
    clip: float = np.inf,
    halved_every: int = STEPS + 1,
) -> Iterator[State]:
    """DProxSGT (Yan et al., ICML 2023, Algorithm 1), with ``weight=0`` DSGT; each client may have a heavy ball."""
    X = np.tile(START_P, (CLIENTS, 1))
    y = g = m = np.zeros_like(X)
    for t in range(STEPS):
        g, g_before = gradients(X, t), g
        y = average(y, t) + g - g_before
        short = np.minimum(1, clip / (np.linalg.norm(y, axis=1, keepdims=True) + 1e-6)) if clip < np.inf else 1
        m = theta * m + short * y
        eta = ETA * 0.5 ** (t // halved_every)
        X = average(soft(X - eta * m, eta * weight), t)
        yield {"x": X, "tracker": y, "last gradient": g}


def cdprox(gamma: float, weight: float = 0, start: float = 0) -> Iterator[State]:
    """CDProxSGT (the same paper, Algorithm 2)."""
    X = np.tile(START_P, (CLIENTS, 1))
    y = g = y_hat = np.zeros_like(X)
    x_hat = start * X
    for t in range(STEPS):
        g, g_before = gradients(X, t), g
        y = y + g - g_before
        y_hat = y_hat + each(top_fifth, y - y_hat)
        y = y + gamma * (ring(y_hat) - y_hat)
        X = soft(X - ETA * y, ETA * weight)
        x_hat = x_hat + each(top_fifth, X - x_hat)
        X = X + gamma * (ring(x_hat) - x_hat)
        yield {
            **{"x": X, "tracker": y, "last gradient": g, "x public": x_hat, "x pull": ring(x_hat) - x_hat},
            **{"y public": y_hat, "y pull": ring(y_hat) - y_hat},
        }


def beer(gamma: float, start: float = 0) -> Iterator[State]:
    """BEER (Zhao et al., NeurIPS 2022, Algorithm 1); a round here is its update of X and H and, before, of V and G."""
    X = np.tile(START_P, (CLIENTS, 1))
    H, G, V = start * X, np.zeros_like(X), gradients(X, 0)
    g = V
    for t in range(STEPS):
        yield_before = {"tracker": V, "last gradient": g, "y public": G, "y pull": ring(G) - G}
        X = X + gamma * (ring(H) - H) - ETA * V
        H = H + each(top_fifth, X - H)
        yield {"x": X, "x public": H, "x pull": ring(H) - H, **yield_before}
        g, g_before = gradients(X, t + 1), g
        V = V + gamma * (ring(G) - G) + g - g_before
        G = G + each(top_fifth, V - G)
