"""Optimizers of other libraries, chosen by the YAML in docs/optimizers.md; clients' states do not mix."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
import yaml
from federations import Classifier, clients, loaders, silent_trainer
from lightning.pytorch import Callback

from lightning_fed import FedAvgStrategy
from lightning_fed.cli import FederatedCLI
from lightning_fed.federation.strategy import FederatedStrategy

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "optimizers.md").read_text()
BLOCKS = re.findall(r"<!-- test: optimizer (\w+) -->\n```yaml\n(.*?)```", PAGE, re.DOTALL)
SHORT = "--trainer.max_epochs 1 --trainer.devices 1 --trainer.logger false --trainer.enable_model_summary false"


@pytest.mark.parametrize("number", range(3))
def test_the_optimizer_of_the_page_trains(number: int, in_tmp_path: Path) -> None:
    assert len(BLOCKS) == 3
    config, block = BLOCKS[number]
    Path("optimizer.yaml").write_text(block)
    configs = ["--config", str(ROOT / "configs" / f"{config}.yaml"), "--config", "optimizer.yaml"]
    quiet = ["--trainer.callbacks", "null", "--trainer.enable_checkpointing", "false", "--test_after_fit", "false"]
    cli = FederatedCLI(["fit", *configs, *SHORT.split(), *quiet])
    given, (optimizer,) = yaml.safe_load(block), cli.trainer.optimizers
    assert type(optimizer).__name__ == given["optimizer"]["class_path"].split(".")[-1]
    assert ("lr_scheduler" in given) == bool(cli.trainer.lr_scheduler_configs)
    assert 0 < cli.trainer.callback_metrics["train/loss"] < 10
    if isinstance(strategy := cli.trainer.strategy, FederatedStrategy):
        assert strategy.optimizer_state_policy == "keep"


@pytest.mark.parametrize("make", [torch.optim.AdamW, timm.optim.Adopt, timm.optim.NAdamW, timm.optim.Lion])
def test_each_client_counts_its_own_steps(make: Any) -> None:
    """The optimizers that the page calls right for any number of clients; Lion counts none."""

    class Chosen(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make(self.parameters(), lr=0.01)

    class Counts(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            done[strategy.bank.bound] += 1

    strategy, done = FedAvgStrategy(num_clients=4, optimizer_state="keep"), Counter[Any]()
    silent_trainer(strategy, max_epochs=2, callbacks=[Counts()]).fit(Chosen(), *loaders(clients(4)))
    assert len(set(done.values())) > 1
    for client, steps in done.items():
        (state,) = strategy.bank.optimizer_states(client)
        counts = {int(of_one["step"]) for of_one in state.values() if "step" in of_one}
        assert counts == (set() if make is timm.optim.Lion else {steps})
    assert "step" not in make([torch.zeros(1, requires_grad=True)]).param_groups[0]
