"""100 virtual clients in one process: this package against a plain PyTorch loop that does the same work.

FedAvg: 100 clients, cohort 10. Gossip: a ring of 100, everybody active. In both, a round is 10 SGD steps on minibatches
of 20 for each active client, which holds 200 samples, in file order, of the MLP 64-200-200-10. The plain loop has one
model, copies weights in place and makes a ``torch.optim.SGD`` for each client; it knows no data loader and no hooks.

The two sides alternate in one process, after a warm-up run of each, so a pair sees the same allocator, caches and
neighbours. Reported is CPU time per client update, without the first round; the ratio is the median over pairs. Both
sides train the same cohorts on the same minibatches, so their accuracies must agree.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from statistics import median
from time import process_time

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.data import FederatedDataset
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.strategies import FedAvgStrategy, GossipStrategy

CLIENTS, COHORT, STEPS, BATCH, LR, SEED = 100, 10, 10, 20, 0.1, 0
SAMPLES = STEPS * BATCH  # of each client, so a pass is exactly a round
Outcome = tuple[float, nn.Module]  # CPU milliseconds per client update, and the final model


class Mlp(LightningModule):
    """64-200-200-10, 55,210 parameters."""

    def __init__(self, log: bool = False) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
        self.logs_loss = log

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        if self.logs_loss:
            self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


class RoundClock(Callback):
    """CPU time at the end of every round, which is a Lightning epoch here."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends.append(process_time())


def make_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits dealt to clients of equal size with Dirichlet(0.5) label skew, drawn with replacement and jittered.

    Returns:
        Images ``[N, 200, 64]`` and labels ``[N, 200]`` of the clients, images ``[360, 64]`` and labels of the test.
    """
    draw = np.random.default_rng(SEED)
    digits = load_digits()
    order = draw.permutation(len(digits.target))
    images, labels = digits.data[order].astype(np.float32) / 16, digits.target[order]
    by_class = [np.flatnonzero(labels[360:] == label) + 360 for label in range(10)]
    mixes = draw.dirichlet([0.5] * 10, size=CLIENTS)
    classes = np.stack([draw.choice(10, SAMPLES, p=mix) for mix in mixes])
    chosen = np.array([[draw.choice(by_class[label]) for label in client] for client in classes])
    x = images[chosen] + 0.05 * draw.standard_normal((CLIENTS, SAMPLES, 64), dtype=np.float32)
    return tuple(map(torch.from_numpy, (x, labels[chosen], images[:360], labels[:360])))  # type: ignore[return-value]


def train_client(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """The plain local update: 10 steps of SGD in file order."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for start in range(0, SAMPLES, BATCH):
        optimizer.zero_grad()
        cross_entropy(net(x[start : start + BATCH]), y[start : start + BATCH]).backward()
        optimizer.step()


def plain_fedavg(x: Tensor, y: Tensor, rounds: int) -> Outcome:
    """One model; the server's weights are copied in and the client's added up, in place."""
    net = Mlp().net
    weights = list(net.parameters())
    server, total = ([weight.detach().clone() for weight in weights] for _ in range(2))
    ends = []
    for round in range(rounds):
        torch._foreach_zero_(total)
        for client in UniformSample(COHORT).cohort(round, CLIENTS, SEED):
            with torch.no_grad():
                torch._foreach_copy_(weights, server)
            train_client(net, x[client], y[client])
            with torch.no_grad():
                torch._foreach_add_(total, weights)
        torch._foreach_copy_(server, torch._foreach_div(total, COHORT))
        ends.append(process_time())
    with torch.no_grad():
        torch._foreach_copy_(weights, server)
    return 1e3 * (ends[-1] - ends[0]) / (COHORT * (rounds - 1)), net


def plain_gossip(x: Tensor, y: Tensor, rounds: int) -> Outcome:
    """One model, and a matrix whose rows are the nodes' weights; each round every node trains, then all are mixed."""
    net = Mlp().net
    model = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    nn.utils.vector_to_parameters(model, net.parameters())  # the parameters are views of one vector
    nodes = model.repeat(CLIENTS, 1)
    ends = []
    for _ in range(rounds):
        for node in range(CLIENTS):
            model.copy_(nodes[node])
            train_client(net, x[node], y[node])
            nodes[node] = model
        nodes = (nodes + nodes.roll(1, 0) + nodes.roll(-1, 0)).div_(3)
        ends.append(process_time())
    model.copy_(nodes.mean(0))
    return 1e3 * (ends[-1] - ends[0]) / (CLIENTS * (rounds - 1)), net


def federated(strategy: FederatedStrategy, updates: int, x: Tensor, y: Tensor, rounds: int, log: bool) -> Outcome:
    """The same through a Trainer; ``updates`` is the number of client updates in a round."""
    module, clock = Mlp(log), RoundClock()
    indices = list(np.arange(CLIENTS * SAMPLES).reshape(CLIENTS, SAMPLES))
    clients = FederatedDataset(TensorDataset(x.flatten(0, 1), y.flatten()), indices)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=rounds,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(clients, BATCH, shuffle=False))
    return 1e3 * (clock.ends[-1] - clock.ends[0]) / (updates * (rounds - 1)), module.net


def compare(
    name: str, plain: Callable[[], Outcome], ours: Callable[[], Outcome], repeats: int, test: list[Tensor]
) -> str:
    """Alternate the two sides; returns a row of the table."""
    plain(), ours()  # warm up
    runs: list[list[Outcome]] = []
    for repeat in range(repeats):
        # Swap who goes first, so that drift of the machine favours nobody.
        sides = [plain, ours] if repeat % 2 == 0 else [ours, plain]
        outcomes = [side() for side in sides]
        runs.append(outcomes if repeat % 2 == 0 else outcomes[::-1])
    with torch.no_grad():
        accuracies = [(net(test[0]).argmax(1) == test[1]).float().mean().item() for _, net in runs[-1]]
    ratios = [ours[0] / plain[0] for plain, ours in runs]
    times = [median(run[side][0] for run in runs) for side in (0, 1)]
    return (
        f"| {name} | {times[0]:.2f} | {times[1]:.2f} | {median(ratios):.2f} | {min(ratios):.2f} - {max(ratios):.2f} "
        f"| {accuracies[0]:.3f} | {accuracies[1]:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--log", action="store_true", help="our module also logs its loss at every step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x, y, *test = make_data()

    def ours(strategy: type[FederatedStrategy], updates: int, **settings: int) -> Callable[[], Outcome]:
        return lambda: federated(
            strategy(num_clients=CLIENTS, seed=SEED, **settings), updates, x, y, args.rounds, args.log
        )

    print("| work | plain loop, ms | lightning_fed, ms | ratio | spread | accuracy, plain | accuracy, ours |")
    print("|---|---|---|---|---|---|---|")
    fedavg = ours(FedAvgStrategy, COHORT, cohort_size=COHORT)
    print(compare("FedAvg", lambda: plain_fedavg(x, y, args.rounds), fedavg, args.repeats, test), flush=True)
    gossip = ours(GossipStrategy, CLIENTS)
    print(compare("gossip", lambda: plain_gossip(x, y, args.rounds), gossip, args.repeats, test), flush=True)


if __name__ == "__main__":
    main()
