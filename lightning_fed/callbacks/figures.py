"""What all figures of this package share: how they are made, where they go, and how a line looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKED_POINTS = 30


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that no pyplot state knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_line(axes: Axes, x: Any, y: Any, **style: Any) -> None:
    axes.plot(x, y, marker="o" if len(x) <= MARKED_POINTS else None, markersize=4, **style)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def figure_directory(trainer: Trainer, name: str, directory: str | None = None) -> Path:
    """``directory``, or the folder of this name beside the logs; a collective call."""
    default = Path(trainer.log_dir or trainer.default_root_dir) / name
    return default if directory is None else Path(directory)


def save_figure(trainer: Trainer, directory: Path, name: str, figure: Figure) -> Path:
    """Write ``name.png``, and show it under its logged name to the loggers that take images.

    Args:
        trainer: whose loggers.
        directory: of the file; it is made if need be.
        name: for loggers, ``"nc/curves"``; the file is named after the last part.
        figure: to save.

    Returns:
        the file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name.split('/')[-1]}.png"
    figure.savefig(path, dpi=150)
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, global_step=step)
    return path
