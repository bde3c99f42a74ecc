"""Every configuration runs: shortened where it fits a CPU, parsed where it needs data and GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_fed.cli import FederatedCLI
from lightning_fed.federation.strategy import FederatedStrategy

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = ("DigitsDataModule", "ModularArithmeticDataModule")
ON_A_CPU = sorted(path.name for path in CONFIGS.glob("*.yaml") if any(data in path.read_text() for data in SMALL))
OTHERS = sorted({path.name for path in CONFIGS.glob("*.yaml")} - set(ON_A_CPU))


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_configuration_trains(name: str, in_tmp_path: Path) -> None:
    short = "--trainer.max_epochs 1 --trainer.devices 1 --trainer.enable_model_summary false"
    logger = "--trainer.logger CSVLogger --trainer.logger.save_dir runs"
    cli = FederatedCLI(["fit", "--config", str(CONFIGS / name), *short.split(), *logger.split()])
    if isinstance(cli.trainer.strategy, FederatedStrategy):
        assert cli.trainer.strategy.round >= 1
    assert cli.trainer.callback_metrics["test/acc" if cli.config.fit.test_after_fit else "train/acc"] > 0


@pytest.mark.parametrize("name", OTHERS)
def test_a_configuration_for_gpus_is_valid(name: str, in_tmp_path: Path) -> None:
    cli = FederatedCLI(
        ["--config", str(CONFIGS / name), "--trainer.accelerator", "cpu", "--trainer.devices", "1"], run=False
    )
    assert isinstance(cli.trainer, Trainer) and all(isinstance(logger, Logger) for logger in cli.trainer.loggers)
    assert cli.trainer.strategy.num_clients == cli.datamodule.num_clients >= 100


def test_a_strategy_is_named_on_the_command_line(in_tmp_path: Path) -> None:
    strategy = "--trainer.strategy DFedSAMStrategy --trainer.strategy.rho 0.05 --trainer.strategy.topology torus"
    rest = "--trainer.strategy.num_clients 20 --trainer.accelerator cpu --trainer.devices 1"
    cli = FederatedCLI(
        [*strategy.split(), *rest.split(), "--model", "ImageClassifier", "--data", "DigitsDataModule"], run=False
    )
    assert cli.trainer.strategy.local_rule.rho == 0.05
    assert type(cli.trainer.strategy.topology).__name__ == "Torus"
