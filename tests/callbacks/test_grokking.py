"""What Grokfast does on modular addition, and that the learning rate does it too: the claims of docs/grokking.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer

from benchmarks.grokking import FULL_BATCH, MINIBATCH, Row, first_reach
from lightning_fed.callbacks import Grokfast, OrthogonalGradient
from lightning_fed.cli import FederatedCLI

PAGE = Path(__file__).parents[2] / "docs" / "grokking.md"


def block(language: str) -> str:
    (code,) = re.findall(rf"<!-- test: grokking -->\n```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return code


def test_the_settings_of_the_page_are_read(in_tmp_path: Path) -> None:
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu", **yaml.safe_load(block("yaml"))}}))
    data = ["--data", "ModularArithmeticDataModule"]
    trainer = FederatedCLI(["--config", "config.yaml", "--model", "ModularClassifier", *data], run=False).trainer
    filters = [callback for callback in trainer.callbacks if isinstance(callback, (Grokfast, OrthogonalGradient))]
    assert [type(callback) for callback in filters] == [OrthogonalGradient, Grokfast]
    assert filters[1].filter == "ma" and filters[1].stop_monitor == "val/acc"


@pytest.mark.slow
def test_the_example_of_the_page_generalizes(in_tmp_path: Path) -> None:
    names = {"__name__": "example"}
    exec(compile(block("python"), str(PAGE), "exec"), names)
    trainer = names["trainer"]
    assert isinstance(trainer, Trainer) and trainer.callback_metrics["val/acc"] > 0.95


def row(rows: list[Row], name: str) -> Row:
    (found,) = [row for row in rows if row.name == name]
    return found


def test_the_full_batch_generalizes_around_step_one_thousand() -> None:
    steps = first_reach(row(FULL_BATCH, "Grokfast-EMA 0.98/2, L2 0.005"), seed=0).step
    assert steps is not None and abs(steps - 1000) <= 100


@pytest.mark.slow
def test_without_the_filter_a_third_of_the_penalty_does_the_same() -> None:
    control = first_reach(row(FULL_BATCH, "control: Adam, L2 0.005/3"), seed=0).step
    assert control is not None and abs(control - 1000) <= 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_small_learning_rate_needs_four_times_the_steps_without_the_filter(seed: int) -> None:
    filtered = first_reach(row(MINIBATCH, "the same with Grokfast-EMA 0.99/10"), seed).step
    assert filtered is not None
    plain = first_reach(row(MINIBATCH, "Adam, lr 3e-4, L2 0.002")._replace(max_steps=4 * filtered), seed)
    assert plain.step is None and plain.curve[-1][0] >= 4 * filtered - 40
    larger_rate = first_reach(row(MINIBATCH, "control: Adam, lr 3e-4 x 11, L2 0.002"), seed).step
    assert larger_rate is not None and larger_rate < filtered
