"""The examples of docs/robustness.md run."""

from __future__ import annotations

from pathlib import Path

import torch
from documentation import ROOT, example, execute

import lightning_fed
from lightning_fed.attacks import Attack
from lightning_fed.robust import RobustMix

PAGE = ROOT / "docs" / "robustness.md"


def test_the_example_trains_in_spite_of_its_attackers(in_tmp_path: Path) -> None:
    names = execute(PAGE, example(PAGE, "robust"))
    assert names["trainer"].callback_metrics["val/acc"] > 0.7
    strategy = names["strategy"]
    honest = [client for client in range(12) if client not in (3, 8)]
    model = strategy.bank.rows.matrix[honest].mean(dim=0)
    torch.testing.assert_close(strategy.bank.consensus[0], model, rtol=0, atol=1e-6)


def test_the_page_names_every_rule_and_attack() -> None:
    page = PAGE.read_text()
    for name in lightning_fed.__all__:
        thing = getattr(lightning_fed, name)
        if isinstance(thing, type) and issubclass(thing, (RobustMix, Attack)):
            assert f"`{name}(" in page, name
