"""The picture of the loss's geometry: drawn when a fit has ended, shown to loggers, refused without a monitor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from federations import Classifier, loaders, samples, silent_trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from matplotlib.image import imread

from lightning_fed.callbacks import GeometryReport, NeuralCollapseMonitor, SharpnessMonitor

# Cheap, and on all samples at once.
Quick = partial(SharpnessMonitor, num_batches=1, batch_size=200, trace_samples=2, iterations=5)


def fit(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """Three epochs of a small classifier, from the same start."""
    pl.seed_everything(0, verbose=False)
    trainer = silent_trainer("auto", callbacks=list(callbacks), **settings)
    trainer.fit(Classifier(), *loaders(samples(60)))
    return trainer


@pytest.mark.parametrize("collapse", [True, False])
def test_the_report_is_drawn_whatever_the_order_of_callbacks(collapse: bool, tmp_path: Path) -> None:
    drawn = []
    for order in (1, -1):
        monitors = [Quick(every_n_epochs=2), *([NeuralCollapseMonitor(plots=False)] if collapse else [])]
        trainer = fit(*[GeometryReport(), *monitors][::order], logger=CSVLogger(tmp_path))
        (picture,) = Path(trainer.log_dir).rglob("*.png")
        assert picture.parent.name == "geometry" and picture.name == "geometry.png"
        drawn.append(imread(picture))
    # The last epoch, which `every_n_epochs` leaves to the end of the fit, is in both.
    np.testing.assert_array_equal(*drawn)
    assert drawn[0].shape[:2] == ((960, 1500) if collapse else (540, 1950)) and float(drawn[0][..., :3].std()) > 0.01


class Shown(WandbLogger):
    """Weights & Biases without a run."""

    def __init__(self) -> None:
        self.images: dict[str, list[str]] = {}

    save_dir = name = version = None
    experiment: Any = property(lambda self: None)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.images[key] = images

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...
    def log_graph(self, *args: Any, **kwargs: Any) -> None: ...
    def after_save_checkpoint(self, *args: Any) -> None: ...
    def finalize(self, status: str) -> None: ...


def test_wandb_is_shown_the_report_and_the_directory_can_be_set(tmp_path: Path) -> None:
    logger = Shown()
    fit(Quick(), GeometryReport(str(tmp_path / "here")), logger=logger)
    assert logger.images == {"geometry": [str(tmp_path / "here" / "geometry.png")]}


def test_a_fast_dev_run_writes_nothing(in_tmp_path: Path) -> None:
    fit(Quick(), GeometryReport(), fast_dev_run=True)
    assert not list(in_tmp_path.iterdir())


def test_a_report_without_a_monitor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the Trainer has none: callbacks=\[SharpnessMonitor\(\), GeometryReport"):
        fit(GeometryReport())
