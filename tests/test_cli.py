"""The command line, in process and as a program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import DFedSAMStrategy
from lightning_fed.cli import FederatedCLI, main
from lightning_fed.data import DigitsDataModule
from lightning_fed.modules import ImageClassifier


class BrightOrDark(LightningDataModule):
    """Two classes of 8x8 images that any network tells apart.

    Args:
        samples: how many, half of each class.
    """

    def __init__(self, samples: int = 32) -> None:
        super().__init__()
        labels = torch.arange(samples) % 2
        self.dataset = TensorDataset(labels.float().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone(), labels)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


MODEL_AND_DATA = ["--model=ImageClassifier", "--model.model=mlp", "--model.num_classes=2", "--data=BrightOrDark"]
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=runs",
]


@pytest.fixture(autouse=True)
def only_the_given_arguments(in_tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-fed"])


def test_short_names_become_model_data_and_strategy():
    strategy = ["--trainer.strategy=DFedSAMStrategy", "--trainer.strategy.rho=0.2", "--trainer.strategy.num_clients=4"]
    cli = FederatedCLI([*MODEL_AND_DATA, *SHORT, *strategy], run=False)
    assert isinstance(cli.model, ImageClassifier)
    assert isinstance(cli.datamodule, BrightOrDark)
    assert isinstance(cli.trainer.strategy, DFedSAMStrategy)
    assert cli.config["seed_everything"] == 0
    assert cli.config["trainer"]["strategy"]["init_args"]["rho"] == 0.2


def test_short_names_of_federated_data():
    data = ["--data=DigitsDataModule", "--data.num_clients=4", "--data.partitioner=Dirichlet"]
    cli = FederatedCLI([*SHORT, "--model=ImageClassifier", *data, "--data.partitioner.alpha=0.5"], run=False)
    assert isinstance(cli.datamodule, DigitsDataModule)


def test_fit_prints_where_the_results_are(capsys):
    main(["fit", *MODEL_AND_DATA, *SHORT])
    printed = dict(re.findall(r"^(\w+): +(\S+)$", capsys.readouterr().out, flags=re.MULTILINE))
    assert Path(printed["logs"], "metrics.csv").is_file()
    assert Path(printed["logs"], "config.yaml").is_file()
    assert Path(printed["checkpoint"]).is_file()
    assert "pictures" not in printed


def test_fit_prints_folders_of_pictures(capsys):
    pictures = Path("runs/lightning_logs/version_0/rounds")
    pictures.mkdir(parents=True)
    (pictures / "first.png").touch()
    (pictures / "second.png").touch()
    (pictures / "notes.txt").touch()
    main(["fit", *MODEL_AND_DATA, *SHORT, "--trainer.logger.version=0"])
    assert re.search(rf"^pictures: +{pictures} \(2\)$", capsys.readouterr().out, flags=re.MULTILINE)


def test_saved_config_repeats_the_run(capsys):
    main(["fit", *MODEL_AND_DATA, *SHORT, "--trainer.logger.version=first", "--model.lr=0.3"])
    main(["fit", "--config=runs/lightning_logs/first/config.yaml", "--trainer.logger.version=second"])
    first, second = (torch.load(*Path(f"runs/lightning_logs/{run}").rglob("*.ckpt")) for run in ("first", "second"))
    assert first["hyper_parameters"]["lr"] == second["hyper_parameters"]["lr"] == 0.3
    torch.testing.assert_close(second["state_dict"], first["state_dict"], rtol=0, atol=0)


def test_checkpoint_of_a_command_line_run_loads_and_is_tested(capsys):
    main(["fit", *MODEL_AND_DATA, *SHORT, "--model.lr=0.3"])
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.lr == 0.3
    main(["test", *MODEL_AND_DATA, *SHORT[:2], "--trainer.logger=false", f"--ckpt_path={checkpoint}"])
    assert "test/acc" in capsys.readouterr().out


def test_network_object_from_the_command_line(capsys):
    network = ["--model.model=lightning_fed.modules.MLP", "--model.model.hidden_size=5"]
    cli = FederatedCLI([*MODEL_AND_DATA, *SHORT, *network, "--model.model.num_classes=2"], run=False)
    assert cli.model.model.layers[1].out_features == 5


def test_federation_is_trained_from_the_command_line(capsys):
    strategy = ["--trainer.strategy=DFedSAMStrategy", "--trainer.strategy.num_clients=4"]
    main(["fit", *MODEL_AND_DATA, *SHORT, *strategy, "--model.lr=0.3"])
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    assert str(checkpoint) in capsys.readouterr().out
    assert ImageClassifier.load_from_checkpoint(checkpoint, weights_only=True).lr == 0.3


def test_unknown_setting_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["fit", *MODEL_AND_DATA, *SHORT, "--model.learning_rate=0.1"])
    assert "learning_rate" in capsys.readouterr().err


def test_module_runs_as_a_program():
    # From the root of the repository, where the package is found whether installed or not.
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "lightning_fed", "--help"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    assert "fit" in shown.stdout
