"""The work that ``throughput.py`` and ``scaling.py`` measure: data, networks, and two ways to train the same clients.

``plain`` is the reference: one model, weights copied in place, a ``torch.optim.SGD`` for each client; it knows no data
loader and no hooks. ``federated`` is the same through a Trainer. Both draw the same cohorts and see the same
minibatches in the same order, so their accuracies must agree. Shapes: N = clients, S = samples of a client.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, relu
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.data import FederatedDataset
from lightning_fed.federation.participation import FullParticipation, UniformSample
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.strategies import FedAvgStrategy, GossipStrategy

# glibc gives large activations back to the kernel after every step, unless a process happened to raise its thresholds.
PINNED = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}

# ------------------------------------------------------------------------------------------------------------ networks


def mlp(width: int = 200) -> nn.Sequential:
    """64-200-200-10: 55,210 parameters."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def small_mlp() -> nn.Sequential:
    """32-32-10: 1,386 parameters."""
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def convnet() -> nn.Sequential:
    """LeNet-5 on 3x32x32 with wider convolutions: 96,304 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 96), nn.ReLU(), nn.Linear(96, 50), nn.ReLU(), nn.Linear(50, 10)),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a shortcut, projected where the shape changes."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(4, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(4, outputs),
        )
        changes = stride != 1 or channels != outputs
        self.shortcut = nn.Conv2d(channels, outputs, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return relu(self.body(images) + self.shortcut(images))


def resnet8() -> nn.Sequential:
    """ResNet-8 with GroupNorm on 3x32x32: 78,042 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(4, 16), nn.ReLU()),
        *(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


# ----------------------------------------------------------------------------------------------------------- workloads


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        title: of the table's rows.
        shape: of one input; ``(64,)`` and ``(32,)`` are digits (whole, or every second pixel), images are synthetic.
        cohort: clients active in a round.
        steps: of a client in a round, over its ``steps * batch`` samples in file order.
        clients_per_step: of the vectorized side.
    """

    title: str
    algorithm: Literal["fedavg", "gossip"]
    network: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    clients: int = 100
    cohort: int = 10
    steps: int = 10
    batch: int = 20
    lr: float = 0.1
    rounds: int = 20
    clients_per_step: int = 10
    seed: int = 0

    @property
    def samples(self) -> int:
        """S, of each client."""
        return self.steps * self.batch

    def make_net(self) -> nn.Sequential:
        """The network at its start, the same on every side."""
        torch.manual_seed(self.seed)
        return self.network()

    def cohorts(self, rounds: int) -> Iterator[np.ndarray]:
        """Who takes part, as the strategy draws it."""
        participation = FullParticipation() if self.cohort == self.clients else UniformSample(self.cohort)
        return (participation.cohort(round, self.clients, self.seed) for round in range(rounds))

    def strategy(self, **settings: Any) -> FederatedStrategy:
        """This package's algorithm for it."""
        settings = {"num_clients": self.clients, "seed": self.seed, **settings}
        if self.algorithm == "gossip":
            return GossipStrategy("ring", **settings)
        return FedAvgStrategy(cohort_size=None if self.cohort == self.clients else self.cohort, **settings)


WORKLOADS = {
    "W1": Workload("W1: FedAvg, 10 of 100, MLP", "fedavg", mlp, (64,)),
    "W2": Workload("W2: FedAvg, 10 of 100, CNN", "fedavg", convnet, (3, 32, 32), lr=0.05, rounds=6),
    "W3": Workload("W3: D-PSGD, ring of 100, MLP", "gossip", mlp, (64,), cohort=100, rounds=6),
    "W4": Workload(
        "W4: FedAvg, 100 of 100, small MLP",
        *("fedavg", small_mlp, (32,)),
        cohort=100,
        batch=10,
        rounds=10,
        clients_per_step=100,
    ),
}


class Data(NamedTuple):
    """Inputs ``[N, S, ...]`` and labels ``[N, S]`` of the clients, inputs and labels of the test."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def accuracy(self, net: nn.Module) -> float:
        with torch.no_grad():
            return (net(self.test_x).argmax(1) == self.test_y).float().mean().item()


def make_data(work: Workload, shards: int | None = None) -> Data:
    """Clients of equal size with Dirichlet(0.5) label skew.

    Digits are drawn with replacement and jittered; images are ten smooth patterns under noise.

    Args:
        work: tells shapes and seed.
        shards: different shards; client c has shard ``c % shards``. By default every client has its own.
    """
    draw = np.random.default_rng(work.seed)
    shards = min(shards or work.clients, work.clients)
    classes = np.stack([draw.choice(10, work.samples, p=mix) for mix in draw.dirichlet([0.5] * 10, size=shards)])
    labels = torch.from_numpy(classes)
    noise = torch.Generator().manual_seed(work.seed)
    if len(work.shape) == 1:
        images, targets = digits(draw, work.shape[0])
        chosen = np.empty_like(classes)
        for label in range(10):
            chosen[classes == label] = draw.choice(
                np.flatnonzero(targets[360:] == label) + 360, (classes == label).sum()
            )
        x = images[torch.from_numpy(chosen)]
        x += 0.05 * torch.randn(x.shape, generator=noise)
        return Data(x, labels, images[:360], torch.from_numpy(targets[:360]))
    patterns = interpolate(torch.randn(10, work.shape[0], 8, 8, generator=noise), work.shape[1:], mode="bilinear")
    test_labels = torch.arange(1000) % 10
    x, test_x = (
        torch.randn(*like.shape, *work.shape, generator=noise).add_(patterns[like]) for like in (labels, test_labels)
    )
    return Data(x, labels, test_x, test_labels)


def digits(draw: np.random.Generator, pixels: int) -> tuple[Tensor, np.ndarray]:
    """Shuffled digits ``[1797, pixels]`` in [0, 1], and their labels."""
    known = load_digits()
    order = draw.permutation(len(known.target))
    return torch.from_numpy(known.data[order, :: 64 // pixels].astype(np.float32) / 16), known.target[order]


# ----------------------------------------------------------------------------------------------------------- measuring


class Measured(NamedTuple):
    """One run: milliseconds per client update without the first round, and milliseconds of single rounds.

    Attributes:
        cpu: of this process (of all ranks, where several train), mean over the rounds.
        wall: median over the rounds.
        first: wall time of the first round.
        tenth: that of the tenth, or of the last one if there are fewer.
        setup: wall milliseconds from the call to the first round's start.
        accuracy: of the final model.
    """

    cpu: float
    wall: float
    first: float
    tenth: float
    setup: float
    accuracy: float


class RoundClock(Callback):
    """CPU and wall time at the start of training, and at the end of every round, which is a Lightning epoch here."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.made = perf_counter()
        self.ends: list[tuple[float, float]] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append((process_time(), perf_counter()))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mark()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mark()

    def measured(self, updates: int, accuracy: float) -> Measured:
        """What the marks say of rounds with this many client updates."""
        cpu, wall = (1e3 * np.diff(times) for times in zip(*self.ends))
        setup = 1e3 * (self.ends[0][1] - self.made)
        steady = slice(1, None) if len(wall) > 1 else slice(None)
        each = float(np.mean(cpu[steady])) / updates, median(map(float, wall[steady])) / updates
        return Measured(*each, float(wall[0]), float(wall[:10][-1]), setup, accuracy)


def pin_allocator() -> None:
    """Start this script again with glibc's thresholds pinned and one thread, which both are read at start-up."""
    wanted = {**PINNED, "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def quieten() -> None:
    """One thread, and no messages beside the tables."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def over_ranks(measured: Measured, world: int) -> Measured:
    """With the CPU time of all ranks of the process group; a collective call, if there are several."""
    if world == 1:
        return measured
    cpu = torch.tensor(measured.cpu)
    dist.all_reduce(cpu)
    return measured._replace(cpu=float(cpu))


def alternate(sides: dict[str, Callable[[], Measured]], repeats: int) -> dict[str, list[Measured]]:
    """Run all sides in turn, so that each repeat sees one state of the machine."""
    runs: dict[str, list[Measured]] = {side: [] for side in sides}
    for repeat in range(repeats):
        # Turn the order round, so that drift of the machine favours nobody.
        for side in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            runs[side].append(sides[side]())
    return runs


# ------------------------------------------------------------------------------------------------------ the plain loop


def train_client(work: Workload, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """The plain local update: SGD in file order."""
    optimizer = torch.optim.SGD(net.parameters(), lr=work.lr)
    for start in range(0, work.samples, work.batch):
        optimizer.zero_grad()
        cross_entropy(net(x[start : start + work.batch]), y[start : start + work.batch]).backward()
        optimizer.step()


def plain(work: Workload, data: Data, rounds: int, rank: int = 0, world: int = 1, device: str = "cpu") -> Measured:
    """The reference; with ``world`` above 1, every rank of a process group trains its share of the clients."""
    net, clock = work.make_net().to(device), RoundClock(device)
    train = plain_gossip if work.algorithm == "gossip" else plain_fedavg
    train(work, data, rounds, net, clock, rank, world)
    return over_ranks(clock.measured(work.cohort, data.accuracy(net.cpu())), world)


def plain_fedavg(
    work: Workload, data: Data, rounds: int, net: nn.Module, clock: RoundClock, rank: int, world: int
) -> None:
    """The server's weights are copied into the model, and the client's are added up, in place."""
    weights: list[Tensor] = list(net.parameters())
    server, total = ([weight.detach().clone() for weight in weights] for _ in range(2))
    clock.mark()
    for cohort in work.cohorts(rounds):
        torch._foreach_zero_(total)
        for client in cohort[rank::world] % len(data.x):
            with torch.no_grad():
                torch._foreach_copy_(weights, server)
            train_client(work, net, data.x[client].to(clock.device), data.y[client].to(clock.device))
            with torch.no_grad():
                torch._foreach_add_(total, weights)
        if world > 1:
            for part in total:
                dist.all_reduce(part)
        torch._foreach_copy_(server, torch._foreach_div(total, work.cohort))
        clock.mark()
    with torch.no_grad():
        torch._foreach_copy_(weights, server)


def plain_gossip(
    work: Workload, data: Data, rounds: int, net: nn.Module, clock: RoundClock, rank: int, world: int
) -> None:
    """A matrix whose rows are the nodes' weights; each round every node trains, then the ring mixes them."""
    model = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    nn.utils.vector_to_parameters(model, net.parameters())  # the parameters are views of one vector
    mine = np.array_split(np.arange(work.clients), world)[rank]
    nodes = model.repeat(len(mine), 1)
    clock.mark()
    for _ in range(rounds):
        for row, node in enumerate(mine % len(data.x)):
            model.copy_(nodes[row])
            train_client(work, net, data.x[node].to(clock.device), data.y[node].to(clock.device))
            nodes[row] = model
        before, after = nodes[-1], nodes[0]
        if world > 1:
            ends = [torch.empty_like(nodes[:2]) for _ in range(world)]
            dist.all_gather(ends, torch.stack([nodes[0], nodes[-1]]))
            before, after = ends[rank - 1][1], ends[(rank + 1) % world][0]
        around = torch.cat([before[None], nodes, after[None]])
        nodes = (around[:-2] + around[1:-1] + around[2:]).div_(3)
        clock.mark()
    total = nodes.sum(0)
    if world > 1:
        dist.all_reduce(total)
    model.copy_(total / work.clients)


# --------------------------------------------------------------------------------------------------- through a Trainer


class Learner(LightningModule):
    """The smallest possible step around the network; with ``logs_loss`` it logs its loss at every step."""

    def __init__(self, work: Workload, logs_loss: bool = False) -> None:
        super().__init__()
        self.net = work.make_net()
        self.lr, self.logs_loss = work.lr, logs_loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        if self.logs_loss:
            self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def federated(
    work: Workload,
    data: Data,
    rounds: int,
    devices: int = 1,
    accelerator: str = "cpu",
    logs_loss: bool = False,
    callbacks: list[Callback] | None = None,
    strategy: FederatedStrategy | None = None,
    **settings: Any,
) -> Measured:
    """The same through a Trainer.

    Args:
        strategy: instead of that of the workload.
        **settings: of the workload's strategy, such as ``clients_per_step``.
    """
    module, clock = Learner(work, logs_loss), RoundClock("cuda" if accelerator == "cuda" else "cpu")
    samples = np.arange(data.y.numel()).reshape(data.y.shape)
    indices = list(samples[np.arange(work.clients) % len(samples)])
    dataset = FederatedDataset(TensorDataset(data.x.flatten(0, 1), data.y.flatten()), indices)
    trainer = Trainer(
        strategy=strategy or work.strategy(**settings),
        accelerator=accelerator,
        devices=devices,
        max_epochs=rounds,
        callbacks=[clock, *(callbacks or [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(dataset, work.batch, shuffle=False))
    return over_ranks(clock.measured(work.cohort, data.accuracy(module.net.cpu())), devices)
