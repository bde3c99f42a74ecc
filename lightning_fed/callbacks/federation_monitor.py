"""How far clients disagree, how far a round moves them, and what it costs: logged every round, drawn at the end.

Shapes: N = clients, K = classes, P = trainable parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_fed.callbacks.federation_plots import (
    AGGREGATED,
    JOINED,
    LEFT,
    OFFLINE,
    TRAINED,
    Points,
    draw_bytes,
    draw_labels,
    draw_participation,
    draw_progress,
    draw_topology,
)
from lightning_fed.callbacks.figures import figure_directory, save_figure
from lightning_fed.checks import check_counts, check_flags, check_paths, given
from lightning_fed.data import labels_of
from lightning_fed.federation.algorithm import RoundFacts
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.partition import label_counts
from lightning_fed.topology import Topology

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beyond this, a drawing of the graph is a blot that takes longer than the round.
DRAWABLE_CLIENTS = 200
# Beyond this, a client has less than a row of pixels in the picture of who trained when.
RECORDED_CLIENTS = 1000


class FederationMonitor(Callback):
    """Logs the facts of every round, and draws what a reader of the run asks first.

    Logged when a round's communication is done, whatever ``log_every_n_steps`` says, to all loggers and (as float32)
    for ``EarlyStopping``, ``ModelCheckpoint`` and the progress bar:

    * ``fed/round``: rounds completed; ``fed/cohort_size``: clients that took part in this one;
    * ``fed/consensus_distance``: ``sqrt(mean_i ||x_i - x_bar||^2)``, x_bar the mean of all clients' rows (of the
      cohort's alone, where idle clients keep none: see ``Algorithm.keeps_rows``);
    * ``fed/bytes_sent``: by clients and server since the federation began, as the algorithm counts it;
    * ``fed/update_norm``: how far the consensus model has moved since the last logged round, in the 2-norm;
    * with a virtual clock, ``fed/virtual_seconds``: the time that it shows; ``fed/training_seconds``: local steps of
      all clients until then, added up;
    * what the algorithm tells of its rounds (:meth:`~lightning_fed.federation.algorithm.Algorithm.round_facts`), for
      example ``fed/live_nodes`` in MoDeST.

    Drawn by rank zero: ``labels.png`` (who holds which classes) and ``topology.png`` (up to 200 clients) when training
    begins; when it ends, ``progress.png`` (validation accuracy and consensus distance over rounds), ``bytes.png``
    (accuracy against bytes sent) and, unless all clients took part in all rounds, ``participation.png`` (who trained
    when, up to 1,000 clients). Accuracies are the metrics with "acc" in their name that are known after a
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
        check_paths(**given(directory=directory))
        check_counts(every_n_rounds=every_n_rounds)
        check_flags(plots=plots)
        self.directory = directory
        self.every_n_rounds = every_n_rounds
        self.plots = plots
        self.consensus_distances: Points = []
        self.accuracies: dict[str, Points] = {}
        # For each round, from 1, one number a client: what it did, as bits (see federation_plots).
        self.participation: dict[int, bytes] = {}
        self._model = torch.empty(0)
        self._images: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        federation_of(trainer, self)
        self._model = torch.empty(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = federation_of(trainer, self)
        model = strategy.consensus(strategy.bank.rows.matrix, strategy.exchange)
        self._model = self._model.to(model) if len(self._model) else model.clone()
        self._forget_after(strategy.round)
        if not self.plots or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._images = figure_directory(trainer, "federation", self.directory)
        if trainer.is_global_zero:
            self._draw_setting(trainer, strategy)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = federation_of(trainer, self)
        # The strategy's own callback comes first: rows are mixed and `strategy.round` counts this round.
        if not batch.is_last_of_round:
            return
        cohort = strategy.participation.cohort(batch.round, strategy.num_clients, strategy.seed)
        facts = strategy.round_facts(batch.round)
        if strategy.num_clients <= RECORDED_CLIENTS:
            self.participation[strategy.round] = deeds(strategy.num_clients, cohort, facts)
        if strategy.round % self.every_n_rounds:
            return
        metrics = self._measure(strategy, len(cohort), facts)
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
            "participation": dict(self.participation),
            # Of the last logged round: a run that is resumed within a later one cannot compute it.
            "model": self._model.cpu(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consensus_distances = list(state_dict["consensus_distances"])
        self.accuracies = {name: list(points) for name, points in state_dict["accuracies"].items()}
        self.participation = dict(state_dict["participation"])
        self._model = state_dict["model"]

    def _measure(self, strategy: FederatedStrategy, cohort_size: int, facts: RoundFacts) -> dict[str, float]:
        """The logged facts of a round that has just ended; a collective call."""
        model = strategy.consensus(strategy.bank.rows.matrix, strategy.exchange).clone()
        update_norm, self._model = norm_of_change(self._model, model), model
        distance, sent = strategy.consensus_distance(), strategy.exchange.total_bytes
        self.consensus_distances.append((strategy.round, sent, distance))
        numbers: dict[str, float] = {
            "round": strategy.round,
            "cohort_size": cohort_size,
            "consensus_distance": distance,
            "bytes_sent": sent,
            "update_norm": update_norm,
            **facts.numbers,
            **strategy.measure(strategy.exchange),
        }
        if strategy.clock is not None:
            numbers["virtual_seconds"] = strategy.clock.elapsed
            numbers["training_seconds"] = strategy.clock.training_seconds
        return {f"fed/{name}": value for name, value in numbers.items()}

    def _forget_after(self, round: int) -> None:
        """Drop what an earlier fit of this object did beyond the round from which this one starts."""
        self.consensus_distances = [point for point in self.consensus_distances if point[0] <= round]
        kept = {name: [point for point in points if point[0] <= round] for name, points in self.accuracies.items()}
        self.accuracies = {name: points for name, points in kept.items() if points}
        self.participation = {done: deeds for done, deeds in self.participation.items() if done <= round}

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
        rounds = sorted(self.participation)
        deeds_RN = np.array([np.frombuffer(self.participation[round], dtype=np.uint8) for round in rounds])
        if (deeds_RN != TRAINED).any():
            self._save(trainer, "participation", draw_participation(rounds, deeds_RN.T))

    def _save(self, trainer: Trainer, name: str, figure: Figure) -> None:
        assert self._images is not None
        save_figure(trainer, self._images, f"fed/{name}", figure)


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


def deeds(num_clients: int, cohort: np.ndarray, facts: RoundFacts) -> bytes:
    """What each client did in a round, as bits of one byte."""
    did = np.zeros(num_clients, dtype=np.uint8)
    for deed, clients in (
        (TRAINED, cohort),
        (AGGREGATED, facts.aggregators),
        (JOINED, facts.joined),
        (LEFT, facts.left),
        (OFFLINE, facts.offline),
    ):
        did[np.asarray(clients, dtype=np.int64)] |= deed
    return did.tobytes()


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
