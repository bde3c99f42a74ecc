"""The examples of the pages on callbacks, metrics and optimizers run as they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from documentation import ROOT, example, execute
from federations import Classifier, clients, loaders
from lightning.pytorch import Trainer

from lightning_fed.callbacks import GeometryReport, Grokfast, SharpnessMonitor
from lightning_fed.cli import FederatedCLI

DOCS = ROOT / "docs"


def test_the_callbacks_of_the_readme_train_together(in_tmp_path: Path) -> None:
    trainer: Trainer = execute(ROOT / "README.md", example(ROOT / "README.md", "callbacks"))["trainer"]
    trainer.fit_loop.max_epochs = 5
    trainer.fit(Classifier(), *loaders(clients(4)))
    assert {"sharpness/top_eigenvalue", "nc/nc1", "sam/sharpness"} <= set(trainer.callback_metrics)
    assert list(in_tmp_path.rglob("geometry.png"))


def test_the_examples_of_sharpness_aware_minimization_train(in_tmp_path: Path) -> None:
    names = execute(DOCS / "sharpness.md", example(DOCS / "sharpness.md", "sharpness"))
    for trainer in (names["trainer"], names["federated"]):
        trainer.fit(Classifier(), *loaders(clients(4)))
        assert trainer.callback_metrics["sam/fallbacks"] == 0 and trainer.callback_metrics["sam/rho"] in (0.05, 0.1)
    assert names["trainer"].callback_metrics["sam/sharpness"] > 0


def test_the_example_of_the_losss_geometry_trains(in_tmp_path: Path) -> None:
    trainer = execute(DOCS / "geometry.md", example(DOCS / "geometry.md", "geometry"))["trainer"]
    metrics = trainer.callback_metrics
    assert metrics["sharpness/top_eigenvalue"] > 1 and 0 < metrics["sharpness/stability"] < 3
    assert list(in_tmp_path.rglob("geometry.png")) and list(in_tmp_path.rglob("gram.png"))


@pytest.mark.parametrize("name", ["neural_collapse", "neural_collapse_metrics", "equiangular_head"])
def test_the_examples_of_neural_collapse_run(name: str, in_tmp_path: Path) -> None:
    execute(DOCS / "neural_collapse.md", example(DOCS / "neural_collapse.md", name))


def test_the_settings_of_the_monitors_are_read(in_tmp_path: Path) -> None:
    (block,) = example(DOCS / "geometry.md", "geometry", "yaml")
    Path("config.yaml").write_text(block)
    classes = ["--model", "ImageClassifier", "--data", "DigitsDataModule", "--trainer.accelerator", "cpu"]
    trainer = FederatedCLI(["--config", "config.yaml", *classes], run=False).trainer
    (monitor,) = [callback for callback in trainer.callbacks if isinstance(callback, SharpnessMonitor)]
    assert (monitor.every_n_epochs, monitor.batch_size) == (5, 512)
    assert any(isinstance(callback, GeometryReport) for callback in trainer.callbacks)


@pytest.mark.slow
def test_the_example_of_grokking_generalizes(in_tmp_path: Path) -> None:
    trainer = execute(DOCS / "grokking.md", example(DOCS / "grokking.md", "grokking"))["trainer"]
    assert trainer.callback_metrics["val/acc"] > 0.95


def test_the_settings_of_grokking_are_read(in_tmp_path: Path) -> None:
    (block,) = example(DOCS / "grokking.md", "grokking", "yaml")
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu", **yaml.safe_load(block)}}))
    classes = ["--model", "ModularClassifier", "--data", "ModularArithmeticDataModule"]
    trainer = FederatedCLI(["--config", "config.yaml", *classes], run=False).trainer
    grokfast = next(callback for callback in trainer.callbacks if isinstance(callback, Grokfast))
    assert (grokfast.filter, grokfast.window, grokfast.stop_monitor) == ("ma", 100, "val/acc")
