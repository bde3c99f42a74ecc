"""Two hand-written loops that train a wave of clients at once, for scale: what a careful author could reach.

``bmm`` writes the network out in batched matrix products (MLPs only); ``vmap`` lets ``torch.func`` do it. Neither has
an optimizer object: SGD is one ``_foreach_add_`` on views of the stacked rows. Shapes: M = clients of a wave, B = its
clients' minibatch, P = parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from workloads import Data, Measured, RoundClock, Workload

# Of each client's own mean loss, from parameters [M, ...], inputs [M, B, ...] and labels [M, B].
Gradients = Callable[[list[Tensor], Tensor, Tensor], list[Tensor]]


def bmm_gradients(net: nn.Sequential) -> Gradients:
    """For linear layers with a bias, and elementwise ones."""

    def gradients(parameters: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        unused = iter(leaves)
        for layer in net:
            if isinstance(layer, nn.Linear):
                weight, bias = next(unused), next(unused)
                x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            else:
                x = layer(x)
        loss = cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        return list(torch.autograd.grad(loss, leaves))

    return gradients


def vmap_gradients(net: nn.Sequential) -> Gradients:
    """For any network that ``torch.func`` takes."""
    names = [name for name, _ in net.named_parameters()]

    def loss(parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(net, dict(zip(names, parameters)), (x,)), y)

    return vmap(grad(loss))


STACKED: dict[str, Callable[[nn.Sequential], Gradients]] = {
    "hand-stacked bmm": bmm_gradients,
    "hand-written vmap": vmap_gradients,
}


def stacked(work: Workload, data: Data, rounds: int, side: str) -> Measured:
    """Train waves of ``work.clients_per_step`` clients; the same cohorts and minibatches as the plain loop."""
    net, clock = work.make_net(), RoundClock()
    gradients = STACKED[side](net)
    server = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    train = stacked_gossip if work.algorithm == "gossip" else stacked_fedavg
    server = train(
        work, data, rounds, server, lambda rows, wave: train_wave(work, data, net, gradients, rows, wave), clock
    )
    nn.utils.vector_to_parameters(server, net.parameters())
    return clock.measured(work.cohort, data.accuracy(net))


def train_wave(
    work: Workload, data: Data, net: nn.Module, gradients: Gradients, rows: Tensor, wave: np.ndarray
) -> None:
    """SGD in file order on the rows ``[M, P]`` of a wave, in place."""
    x, y = data.x[wave], data.y[wave]
    sizes = [parameter.numel() for parameter in net.parameters()]
    parts = zip(rows.split(sizes, dim=1), net.parameters())
    views = [part.unflatten(1, parameter.shape) for part, parameter in parts]
    for start in range(0, work.samples, work.batch):
        minibatch = slice(start, start + work.batch)
        torch._foreach_add_(views, gradients(views, x[:, minibatch], y[:, minibatch]), alpha=-work.lr)


TrainWave = Callable[[Tensor, np.ndarray], None]


def stacked_fedavg(
    work: Workload, data: Data, rounds: int, server: Tensor, train: TrainWave, clock: RoundClock
) -> Tensor:
    clock.mark()
    for cohort in work.cohorts(rounds):
        total = torch.zeros_like(server)
        for start in range(0, work.cohort, work.clients_per_step):
            wave = cohort[start : start + work.clients_per_step]
            rows = server.repeat(len(wave), 1)
            train(rows, wave)
            total += rows.sum(0)
        server = total / work.cohort
        clock.mark()
    return server


def stacked_gossip(
    work: Workload, data: Data, rounds: int, server: Tensor, train: TrainWave, clock: RoundClock
) -> Tensor:
    nodes, everybody = server.repeat(work.clients, 1), np.arange(work.clients)
    clock.mark()
    for _ in range(rounds):
        for start in range(0, work.clients, work.clients_per_step):
            wave = slice(start, start + work.clients_per_step)
            train(nodes[wave], everybody[wave])
        nodes = (nodes + nodes.roll(1, 0) + nodes.roll(-1, 0)).div_(3)
        clock.mark()
    return nodes.mean(0)
