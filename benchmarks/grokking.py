"""Grokfast on modular addition, with the controls that tell what the filter does from what its side effects do.

(a + b) mod 47, half of the 2,209 pairs for training; one embedding of 64 numbers for both operands, a hidden layer of
128, no bias at the output: 25,536 parameters. Adam with beta2 0.98 and an L2 penalty. "Steps" is the first evaluation
with 95 % validation accuracy: every 20 steps with the full batch, every 40 with minibatches; where it is not reached,
the last accuracy stands beside it. The seed decides split, initialization and order; every row of a seed starts from
the same weights. Cost is CPU time of the median step inside a Trainer; sides alternate, and a ratio is the median over
pairs.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from time import process_time
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_fed.callbacks import Grokfast, OrthogonalGradient
from lightning_fed.data import ModularArithmeticDataModule
from lightning_fed.modules import ModularClassifier


class Silent(ModularClassifier):
    """Logs nothing: a step takes a fraction of a millisecond, and there are hundreds of thousands."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


class FirstReach(Callback):
    """Ends the fit when validation accuracy reaches 95 %.

    Attributes:
        step: of that; None before.
        curve: steps and validation accuracies.
    """

    def __init__(self, data: ModularArithmeticDataModule, every: int) -> None:
        self.data, self.every = data, every
        self.step: int | None = None
        self.curve: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every:
            return
        with torch.no_grad():
            logits = pl_module(self.data.val.pairs)
        accuracy = float((logits.argmax(dim=1) == self.data.val.results).float().mean())
        self.curve.append((trainer.global_step, accuracy))
        if accuracy >= 0.95:
            self.step, trainer.should_stop = trainer.global_step, True


class Row(NamedTuple):
    """What is trained, and with which callback."""

    name: str
    lr: float
    l2: float
    callback: Callable[[], Callback] | None = None
    max_steps: int = 10_000
    batch_size: int | None = None
    decoupled: bool = False
    loss: Literal["cross_entropy", "stable_max"] = "cross_entropy"
    embedding_std: float | None = None


EMA = partial(Grokfast, alpha=0.98, lamb=2.0)
FULL_BATCH = [
    Row("Adam, no weight decay", 1e-3, 0.0),
    Row("Adam, L2 0.005", 1e-3, 0.005, None, 30_000),
    Row("Grokfast-EMA 0.98/2, L2 0.005", 1e-3, 0.005, EMA),
    Row("control: Adam, L2 0.005/3", 1e-3, 0.005 / 3),
    Row("Grokfast-MA 100/5, L2 0.005", 1e-3, 0.005, partial(Grokfast, "ma", window=100, lamb=5.0)),
    Row("control: Adam, L2 0.005/6", 1e-3, 0.005 / 6),
    Row("Grokfast-EMA, no weight decay", 1e-3, 0.0, EMA),
    Row("AdamW, decay 1", 1e-3, 1.0, decoupled=True),
    Row("embedding from N(0, 1): Adam, L2 0.005", 1e-3, 0.005, embedding_std=1.0),
    Row("embedding from N(0, 1): Grokfast-EMA, L2 0.005", 1e-3, 0.005, EMA, embedding_std=1.0),
    Row("OrthogonalGradient, lr 5e-3, no weight decay", 5e-3, 0.0, OrthogonalGradient),
    Row("control: Adam, lr 5e-3, no weight decay", 5e-3, 0.0),
    Row("StableMax, lr 1e-2, no weight decay", 1e-2, 0.0, loss="stable_max"),
]
MINIBATCH = [
    Row("Adam, lr 3e-4, L2 0.002", 3e-4, 2e-3, None, 90_000, 32),
    Row("the same with Grokfast-EMA 0.99/10", 3e-4, 2e-3, partial(Grokfast, alpha=0.99, lamb=10.0), 90_000, 32),
    Row("control: Adam, lr 3e-4 x 11, L2 0.002", 3.3e-3, 2e-3, None, 90_000, 32),
    Row("control: Adam, lr 3e-4, L2 0.002/11", 3e-4, 2e-3 / 11, None, 30_000, 32),
    Row("Adam, lr 1e-2, L2 0.0005", 1e-2, 5e-4, None, 30_000, 32),
    Row("the same with Grokfast-EMA 0.98/2", 1e-2, 5e-4, EMA, 30_000, 32),
]
WARM_UP_STEPS = 150  # also of a ring of 100
DRAWN = {"full batch": FULL_BATCH[1:4], "batches of 32, lr 3e-4": MINIBATCH[:3]}


def fit(module: LightningModule, data: ModularArithmeticDataModule, max_steps: int, callbacks: list[Callback]) -> None:
    """One silent fit on a CPU."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)


def first_reach(row: Row, seed: int) -> FirstReach:
    """Train one row with one seed."""
    steps = 100 if row.batch_size is None else 1
    data = ModularArithmeticDataModule(47, batch_size=row.batch_size, steps_per_epoch=steps, seed=seed)
    seed_everything(seed, verbose=False)
    module = Silent(47, lr=row.lr, weight_decay=row.l2, decoupled=row.decoupled, loss=row.loss)
    if row.embedding_std is not None:
        torch.nn.init.normal_(module.layers[0].weight, std=row.embedding_std)
    watch = FirstReach(data, every=20 if row.batch_size is None else 40)
    fit(module, data, row.max_steps, [watch] if row.callback is None else [row.callback(), watch])
    return watch


def steps_of(row: Row, runs: list[FirstReach]) -> str:
    """A row of the table."""
    each = [f"{run.step:,}" if run.step else f"> {row.max_steps:,} ({run.curve[-1][1]:.0%})" for run in runs]
    return f"| {row.batch_size or 'full'} | {row.name} | {' / '.join(each)} |"


def draw(curves: dict[Row, list[tuple[int, float]]], path: str) -> None:
    """Validation accuracy over steps, for seed 0."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, 2, sharey=True), DRAWN.items()):
        for row, style in zip(rows, (("0.5", "-"), ("C3", "-"), ("C0", "--"))):
            axes.plot(*zip(*curves[row]), color=style[0], linestyle=style[1], label=row.name)
        axes.axhline(0.95, color="0.8", linewidth=0.8, zorder=0)
        axes.set(title=title, xscale="log", xlabel="optimizer steps", xlim=(100, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.axes[0].set_ylabel("validation accuracy")
    figure.savefig(path, dpi=110)


class StepClock(Callback):
    """CPU time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(process_time())


def milliseconds(width: int, batch_size: int | None, callbacks: list[Callback], steps: int) -> float:
    """CPU time of the median step of a network with ``width`` numbers an operand and twice as many hidden units."""
    torch.manual_seed(0)
    data = ModularArithmeticDataModule(97, batch_size=batch_size, steps_per_epoch=1 if batch_size else 100)
    clock = StepClock()
    fit(Silent(97, embedding_size=width, hidden_size=2 * width), data, WARM_UP_STEPS + steps, [*callbacks, clock])
    return 1e3 * median(end - start for start, end in pairwise(clock.ends[WARM_UP_STEPS - 1 :]))


def cost(name: str, width: int, batch_size: int | None, make: Callable[[], Callback], args: argparse.Namespace) -> str:
    """A row of the table of costs."""
    steps, pairs = args.steps if width == 64 and batch_size else args.steps // 4, []
    for repeat in range(args.repeats + 1):
        sides = [False, True] if repeat % 2 else [True, False]
        times = {has: milliseconds(width, batch_size, [make()] if has else [], steps) for has in sides}
        pairs.append((times[False], times[True]))
    pairs = pairs[1:]  # the first pair warms up
    ratios = [ours / plain for plain, ours in pairs]
    plain, ours = (median(times) for times in zip(*pairs))
    size = f"{sum(p.numel() for p in ModularClassifier(97, width, 2 * width).parameters()):,}"
    spread = f"{min(ratios):.3f} - {max(ratios):.3f}"
    return f"| {size} | {batch_size or 'full'} | {name} | {plain:.3f} | {ours:.3f} | {median(ratios):.3f} | {spread} |"


def print_costs(args: argparse.Namespace) -> None:
    """The table of costs."""
    print("| parameters | batch | callback | plain, ms | with it, ms | ratio | spread |")
    print("|---|---|---|---|---|---|---|")
    kinds = {"Grokfast-EMA": Grokfast, "Grokfast-MA 100": partial(Grokfast, "ma"), "perp-grad": OrthogonalGradient}
    for width, batch_size in ((64, 32), (256, 256)):
        for name, make in kinds.items():
            print(cost(name, width, batch_size, make, args), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["full", "minibatch", "cost", "all"], default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--plot", metavar="PATH", help="draw the main rows of seed 0 instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.plot:
        draw({row: first_reach(row, seed=0).curve for rows in DRAWN.values() for row in rows}, args.plot)
        return
    if args.part in ("cost", "all"):
        print_costs(args)
    rows = {"full": FULL_BATCH, "minibatch": MINIBATCH, "cost": [], "all": FULL_BATCH + MINIBATCH}[args.part]
    if not rows:
        return
    print(f"| batch | training | steps to 95 %, seeds 0 to {args.seeds - 1} |")
    print("|---|---|---|")
    for row in rows:
        print(steps_of(row, [first_reach(row, seed) for seed in range(args.seeds)]), flush=True)


if __name__ == "__main__":
    main()
