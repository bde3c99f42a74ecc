"""What clients tell their neighbours in a gossip step: their rows, compressed differences, gradient trackers.

Shapes: N = clients, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_fed.federation.exchange import Exchange
from lightning_fed.federation.gradient_step import state_dtype
from lightning_fed.federation.public_copies import PublicCopies
from lightning_fed.federation.robust_mixing import robust_mix_
from lightning_fed.robust import RobustMix

Weights = Callable[[int], np.ndarray]  # of a gossip step, W [N, N]
Proximal = Callable[[Tensor], None]  # on the rows, in place


class GossipMethod:
    """Plain averaging, ``X <- W X``, and the base of the others.

    Args:
        weights: W of a gossip step, counted from the first round on.
        gossip_steps: Q, of each round.
    """

    def __init__(self, weights: Weights, gossip_steps: int) -> None:
        self.weights = weights
        self.gossip_steps = gossip_steps

    def mix(self, rows: Tensor, exchange: Exchange, round: int) -> None:
        """The communication of a round, in place on the rows ``[C, P]``; rounds that were left out do not count."""
        for step in range(round * self.gossip_steps, (round + 1) * self.gossip_steps):
            self.average(rows, exchange, step)

    def average(self, rows: Tensor, exchange: Exchange, step: int) -> None:
        """One gossip step of rows, or of float buffers, as they are."""
        exchange.mix_(rows, self.weights(step))  # X <- W X

    def directions(self, gradients: Tensor, exchange: Exchange, round: int) -> Tensor:
        """What the optimizers take for their gradients, for methods that gather them."""
        return gradients

    def measure(self, exchange: Exchange) -> dict[str, float]:
        """Of the last messages."""
        return {}

    def client_matrices(self) -> dict[str, Tensor]:
        """State of each client, ``[C, P]``."""
        return {}


class RobustGossip(GossipMethod):
    """A robust rule in the place of the weighted mean: ``x_i <- rule({x_j : w_ij != 0 or j = i})``.

    With :class:`~lightning_fed.robust.NearestNeighborAverage`, one local step and SGD with momentum it is MoNNA
    (Farhadkhani et al., ICML 2023).
    """

    def __init__(self, weights: Weights, gossip_steps: int, rule: RobustMix) -> None:
        super().__init__(weights, gossip_steps)
        self.rule = rule

    def average(self, rows: Tensor, exchange: Exchange, step: int) -> None:
        robust_mix_(self.rule, rows, self.weights(step), exchange)


class Choco(GossipMethod):
    """CHOCO-SGD: compressed differences to public copies (Koloskova, Stich, Jaggi 2019, Algorithm 2).

    ``q_i = C(x_i - x_hat_i);  x_hat_j += q_j;  x_i += gamma sum_j w_ij (x_hat_j - x_hat_i)``, Q times a round.
    """

    def __init__(self, weights: Weights, gossip_steps: int, x_hat: PublicCopies, gamma: float) -> None:
        super().__init__(weights, gossip_steps)
        self.x_hat = x_hat
        self.gamma = gamma

    def mix(self, rows: Tensor, exchange: Exchange, round: int) -> None:
        for step in range(round * self.gossip_steps, (round + 1) * self.gossip_steps):
            self.x_hat.publish(rows, exchange, step)
            self.x_hat.mix_(rows, self.gamma)

    def measure(self, exchange: Exchange) -> dict[str, float]:
        return self.x_hat.measure(exchange)

    def client_matrices(self) -> dict[str, Tensor]:
        return self.x_hat.client_matrices("x")


class GradientTracking(GossipMethod):
    """DSGT, and DProxSGT with a proximal operator (Yan et al., ICML 2023, Algorithm 1).

    ``y_i <- sum_j w_ij y_j + g_i^t - g_i^{t-1};  x_i <- prox(x_i - eta y_i);  x_i <- sum_j w_ij x_j``, from y = g = 0
    before the first step. ``x_i - eta y_i`` is the step of the module's optimizer.

    Args:
        weights: W.
        rows: tells C, P, dtype and device.
        proximal: of the regularizer, with the step size of the optimizer.
    """

    def __init__(self, weights: Weights, rows: Tensor, proximal: Proximal) -> None:
        super().__init__(weights, gossip_steps=1)
        self.trackers = torch.zeros_like(rows, dtype=state_dtype(rows))
        self.last_gradients = torch.zeros_like(self.trackers)
        self.proximal = proximal

    def directions(self, gradients: Tensor, exchange: Exchange, round: int) -> Tensor:
        if round > 0:  # before, all trackers are 0
            exchange.mix_(self.trackers, self.weights(round))
        self.track(gradients)
        return self.trackers

    def track(self, gradients: Tensor) -> None:
        """``y <- y + g^t - g^{t-1}``: the mean of y stays the mean of the gradients."""
        self.trackers -= self.last_gradients.sub_(gradients)  # to the bit y + (g^t - g^{t-1}), with no new matrix
        self.last_gradients.copy_(gradients)

    def mix(self, rows: Tensor, exchange: Exchange, round: int) -> None:
        self.proximal(rows)
        exchange.mix_(rows, self.weights(round))

    def client_matrices(self) -> dict[str, Tensor]:
        return {"tracker": self.trackers, "last gradient": self.last_gradients}


class CompressedTracking(GradientTracking):
    """CDProxSGT (Yan et al., ICML 2023, Algorithm 2): trackers, then models, are mixed as in CHOCO-SGD.

    Args:
        weights: W.
        rows: tells C, P, dtype and device.
        proximal: as in :class:`GradientTracking`.
        x_hat: public copies of the models.
        y_hat: public copies of the trackers.
        gamma: mixing rate of both.
    """

    def __init__(
        self,
        weights: Weights,
        rows: Tensor,
        proximal: Proximal,
        x_hat: PublicCopies,
        y_hat: PublicCopies,
        gamma: float,
    ) -> None:
        super().__init__(weights, rows, proximal)
        self.x_hat, self.y_hat, self.gamma = x_hat, y_hat, gamma

    def directions(self, gradients: Tensor, exchange: Exchange, round: int) -> Tensor:
        self.track(gradients)
        self.y_hat.publish(self.trackers, exchange, round)
        self.y_hat.mix_(self.trackers, self.gamma)
        return self.trackers

    def mix(self, rows: Tensor, exchange: Exchange, round: int) -> None:
        self.proximal(rows)
        self.x_hat.publish(rows, exchange, round)
        self.x_hat.mix_(rows, self.gamma)

    def measure(self, exchange: Exchange) -> dict[str, float]:
        of_trackers = self.y_hat.measure(exchange)
        return {**self.x_hat.measure(exchange), **{f"tracker_{name}": value for name, value in of_trackers.items()}}

    def client_matrices(self) -> dict[str, Tensor]:
        copies = {**self.x_hat.client_matrices("x"), **self.y_hat.client_matrices("y")}
        return {**super().client_matrices(), **copies}


class Beer(CompressedTracking):
    """BEER (Zhao, Li, Li, Richtarik, Chi, NeurIPS 2022, Algorithm 1): mixes what is public already, then publishes.

    ``V += gamma (W G - G) + g^t - g^{t-1};  G += C(V - G);  X += gamma (W H - H) - eta V;  H += C(X - H)``, with H and
    G the public copies of X and V, and W acting on clients. The first tracker is not published, as in the paper.
    """

    def directions(self, gradients: Tensor, exchange: Exchange, round: int) -> Tensor:
        self.y_hat.mix_(self.trackers, self.gamma)
        self.track(gradients)
        if round > 0:
            self.y_hat.publish(self.trackers, exchange, round)
        return self.trackers

    def mix(self, rows: Tensor, exchange: Exchange, round: int) -> None:
        self.proximal(rows)
        self.x_hat.mix_(rows, self.gamma)
        self.x_hat.publish(rows, exchange, round)
