"""A private federation on one and two ranks: the same noise, the same cohorts, the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import Classifier, clients, loaders, silent_trainer
from ranks import run_ranks

from lightning_fed import FedAvgStrategy, UserLevelPrivacy


def fit(
    world_size: int, cohort_size: int | None, secret_seed: int | None, directory: str = "", resume: str | None = None
) -> dict[str, Any]:
    privacy = UserLevelPrivacy(0.5, 0.5, 1e-3, clipping="layers", secret_seed=secret_seed)
    strategy = FedAvgStrategy(
        num_clients=5, cohort_size=cohort_size, weighting="uniform", privacy=privacy, evaluate="clients", seed=1
    )
    trainer = silent_trainer(strategy, world_size, max_epochs=4 if resume else 3)
    trainer.fit(Classifier(norm=False), *loaders(clients(5)), ckpt_path=resume)
    if directory:
        trainer.save_checkpoint(Path(directory) / "three.ckpt")
    return {
        "server": strategy.server_row().numpy().copy(),
        "secret": strategy._secret.key,
        "epsilon": strategy.epsilon(),
        "cohort": strategy.participation.cohort(7, 5, 1),
        "bytes": strategy.exchange.total_bytes,
    }


@pytest.mark.parametrize("cohort_size", [None, 3])
def test_the_number_of_ranks_does_not_matter(cohort_size: int | None) -> None:
    (alone,) = run_ranks(1, fit, 1, cohort_size, 7)
    ranks = run_ranks(2, fit, 2, cohort_size, 7)
    for rank in ranks:
        np.testing.assert_allclose(rank["server"], alone["server"], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(rank["cohort"], alone["cohort"])
        assert (rank["epsilon"], rank["bytes"]) == (alone["epsilon"], alone["bytes"])
    np.testing.assert_array_equal(ranks[0]["server"], ranks[1]["server"])


def test_ranks_share_a_fresh_secret_and_keep_it_when_resumed(tmp_path: Path) -> None:
    first, second = run_ranks(2, fit, 2, 3, None, str(tmp_path))
    assert first["secret"] == second["secret"]
    np.testing.assert_array_equal(first["server"], second["server"])
    (resumed,) = run_ranks(1, fit, 1, 3, None, "", str(tmp_path / "three.ckpt"))
    assert resumed["secret"] == first["secret"]
    assert resumed["epsilon"] > first["epsilon"]
