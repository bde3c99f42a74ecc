"""How far clients disagree, how far a round moves them, and what it costs: logged every round, drawn at the end.

Shapes: N = clients, K = classes, P = trainable parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_fed.data import labels_of
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.partition import label_counts
from lightning_fed.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond this, a drawing of the graph is a blot that takes longer than the round.
DRAWABLE_CLIENTS = 200
LOG_SCALE_FROM_RATIO = 30
MARKED_POINTS = 30

Points = list[tuple[int, int, float]]


class FederationMonitor(Callback):
    """Logs the facts of every round, and draws what a reader of the run asks first.

    Logged when a round's communication is done, whatever ``log_every_n_steps`` says, to all loggers and (as float32)
    for ``EarlyStopping``, ``ModelCheckpoint`` and the progress bar:

    * ``fed/round``: rounds completed; ``fed/cohort_size``: clients that took part in this one;
    * ``fed/consensus_distance``: ``sqrt(mean_i ||x_i - x_bar||^2)``, x_bar the mean of all clients' rows;
    * ``fed/bytes_sent``: by clients and server since the federation began, as the algorithm counts it;
    * ``fed/update_norm``: how far the consensus model has moved since the last logged round, in the 2-norm.

    Drawn by rank zero: ``labels.png`` (who holds which classes) and ``topology.png`` (up to 200 clients) when training
    begins, ``progress.png`` (validation accuracy and consensus distance over rounds) and ``bytes.png`` (accuracy
    against bytes sent) when it ends. Accuracies are the metrics with "acc" in their name that are known after a
    validation, except those that begin with "train". Weights & Biases and TensorBoard get the images too. A resumed run
    draws its curves from the first round on.

    Args:
        directory: of the images; by default ``federation`` in the logger's directory, or in the Trainer's
            ``default_root_dir`` if there is no logger.
        every_n_rounds: log every so many rounds; measuring costs two means over all clients, and memory for one row.
        plots: draw images.

    Raises:
        ValueError: if ``every_n_rounds`` is below 1, or (at set-up) if the Trainer's strategy is not a federated one.
    """

    def __init__(self, directory: str | None = None, every_n_rounds: int = 1, plots: bool = True) -> None:
        if every_n_rounds < 1:
            raise ValueError(f"every_n_rounds={every_n_rounds} must be at least 1.")
        self.directory = directory
        self.every_n_rounds = every_n_rounds
        self.plots = plots
        # Points are (round, bytes sent until then, value).
        self.consensus_distances: Points = []
        self.accuracies: dict[str, Points] = {}
        self._model = torch.empty(0)
        self._images: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        federation_of(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = federation_of(trainer, self)
        self._model = strategy.consensus(strategy.bank.rows.matrix, strategy.exchange).clone()
        self._forget_after(strategy.round)
        if not self.plots or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        default = Path(trainer.log_dir or trainer.default_root_dir) / "federation"  # log_dir is a collective call
        self._images = Path(self.directory) if self.directory is not None else default
        if trainer.is_global_zero:
            self._draw_setting(trainer, strategy)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = federation_of(trainer, self)
        # The strategy's own callback comes first: rows are mixed and `strategy.round` counts this round.
        if not batch.is_last_of_round or strategy.round % self.every_n_rounds:
            return
        metrics = self._measure(strategy, batch.round)
        for name, value in metrics.items():
            # As a value of this step, so that monitors see it in the validation that follows.
            pl_module.log(name, float(value), on_step=True, on_epoch=False, logger=False)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": trainer.current_epoch, **metrics}, step=step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        strategy = federation_of(trainer, self)
        for name, value in accuracies_in(trainer).items():
            self.accuracies.setdefault(name, []).append((strategy.round, strategy.exchange.total_bytes, value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model = torch.empty(0)
        if self._images is not None and trainer.is_global_zero:
            self._draw_outcome(trainer)
            rank_zero_info(f"Plots of the federation: {self._images}")
        self._images = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "consensus_distances": list(self.consensus_distances),
            "accuracies": {name: list(points) for name, points in self.accuracies.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consensus_distances = list(state_dict["consensus_distances"])
        self.accuracies = {name: list(points) for name, points in state_dict["accuracies"].items()}

    def _measure(self, strategy: FederatedStrategy, round: int) -> dict[str, float]:
        """The logged facts of a round that has just ended; a collective call."""
        model = strategy.consensus(strategy.bank.rows.matrix, strategy.exchange).clone()
        update_norm, self._model = norm_of_change(self._model, model), model
        distance, sent = strategy.consensus_distance(), strategy.exchange.total_bytes
        self.consensus_distances.append((strategy.round, sent, distance))
        return {
            "fed/round": strategy.round,
            "fed/cohort_size": strategy.participation.cohort(round, strategy.num_clients, strategy.seed).size,
            "fed/consensus_distance": distance,
            "fed/bytes_sent": sent,
            "fed/update_norm": update_norm,
        }

    def _forget_after(self, round: int) -> None:
        """Drop what an earlier fit of this object did beyond the round from which this one starts."""
        self.consensus_distances = [point for point in self.consensus_distances if point[0] <= round]
        kept = {name: [point for point in points if point[0] <= round] for name, points in self.accuracies.items()}
        self.accuracies = {name: points for name, points in kept.items() if points}

    def _draw_setting(self, trainer: Trainer, strategy: FederatedStrategy) -> None:
        counts = known_label_counts(trainer, strategy)
        if counts is None:
            rank_zero_info("FederationMonitor draws no labels.png: the training data does not tell its labels.")
        else:
            self._save(trainer, "labels", draw_labels(counts))
        topology = getattr(strategy, "topology", None)
        if isinstance(topology, Topology) and strategy.num_clients <= DRAWABLE_CLIENTS:
            self._save(trainer, "topology", draw_topology(topology, strategy.num_clients))

    def _draw_outcome(self, trainer: Trainer) -> None:
        if self.consensus_distances:
            self._save(trainer, "progress", draw_progress(self.accuracies, self.consensus_distances))
        if self.accuracies:
            self._save(trainer, "bytes", draw_bytes(self.accuracies))

    def _save(self, trainer: Trainer, name: str, figure: Figure) -> None:
        """Write an image, and show it to the loggers that take images."""
        assert self._images is not None
        self._images.mkdir(parents=True, exist_ok=True)
        path = self._images / f"{name}.png"
        figure.savefig(path, dpi=150)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"fed/{name}", [str(path)], step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(f"fed/{name}", figure, global_step=step)


def federation_of(trainer: Trainer, callback: Callback) -> FederatedStrategy:
    """The Trainer's federated strategy.

    Raises:
        ValueError: if it has another one.
    """
    if not isinstance(trainer.strategy, FederatedStrategy):
        raise ValueError(
            f"{type(callback).__name__} watches the rounds of a federation, but the Trainer's strategy is "
            f"{type(trainer.strategy).__name__}: pass a federated one, for example "
            "Trainer(strategy=GossipStrategy(num_clients=8)), or remove the callback."
        )
    return trainer.strategy


def accuracies_in(trainer: Trainer) -> dict[str, float]:
    """The metrics that measure accuracy on held-out data, as far as a name can tell."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if "acc" in name and not name.startswith("train")
    }


def norm_of_change(before_P: Tensor, after_P: Tensor) -> float:
    return float(torch.linalg.vector_norm((after_P - before_P).float()))


def known_label_counts(trainer: Trainer, strategy: FederatedStrategy) -> np.ndarray | None:
    """Training samples of each client and class, int64 ``[N, K]``; None if nobody knows the labels without a search."""
    try:
        counts = getattr(trainer.datamodule, "label_counts", None)  # type: ignore[attr-defined]
        if counts is not None:
            return np.asarray(counts)
        assert trainer.train_dataloader is not None
        dataset = trainer.train_dataloader.dataset.dataset
        if hasattr(dataset, "client_indices") and hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        if not isinstance(dataset, TensorDataset) and not hasattr(dataset, "targets"):
            return None  # labels_of would read every sample
        labels = labels_of(dataset)
        return label_counts(strategy.shards, labels, int(labels.max()) + 1)
    except ValueError:  # no labels, or no classes: a regression, a language model
        return None


def draw_labels(counts_NK: np.ndarray) -> Figure:
    """A heat map: who holds which classes."""
    from matplotlib.ticker import MaxNLocator

    num_clients, num_classes = counts_NK.shape
    figure = new_figure(width=min(4 + num_clients / 16, 12), height=min(2 + num_classes / 6, 8))
    axes = figure.add_subplot()
    image = axes.imshow(counts_NK.T, aspect="auto", origin="lower", cmap="Blues", vmin=0, interpolation="nearest")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set(xlabel="client", ylabel="class", title=f"Training samples of {num_clients} clients")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="samples").outline.set_visible(False)
    return figure


def draw_topology(topology: Topology, num_clients: int) -> Figure:
    """The graph, large enough for every client to be told from its neighbours."""
    side = 4 + num_clients / 16
    figure = new_figure(side, side)
    axes = topology.plot(num_clients, figure.add_subplot(aspect="equal"))
    axes.title.set_fontsize(4 + 2 * side)
    return figure


def draw_progress(accuracies: dict[str, Points], consensus_distances: Points) -> Figure:
    """Two panels over the same rounds: validation accuracy, and consensus distance."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7, 6 if accuracies else 3.2)
    panels = figure.subplots(2 if accuracies else 1, 1, sharex=True, squeeze=False)[:, 0]
    if accuracies:
        plot_accuracies(panels[0], accuracies, x=0)
    rounds, _, distances = zip(*consensus_distances)
    bottom = panels[-1]
    plot_line(bottom, rounds, distances, color="C3")
    if min(distances) > 0 and max(distances) / min(distances) > LOG_SCALE_FROM_RATIO:
        bottom.set_yscale("log")
    else:
        bottom.set_ylim(bottom=0)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.set(xlabel="round", ylabel="consensus distance\n(norm of parameters)")
    return figure


def draw_bytes(accuracies: dict[str, Points]) -> Figure:
    """What an accuracy costs."""
    from matplotlib.ticker import EngFormatter

    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    plot_accuracies(axes, accuracies, x=1)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlim(left=0)
    axes.set_xlabel("bytes sent by clients and server")
    return figure


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that no pyplot state knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_accuracies(axes: Axes, accuracies: dict[str, Points], x: int) -> None:
    """One line for each metric; ``x`` is the place of the abscissa in a point."""
    for name, points in sorted(accuracies.items()):
        plot_line(axes, [point[x] for point in points], [point[2] for point in points], label=name)
    axes.set_ylabel("validation accuracy")
    if len(accuracies) > 1:
        axes.legend(frameon=False)


def plot_line(axes: Axes, x: Any, y: Any, **style: Any) -> None:
    axes.plot(x, y, marker="o" if len(x) <= MARKED_POINTS else None, markersize=4, **style)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
