"""The training runs that chaos.py interrupts: every strategy on digits, with BatchNorm, dropout and momentum.

A run of one process, or of one rank, is :func:`fit`. It saves a checkpoint every few joint steps, and returns
everything that must be the same, to the bit, whether it was interrupted or not.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_fed import (
    DFedSAMStrategy,
    EControlStrategy,
    FedAvgStrategy,
    GeometricMedian,
    GossipStrategy,
    MoDeSTStrategy,
    SignFlip,
    TrimmedMean,
    UserLevelPrivacy,
)
from lightning_fed.compression import RandK, TopK
from lightning_fed.data import FederatedDataset
from lightning_fed.federation.strategy import FederatedStrategy

CLIENTS, EPOCHS, SAVE_EVERY = 12, 6, 4
SEED, OTHER_SEED = 3, 99
# How long a rank waits for one that does not answer.
TIMEOUT = 20.0
PING_TIMEOUT, RESTART_TIMEOUT = 0.5, 3.0
AT_EVERY_STEP: dict[str, Any] = {"local_steps": 1, "rounds_per_epoch": "pass"}
PRIVACY: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 0.3, "delta": 1e-3}
Outcome = dict[str, Any]


def server_adam(parameters: Any) -> torch.optim.Optimizer:
    # The paper's tau. A bias before BatchNorm has a gradient of rounding errors alone, and torch's eps makes of them
    # steps of full length, which differ on another number of ranks.
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-3)


STRATEGIES: dict[str, Callable[..., FederatedStrategy]] = {
    "FedAvg, cohorts": lambda **s: FedAvgStrategy(cohort_size=6, **s),
    "FedAdam": lambda **s: FedAvgStrategy(server_optimizer=server_adam, **s),
    "FedProx": lambda **s: FedAvgStrategy(mu=0.1, optimizer_state="keep", **s),
    "D-PSGD": lambda **s: GossipStrategy(optimizer_state="keep", **s),
    "D-PSGD, in waves": lambda **s: GossipStrategy(optimizer_state="keep", clients_per_step=4, **s),
    "CHOCO": lambda **s: GossipStrategy(method="choco", gamma=0.4, compressor=TopK(0.3), **s),
    "DSGT": lambda **s: GossipStrategy(method="tracking", **{**AT_EVERY_STEP, **s}),
    "BEER": lambda **s: GossipStrategy(method="beer", compressor=RandK(0.3), **{**AT_EVERY_STEP, **s}),
    "DFedSAM": lambda **s: DFedSAMStrategy(rho=0.05, **s),
    "EControl": lambda **s: EControlStrategy(TopK(0.3), **s),
    "MoDeST": lambda **s: MoDeSTStrategy(sample_size=6, num_aggregators=2, **s),
    "FedAvg, robust": lambda **s: FedAvgStrategy(robust=GeometricMedian(), attack=SignFlip([1]), **s),
    "D-PSGD, robust": lambda **s: GossipStrategy("complete", robust=TrimmedMean(2), attack=SignFlip([1, 6]), **s),
    "FedAvg, private": lambda **s: FedAvgStrategy(cohort_size=6, weighting="uniform", **s),
}
ELASTIC: dict[str, Callable[..., FederatedStrategy]] = {
    "FedAvg": lambda **s: FedAvgStrategy(**s),
    "D-PSGD": lambda **s: GossipStrategy(**s),
    "DFedSAM": lambda **s: DFedSAMStrategy(**s),
    "MoDeST": lambda **s: MoDeSTStrategy(
        sample_size=6,
        num_aggregators=2,
        success_fraction=0.8,
        aggregation_timeout=1.0,
        min_models=1,
        restart_timeout=RESTART_TIMEOUT,
        **s,
    ),
}


@dataclass(frozen=True)
class Run:
    """What the processes of a run are told.

    Attributes:
        strategy: a name in ``STRATEGIES``, or in ``ELASTIC``.
        folder: where it saves.
        ranks: how many.
        resume: ``ckpt_path``.
        epochs: until where.
        keeps_all: every checkpoint, not only the newest and ``last.ckpt``.
        elastic: whether ranks may die without the others.
        pause: seconds that every rank sleeps in an epoch, so that there is time to interrupt it.
    """

    strategy: str
    folder: str
    ranks: int = 1
    resume: str | None = None
    epochs: int = EPOCHS
    keeps_all: bool = False
    elastic: bool = False
    pause: float = 0.0

    @property
    def log(self) -> str:
        """What its processes print."""
        return f"{self.folder}.log"


class Classifier(LightningModule):
    """A small network with everything that has a state: normalization, dropout, momentum, a schedule, metrics.

    Args:
        norm: ``"batch"``, or ``"group"``, which has no statistics.
        counts: whether a torchmetrics object counts in the training step, which waves of clients refuse.
    """

    def __init__(self, norm: str = "batch", counts: bool = True) -> None:
        super().__init__()
        layer = nn.BatchNorm1d(16) if norm == "batch" else nn.GroupNorm(2, 16)
        self.net = nn.Sequential(nn.Linear(64, 16), layer, nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 10))
        self.train_accuracy = MulticlassAccuracy(10, average="micro") if counts else None
        self.val_accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.net(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        if self.train_accuracy is not None:
            self.train_accuracy(logits, labels)
            self.log("train/acc", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", nn.functional.cross_entropy(logits, labels))
        self.log("val/acc", self.val_accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Watch(Callback):
    """Notes where a run begins, and slows it down."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.began: tuple[int, int] | None = None
        self.ended = 0  # epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer.strategy, FederatedStrategy)
        self.began = trainer.global_step, trainer.strategy.round

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = trainer.current_epoch + 1
        time.sleep(self.pause)


def shards() -> tuple[FederatedDataset, TensorDataset]:
    """Digits of twelve clients, 24 to 68 samples each, and 150 samples for validation."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    ends = np.cumsum([24 + 4 * client for client in range(CLIENTS)])
    indices = np.split(np.arange(ends[-1]), ends[:-1])
    return FederatedDataset(TensorDataset(images, labels), indices), TensorDataset(images[1600:1750], labels[1600:1750])


def strategy_of(run: Run, **settings: Any) -> FederatedStrategy:
    """The strategy of a run, new for each fit, with more settings if wanted."""
    federation: dict[str, Any] = {"num_clients": CLIENTS, "timeout": TIMEOUT, **settings}
    if run.elastic:
        return ELASTIC[run.strategy](on_peer_loss="drop", ping_timeout=PING_TIMEOUT, **federation)
    if run.strategy == "FedAvg, private":
        # What is resumed has to find the secret in its checkpoint.
        federation["privacy"] = UserLevelPrivacy(**PRIVACY, secret_seed=None if run.resume else SEED)
    return STRATEGIES[run.strategy](**federation)


def module_of(run: Run) -> Classifier:
    """The module of a run: two strategies refuse a part of it."""
    return Classifier("group" if run.strategy == "FedAvg, private" else "batch", run.strategy != "D-PSGD, in waves")


def trainer_of(run: Run, strategy: FederatedStrategy, *callbacks: Callback, **settings: Any) -> Trainer:
    """A Trainer that prints nothing."""
    return Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=run.ranks,
        max_epochs=run.epochs,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(run: Run) -> Outcome:
    """Train, and tell where that has led. One rank's part of it: a collective call."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seed_everything(SEED if run.resume is None else OTHER_SEED, verbose=False)
    strategy, module, watch = strategy_of(run), module_of(run), Watch(run.pause)
    save = ModelCheckpoint(
        run.folder,
        "{step}",
        save_top_k=-1 if run.keeps_all else 1,
        save_last=True,
        every_n_train_steps=SAVE_EVERY,
    )
    trainer = trainer_of(run, strategy, watch, save)
    data, held_out = shards()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data, 12, shuffle=True), DataLoader(held_out, 64), ckpt_path=run.resume)
    exchange, bank = strategy.exchange, strategy.bank
    if run.elastic:
        return {"epochs": watch.ended, "leads": strategy.is_global_zero, "accuracy": accuracy_of(module, held_out)}
    return {
        "model": torch.cat([value.flatten().double() for value in module.state_dict().values()]).numpy(),
        "present": list(bank.present),
        "rows": bank.rows.matrix.numpy().copy(),
        "buffers": bank.buffers.matrix.numpy().copy(),
        "bytes": (exchange.sent_bytes.tolist(), exchange.server_bytes, exchange.total_bytes),
        "steps": (trainer.global_step, trainer.current_epoch, strategy.round, strategy.joint_index),
        "metrics": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
        "began": watch.began or (trainer.global_step, strategy.round),  # a fit that is over does not begin
        "keeps_rows": strategy.keeps_rows,
        "epochs": watch.ended,
        "warnings": [str(warning.message) for warning in caught],
    }


def accuracy_of(module: Classifier, samples: TensorDataset) -> float:
    """On held out samples."""
    images, labels = samples.tensors
    with torch.no_grad():
        return float((module.eval().net(images).argmax(dim=1) == labels).float().mean())


def joined(ranks: dict[int, Outcome]) -> Outcome:
    """One outcome of all ranks' outcomes: the rows of all clients that have one, by client."""
    names = ("present", "rows", "buffers")
    parts = {name: np.concatenate([ranks[rank][name] for rank in sorted(ranks)]) for name in names}
    order = np.argsort(parts["present"])
    return {**ranks[0], **{name: part[order] for name, part in parts.items()}}


def differences(one: Outcome, other: Outcome, tolerance: float = 0.0) -> list[str]:
    """Which parts of two outcomes differ.

    Args:
        one: of a run that was not interrupted.
        other: of one that was.
        tolerance: 0 asks for the same bits.
    """
    names = ["model", "bytes", "steps"]
    if other["began"][0] < one["steps"][0]:
        names += ["present", "rows", "buffers", "metrics"]
    elif one["keeps_rows"]:
        # Nothing was left to do: Lightning does not measure again what it has measured at the end of the epoch, and
        # rows that only the cohort of a round has are gone with it.
        names += ["present", "rows", "buffers"]
    return [name for name in names if not are_equal(one[name], other[name], tolerance)]


def are_equal(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two parts of outcomes are the same."""
    if isinstance(one, np.ndarray):
        near = np.allclose(one, other, rtol=0, atol=tolerance) if one.shape == other.shape else False
        return near if tolerance else one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        mine, theirs = np.array([*one.values()]), np.array([*other.values()])
        return one.keys() == other.keys() and are_equal(mine, theirs, tolerance)
    return bool(one == other)


def complete_files(folder: str | Path) -> list[Path]:
    """The ordinary files of checkpoints in a folder, the oldest first."""
    return sorted(Path(folder).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
