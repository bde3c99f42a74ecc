"""The tables of modular arithmetic, their split, and how minibatches come."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_fed.data import ModularArithmeticDataModule
from lightning_fed.data.modular_arithmetic import table


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "divide"])
def test_results(operation: Any) -> None:
    p = 7
    pairs, results = table(p, operation)
    assert len(pairs) == len(set(map(tuple, pairs.tolist()))) == (p * (p - 1) if operation == "divide" else p * p)
    for (a, b), c in zip(pairs.tolist(), results.tolist()):
        assert {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": c * b}[operation] % p == (
            a if operation == "divide" else c
        )
        assert 0 <= c < p


def test_the_split_is_a_function_of_the_seed() -> None:
    one, same, other = (ModularArithmeticDataModule(11, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.train.pairs, same.train.pairs) and not torch.equal(one.train.pairs, other.train.pairs)
    both = torch.cat([one.train.pairs, one.val.pairs]).tolist()
    assert len(one.train) == 60 and sorted(map(tuple, both)) == [(a, b) for a in range(11) for b in range(11)]


def test_minibatches_and_the_full_batch() -> None:
    data = ModularArithmeticDataModule(5, train_fraction=0.6, batch_size=4)
    seen = [pair for pairs, _ in data.train_dataloader() for pair in pairs.tolist()]
    assert len(data.train_dataloader()) == 4 and sorted(seen) == sorted(data.train.pairs.tolist())
    repeated = ModularArithmeticDataModule(5, train_fraction=0.6, steps_per_epoch=3)
    batches = list(repeated.train_dataloader())
    assert len(batches) == 3 and all(torch.equal(pairs, repeated.train.pairs) for pairs, _ in batches)
    assert torch.equal(repeated.train[16][0], repeated.train.pairs[1])
    ((pairs, results),) = repeated.val_dataloader()
    assert torch.equal(results, pairs.sum(dim=1) % 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 9, "operation": "divide"}, "p=9 is no prime"),
        ({"batch_size": 8, "steps_per_epoch": 2}, "only the full batch"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModularArithmeticDataModule(**settings)
