"""One picture of where training has led: curvature, the loss around the model, and neural collapse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fed.callbacks.figures import figure_directory, new_figure, plot_line, save_figure
from lightning_fed.callbacks.neural_collapse import NeuralCollapseMonitor
from lightning_fed.callbacks.neural_collapse_plots import Curves
from lightning_fed.callbacks.sharpness_monitor import SharpnessMonitor
from lightning_fed.checks import check_paths, given

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLLAPSE = ("nc1", "nc2", "nc3", "nc4")
Monitor = TypeVar("Monitor", bound=Callback)


class GeometryReport(Callback):
    """Draws ``geometry.png`` when a fit has ended, from what the Trainer's monitors have measured.

    Panels: the top eigenvalue, with the edge of stability; the trace, with its standard error; the loss along the
    ascent direction at the first and at the last measurement; and NC1 to NC4, if the Trainer has a
    :class:`~lightning_fed.callbacks.NeuralCollapseMonitor`. Of two monitors of a kind, the first is drawn. Weights &
    Biases and TensorBoard get the image too. A resumed run draws its curves from the start.

    Args:
        directory: of the image; by default ``geometry`` in the logger's directory, or in the Trainer's
            ``default_root_dir`` if there is no logger.

    Raises:
        ValueError: at the start of the fit, if the Trainer has no ``SharpnessMonitor``.
    """

    def __init__(self, directory: str | None = None) -> None:
        check_paths(**given(directory=directory))
        self.directory = directory
        self._images: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if monitor_of(trainer, SharpnessMonitor) is None:
            raise ValueError(
                "GeometryReport draws what a SharpnessMonitor measures, but the Trainer has none: "
                "callbacks=[SharpnessMonitor(), GeometryReport()]."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._images = figure_directory(trainer, "geometry", self.directory)

    # After `on_train_end`, so that monitors have measured the last model whatever the order of callbacks.
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sharpness = monitor_of(trainer, SharpnessMonitor)
        if self._images is not None and trainer.is_global_zero and sharpness is not None and sharpness.curves:
            collapse = monitor_of(trainer, NeuralCollapseMonitor)
            figure = draw_geometry(sharpness, collapse.curves if collapse is not None else {})
            path = save_figure(trainer, self._images, "geometry", figure)
            rank_zero_info(f"Geometry of the loss: {path}")
        self._images = None


def monitor_of(trainer: Trainer, kind: type[Monitor]) -> Monitor | None:
    """The Trainer's first callback of a kind."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def draw_geometry(monitor: SharpnessMonitor, collapse: Curves) -> Figure:
    """Three panels, or four with curves of neural collapse."""
    drawn = [name for name in COLLAPSE if name in collapse]
    figure = new_figure(10, 6.4) if drawn else new_figure(13, 3.6)
    panels = figure.subplots(2, 2).flat if drawn else figure.subplots(1, 3)
    draw_eigenvalues(panels[0], monitor.curves)
    draw_trace(panels[1], monitor.curves)
    draw_profiles(panels[2], monitor)
    if drawn:
        for name in drawn:
            plot_line(panels[3], *zip(*collapse[name]), label=name.upper())
        # NC4 is zero when all is well, which has no logarithm.
        panels[3].set_yscale("symlog", linthresh=1e-3)
        style(panels[3], "Neural collapse", legend=True)
    return figure


def draw_eigenvalues(axes: Axes, curves: Curves) -> None:
    plot_line(axes, *zip(*curves["top_eigenvalue"]), label="top eigenvalue")
    if "threshold" in curves:
        axes.plot(*zip(*curves["threshold"]), color="0.4", linestyle="--", label="edge of stability")
    values = [value for name in ("top_eigenvalue", "threshold") for _, value in curves.get(name, [])]
    if min(values) > 0:
        axes.set_yscale("log")
    style(axes, "Top Hessian eigenvalue", legend="threshold" in curves)


def draw_trace(axes: Axes, curves: Curves) -> None:
    epochs, values = zip(*curves["trace"])
    errors = [error for _, error in curves["trace_error"]]
    plot_line(axes, epochs, values)
    low, high = ([value + sign * error for value, error in zip(values, errors)] for sign in (-1, 1))
    axes.fill_between(epochs, low, high, alpha=0.25, linewidth=0)
    style(axes, "Trace of the Hessian, and standard error")


def draw_profiles(axes: Axes, monitor: SharpnessMonitor) -> None:
    for (done, losses), colour in zip(monitor.profiles, ("0.5", "C0")):
        plot_line(axes, monitor.radii, losses, color=colour, label=f"epoch {done}")
    axes.axvline(monitor.rho, color="0.8", linestyle=":", zorder=0)
    style(axes, "Loss along the ascent direction", "distance from the model", legend=True)


def style(axes: Axes, title: str, x: str = "epoch", legend: bool = False) -> None:
    axes.set(xlabel=x, title=title)
    if x == "epoch":
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if legend:
        axes.legend(frameon=False)
