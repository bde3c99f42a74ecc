"""Ranks started by Lightning itself and by torchrun, through the command line."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SHORT = ["--config", str(CONFIG), "--trainer.max_epochs", "2"]


def run(command: list[str], directory: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(CONFIG.parents[1]), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    result = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def logged(directory: Path, name: str) -> list[str]:
    (table,) = directory.glob("runs/quickstart/version_*/metrics.csv")
    with table.open() as file:
        return [row[name] for row in csv.DictReader(file) if row[name]]


@pytest.mark.slow
def test_torchrun_and_lightnings_launcher_train_the_same_federation(tmp_path: Path) -> None:
    one, two = tmp_path / "lightning", tmp_path / "torchrun"
    one.mkdir(), two.mkdir()
    output = run([sys.executable, "-m", "lightning_fed", "fit", *SHORT], one)
    assert "MEMBER: 2/2" in output and "pictures:" in output
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*torchrun, "-m", "lightning_fed", "fit", *SHORT], two)
    for name in ("fed/consensus_distance", "fed/bytes_sent", "val/acc", "test/acc"):
        assert logged(one, name) == logged(two, name)


@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy(tmp_path: Path) -> None:
    run([sys.executable, "-m", "lightning_fed", "fit", "--config", str(CONFIG)], tmp_path)
    assert float(logged(tmp_path, "test/acc")[-1]) >= 0.95
    pictures = {path.name for path in tmp_path.glob("runs/quickstart/version_0/federation/*.png")}
    assert pictures >= {"labels.png", "topology.png", "progress.png", "bytes.png"}
