"""At which noise levels a diffusion model errs, and how far a student's samples are from the teacher's.

Shapes: B = samples of a step, K = bins of noise levels, R = bins of the density ratio.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_fed.callbacks.drawn_samples import diffusion_module, speaks
from lightning_fed.callbacks.feature_pass import is_elastic
from lightning_fed.callbacks.figures import figure_directory, new_figure, plot_line, save_figure
from lightning_fed.checks import check_counts, check_flags, check_names, check_paths, given
from lightning_fed.federation.running_values import EpochSums
from lightning_fed.federation.strategy import FederatedStrategy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Steps whose numbers wait on the device, so that not every step waits for the device.
WAITING_STEPS = 64
# log r from -10 to 10, as far as f-distill lets it go.
RATIO_LIMIT, RATIO_BINS = 10.0, 80
DRAWN_EPOCHS = 5


class DiffusionMonitor(EpochSums, Callback):
    """Logs the loss by noise level in every epoch, and draws it, and the density ratio of distillation, at the end.

    Reads ``last_step`` of a diffusion module after every training step. Its noise levels are sorted into bins of equal
    width in log sigma, from ``sigma_min`` to ``sigma_max``; the outer ones have no end. Logged at the end of an epoch,
    for each bin that had a sample: ``noise/loss_0.13``, the mean loss around sigma = 0.13, with the weighting of
    training; and where steps tell a ``weight`` (h of f-distill, with mean 1), ``noise/weight_0.13``.

    Drawn by rank zero when training ends: ``loss_by_noise.png`` (a line an epoch, up to five epochs), and where steps
    tell a ``log_ratio``, ``density_ratio.png``: its histogram in the first and the last epoch, and the mean weight by
    noise level. Weights & Biases and TensorBoard get the images too. In a federation these are the losses of the
    clients' own local steps. Ranks are added up; of an elastic federation rank zero speaks for its own clients.

    Args:
        bins: of noise levels, K.
        prefix: of the logged names. Two monitors need two.
        directory: of the images; by default ``diffusion`` in the logger's directory, or in the Trainer's
            ``default_root_dir`` if there is no logger.
        plots: draw images.

    Raises:
        ValueError: if there are no bins; at the start of the fit, if the module is no diffusion module.
    """

    def __init__(self, bins: int = 10, prefix: str = "noise", directory: str | None = None, plots: bool = True) -> None:
        check_counts(bins=bins)
        check_names(prefix=prefix)
        check_paths(**given(directory=directory))
        check_flags(plots=plots)
        self.bins, self.prefix, self.directory, self.plots = bins, prefix, directory, plots
        # For each logged name without prefix, (epochs done, value).
        self.curves: dict[str, list[tuple[int, float]]] = {}
        # Of the first and of the last epoch with ratios: epochs done, and how many samples are in each bin of log r.
        self.ratios: list[tuple[int, list[int]]] = []
        self._edges = np.empty(0)
        self._sums = Sums(bins)
        self._waiting: list[dict[str, Tensor]] = []
        self._seen: dict[str, Tensor] = {}
        self._images: Path | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._sums, self._waiting = Sums(self.bins), []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        denoiser = diffusion_module(pl_module, self).denoiser
        self._edges = np.geomspace(denoiser.sigma_min, denoiser.sigma_max, self.bins + 1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch
        kept = {name: [point for point in points if point[0] <= done] for name, points in self.curves.items()}
        self.curves = {name: points for name, points in kept.items() if points}
        self.ratios = [ratios for ratios in self.ratios if ratios[0] <= done]
        self._seen = diffusion_module(pl_module, self).last_step
        if isinstance(trainer.strategy, FederatedStrategy) or not trainer.is_global_zero:
            self._sums = Sums(self.bins)  # a federation gives each rank its own sums back
        self._images = None
        if self.plots and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._images = figure_directory(trainer, "diffusion", self.directory)

    # Clients of a federation take their steps one after another between two batches, so this is where each is seen.
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._look(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With automatic optimization there is nothing new, unless SAM has evaluated the step a second time.
        if not pl_module.automatic_optimization:
            self._look(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add_waiting()
        sums, self._sums = self._sums, Sums(self.bins)
        if not speaks(trainer):
            return
        if not is_elastic(trainer):
            total = trainer.strategy.reduce(sums.vector.to(pl_module.device), reduce_op="sum")
            sums.vector = torch.as_tensor(total).cpu()
        done = trainer.current_epoch + 1
        for name, values in (("loss", sums.losses), ("weight", sums.weights)):
            for centre, value in zip(self.centres, values.tolist()):
                if not math.isnan(value):
                    self._log(trainer, pl_module, f"{name}_{centre:.2g}", value, done)
        counts = sums.ratios.long().tolist()
        if any(counts):
            self.ratios = [*self.ratios[:1], (done, counts)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._images is not None and trainer.is_global_zero and self.curves:
            save_figure(trainer, self._images, f"{self.prefix}/loss_by_noise", draw_losses(self.curves))
            if self.ratios:
                save_figure(
                    trainer, self._images, f"{self.prefix}/density_ratio", draw_ratios(self.ratios, self.curves)
                )
            rank_zero_info(f"Plots of diffusion training: {self._images}")
        self._images, self._waiting, self._seen = None, [], {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "curves": {name: list(points) for name, points in self.curves.items()},
            "ratios": [(done, list(counts)) for done, counts in self.ratios],
            "sums": self.running_sums(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {name: list(points) for name, points in state_dict["curves"].items()}
        self.ratios = [(done, list(counts)) for done, counts in state_dict["ratios"]]
        self.add_running_sums(state_dict["sums"])

    def running_sums(self) -> Tensor:
        self._add_waiting()
        return self._sums.vector.clone()

    def add_running_sums(self, sums: Tensor) -> None:
        if len(sums) == len(self._sums.vector):  # else they are of other bins
            self._sums.vector += sums

    @property
    def centres(self) -> list[float]:
        """The middle of each bin of noise levels."""
        return np.sqrt(self._edges[1:] * self._edges[:-1]).tolist()

    def _look(self, module: LightningModule) -> None:
        """Put aside the last step, if it is a new one."""
        step = diffusion_module(module, self).last_step
        if step is self._seen or not step:
            return
        self._seen = step
        self._waiting.append({name: step[name] for name in ("sigma", "loss", "weight", "log_ratio") if name in step})
        if len(self._waiting) == WAITING_STEPS:
            self._add_waiting()

    def _add_waiting(self) -> None:
        for step in self._waiting:
            self._sums.add({name: value.detach().double().cpu() for name, value in step.items()}, self._edges)
        self._waiting = []

    def _log(self, trainer: Trainer, module: LightningModule, name: str, value: float, done: int) -> None:
        self.curves.setdefault(name, []).append((done, value))
        # Ranks have the same value already; sync_dist keeps Lightning from asking for it.
        sync = not is_elastic(trainer)
        module.log(f"{self.prefix}/{name}", value, on_step=False, on_epoch=True, sync_dist=sync)


class Sums:
    """What is added up in an epoch: one vector, which ranks can add up in turn.

    Args:
        bins: K.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.vector = torch.zeros(4 * bins + RATIO_BINS, dtype=torch.float64)

    def add(self, step: dict[str, Tensor], edges: np.ndarray) -> None:
        """Add one step, float64 ``[B]`` on the CPU each."""
        places = torch.bucketize(step["sigma"], torch.from_numpy(edges[1:-1]))
        for row, name in ((0, "loss"), (2, "weight")):
            if name in step:
                ones = torch.ones_like(step[name])
                self.vector.index_add_(0, row * self.bins + places, step[name])
                self.vector.index_add_(0, (row + 1) * self.bins + places, ones)
        if "log_ratio" in step:
            limited = step["log_ratio"].clamp(-RATIO_LIMIT, RATIO_LIMIT)  # NaN stays, and is in no bin
            self.ratios.add_(torch.histc(limited, RATIO_BINS, -RATIO_LIMIT, RATIO_LIMIT))

    @property
    def losses(self) -> Tensor:
        """The mean loss in each bin, ``[K]``; NaN where there was none."""
        return self.vector[: self.bins] / self.vector[self.bins : 2 * self.bins]

    @property
    def weights(self) -> Tensor:
        """The mean weight in each bin, ``[K]``."""
        return self.vector[2 * self.bins : 3 * self.bins] / self.vector[3 * self.bins : 4 * self.bins]

    @property
    def ratios(self) -> Tensor:
        """How many samples are in each bin of log r, ``[R]``."""
        return self.vector[4 * self.bins :]


def by_noise(curves: dict[str, list[tuple[int, float]]], name: str) -> dict[int, list[tuple[float, float]]]:
    """From curves over epochs to, for each epoch, (noise level, value) in ascending order."""
    levels: dict[int, list[tuple[float, float]]] = {}
    for key, points in curves.items():
        kind, _, centre = key.partition("_")
        for done, value in points if kind == name else []:
            levels.setdefault(done, []).append((float(centre), value))
    return {done: sorted(levels[done]) for done in sorted(levels)}


def draw_losses(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Mean loss over noise level, of the first, the last and some epochs between."""
    from matplotlib import colormaps

    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    levels = by_noise(curves, "loss")
    epochs = list(levels)
    chosen = sorted({epochs[round(place)] for place in np.linspace(0, len(epochs) - 1, DRAWN_EPOCHS)})
    for number, done in enumerate(chosen):
        shade = colormaps["viridis"](0.9 - 0.9 * (number + 1) / len(chosen))
        plot_line(axes, *zip(*levels[done]), color=shade, label=f"epoch {done}")
    axes.set(xlabel="noise level", ylabel="mean loss", title="Loss by noise level", xscale="log")
    if all(value > 0 for done in chosen for _, value in levels[done]):
        axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def draw_ratios(ratios: list[tuple[int, list[int]]], curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """The histogram of log r in the first and the last epoch; the mean weight by noise level, if there is one."""
    weights = by_noise(curves, "weight")
    figure = new_figure(10 if weights else 6, 4)
    panels = figure.subplots(1, 2 if weights else 1, squeeze=False)[0]
    edges = np.linspace(-RATIO_LIMIT, RATIO_LIMIT, RATIO_BINS + 1)
    for (done, counts), colour in zip(ratios[-2:], ("0.7", "C0") if len(ratios) > 1 else ("C0",)):
        shares = np.array(counts) / sum(counts)
        panels[0].stairs(shares, edges, fill=True, alpha=0.6, color=colour, label=f"epoch {done}")
    used = edges[:-1][np.sum([counts for _, counts in ratios[-2:]], axis=0) > 0]
    panels[0].set_xlim(min(used[0], -1), max(used[-1] + edges[1] - edges[0], 1))
    panels[0].axvline(0, color="0.4", linestyle="--", linewidth=1)
    panels[0].set(xlabel="log of the density ratio, real over fake", ylabel="share of samples", title="Density ratio")
    panels[0].legend(frameon=False)
    if weights:
        done = list(weights)[-1]
        plot_line(panels[1], *zip(*weights[done]))
        panels[1].set(xlabel="noise level", title=f"Mean weight h, epoch {done}", xscale="log")
    return figure
