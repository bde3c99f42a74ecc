"""User-level privacy: the epsilon that is printed and logged is the accountant's, and no other can be had.

Shapes: N = clients, S = clients in a cohort.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import dp_accounting
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from documentation import ROOT, example, execute
from dp_accounting.rdp import RdpAccountant
from federations import Classifier, clients, loaders, silent_trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_fed import FedAvgStrategy, UserLevelPrivacy
from lightning_fed.callbacks import FederationMonitor
from lightning_fed.privacy import Secret

N = 6


def strategy(noise_multiplier: float = 2.0, delta: float = 1e-3, **settings: Any) -> FedAvgStrategy:
    privacy = UserLevelPrivacy(clip=0.5, noise_multiplier=noise_multiplier, delta=delta)
    return FedAvgStrategy(**{"num_clients": N, "weighting": "uniform", "privacy": privacy, **settings})


def statements(messages: str) -> list[str]:
    return re.findall(r"epsilon=(\S+) at delta=(\S+) after (\d+) rounds", messages)


# ------------------------------------------------------------------------------------------------------- accounting


@pytest.mark.parametrize(("cohort_size", "rounds"), [(10, 1), (10, 500), (100, 7)])
def test_epsilon_is_the_accountants(cohort_size: int, rounds: int) -> None:
    """A replaced client moves the sum by twice the clipping norm, so the noise is worth half its multiplier."""
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    for _ in range(rounds) if rounds < 10 else [rounds]:
        event = dp_accounting.SampledWithoutReplacementDpEvent(100, cohort_size, dp_accounting.GaussianDpEvent(1.1 / 2))
        accountant.compose(event, 1 if rounds < 10 else rounds)
    privacy = UserLevelPrivacy(clip=0.5, noise_multiplier=1.1, delta=1e-5)
    assert privacy.epsilon(rounds, cohort_size, 100) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-12)


def test_epsilon_without_sampling_is_barely_above_the_exact_one() -> None:
    """Of a Gaussian mechanism whose sum moves by 2 C (Balle and Wang 2018, Theorem 8); R rounds are one with R mu^2."""
    rounds, multiplier, delta = 40, 20.0, 1e-5
    mu = 2 / multiplier * math.sqrt(rounds)

    def exact_delta(epsilon: float) -> float:
        def below(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return below(mu / 2 - epsilon / mu) - math.exp(epsilon) * below(-mu / 2 - epsilon / mu)

    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_delta(middle) > delta else (low, middle)
    stated = UserLevelPrivacy(1.0, multiplier, delta).epsilon(rounds, N, N)
    assert high <= stated <= 1.1 * high


def test_epsilon_grows_with_rounds_and_cohorts_and_is_zero_at_first() -> None:
    privacy = UserLevelPrivacy(1.0, 2.0, 1e-4)
    assert privacy.epsilon(0, 5, 100) == 0.0
    assert 0 < privacy.epsilon(1, 5, 100) < privacy.epsilon(10, 5, 100) < privacy.epsilon(10, 50, 100)
    assert privacy.epsilon(10, 50, 100) < privacy.epsilon(10, 100, 100)


@pytest.mark.parametrize("cohort_size", [None, 2])
def test_the_epsilon_that_is_printed_and_logged_is_the_accountants(
    cohort_size: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private = strategy(cohort_size=cohort_size, rounds_per_epoch=2)
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = FederationMonitor(plots=False)
    with caplog.at_level("INFO"):
        silent_trainer(private, max_epochs=2, logger=logger, callbacks=[monitor]).fit(
            Classifier(norm=False), *loaders(clients(N))
        )
    expected = [private.privacy.epsilon(rounds, cohort_size or N, N) for rounds in (1, 2, 3, 4)]
    assert statements(caplog.text) == [(repr(expected[-1]), "0.001", "4")]
    assert "function of secret_seed" not in caplog.text
    assert "differ in all data of one client (replaced by any other)" in caplog.text
    assert f"{cohort_size or N} of {N} clients a round" in caplog.text
    table = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True, deletechars="")
    column = table["fed/epsilon"]
    np.testing.assert_array_equal(column[~np.isnan(column)], expected)
    assert private.epsilon() == expected[-1]


def test_a_run_without_an_end_prints_no_epsilon(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        silent_trainer(strategy(), max_epochs=-1, max_steps=2).fit(Classifier(norm=False), *loaders(clients(N)))
    assert not statements(caplog.text) and "the number of rounds is open, watch fed/epsilon" in caplog.text


def test_without_privacy_epsilon_is_infinite() -> None:
    public = FedAvgStrategy(num_clients=N)
    assert public.epsilon() == math.inf and public.measure(None) == {}  # type: ignore[arg-type]


def test_a_missing_accountant_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_fed\[privacy\]'"):
        UserLevelPrivacy(1.0, 1.0, 1e-5)


PAGE = ROOT / "docs" / "privacy.md"


def test_the_example_of_the_docs_states_its_epsilon(capsys: pytest.CaptureFixture[str], in_tmp_path: Path) -> None:
    names = execute(PAGE, [block.replace("max_epochs=40", "max_epochs=2") for block in example(PAGE, "privacy")])
    private = names["strategy"]
    assert float(capsys.readouterr().out.splitlines()[-1]) == private.epsilon() > 0 and private.round == 2
    assert f"# {private.epsilon(40):.2f}..." in PAGE.read_text()


def test_a_file_of_weights_holds_nothing_else_of_the_run(tmp_path: Path) -> None:
    trainer = silent_trainer(strategy(cohort_size=2), max_epochs=1, callbacks=[FederationMonitor(plots=False)])
    trainer.fit(Classifier(norm=False), *loaders(clients(N)))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    weights, full = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("weights", "full"))
    assert {"callbacks", "lightning_fed"} <= set(full)
    assert not {"callbacks", "lightning_fed", "optimizer_states"} & set(weights)
    assert not list(tmp_path.glob("weights.federation*"))


# ------------------------------------------------------------------------------------------------------------ noise


def test_noise_is_normal_and_of_its_round() -> None:
    noise = np.stack([Secret.draw(3).noise(round, 100_000) for round in range(3)])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.02
    inside = [(np.abs(noise) < width).mean() for width in (1, 2, 3)]
    np.testing.assert_allclose(inside, [0.6827, 0.9545, 0.9973], atol=2e-3)
    np.testing.assert_array_equal(noise[1], Secret.draw(3).noise(1, 100_000))


def test_secrets_are_long_and_differ() -> None:
    keys = {Secret.draw(None).key for _ in range(20)} | {Secret.draw(seed).key for seed in range(20)}
    assert len(keys) == 40 and {len(key) for key in keys} == {32}
    first = {float(Secret.draw(seed).noise(0, 1)[0]) for seed in range(50)}
    assert len(first) == 50


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": math.inf}, "clip=inf"),
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"clipping": "flat"}, "clipping='flat' is not one of"),
        ({"secret_seed": -1}, "secret_seed=-1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        UserLevelPrivacy(**{"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weighting": "samples"}, "weighting='samples' .* set weighting='uniform'"),
        ({"on_peer_loss": "drop"}, "on_peer_loss='drop' .* use on_peer_loss='raise'"),
        ({"rounds_per_epoch": "pass"}, "rounds_per_epoch='pass' .* set a number of rounds"),
        ({"max_update_norm": 1.0}, "max_update_norm=1.0 .* leave out max_update_norm"),
        ({"privacy": 1.0}, "privacy=1.0 must be a UserLevelPrivacy"),
    ],
)
def test_an_epsilon_that_cannot_be_stated(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        strategy(**settings)


class Scheduled(Classifier):
    """Lowers its rate when the training loss stops to fall."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train/loss_epoch"}}


class Buffered(Classifier):
    """Has float buffers and no integer ones."""

    def __init__(self, drifts: bool = False) -> None:
        super().__init__(norm=False)
        self.register_buffer("center", torch.ones(2))
        self.drifts = drifts

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.drifts:
            self.center += batch[0].mean()
        return super().training_step(batch, batch_idx)


def counting() -> pl.LightningModule:
    module = Classifier(norm=False)
    module.register_buffer("batches", torch.zeros(1, dtype=torch.int64))
    return module


@pytest.mark.parametrize(
    ("module", "settings", "expected"),
    [
        (Classifier(norm=True), {}, r"32 numbers in float buffers .* \(GroupNorm\)"),
        (Buffered(), {}, r"2 numbers in float buffers .* float_buffers='local'"),
        (Buffered(), {"float_buffers": "local", "on_nonfinite": "drop"}, "on_nonfinite='raise'"),
        (counting(), {}, "1 integers in buffers .* those of client 0"),
        (Scheduled(norm=False), {}, "ReduceLROnPlateau watches 'train/loss_epoch'"),
        (Classifier(norm=False), {"delta": 1 / N}, "is not below 1/num_clients"),
        (Classifier(norm=False), {"noise_multiplier": 1e-170}, "noise_multiplier=1e-170 is so small"),
    ],
)
def test_what_would_leave_without_noise_is_refused(
    module: pl.LightningModule, settings: dict[str, Any], expected: str
) -> None:
    trainer = silent_trainer(strategy(**settings))
    with pytest.raises(ValueError, match=expected):
        trainer.fit(module, *loaders(clients(N)))
    assert trainer.global_step == 0


def test_local_float_buffers_do_not_reach_the_exported_model() -> None:
    module = Buffered(drifts=True)
    private = strategy(float_buffers="local")
    silent_trainer(private).fit(module, *loaders(clients(N)))
    assert not torch.allclose(private.bank.buffers.matrix[0], torch.ones(2))  # the clients' own have drifted
    assert torch.equal(module.center, torch.ones(2))


def test_a_module_with_group_norm_trains() -> None:
    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__(norm=False)
            self.net[1] = nn.GroupNorm(4, 16)

    private = strategy()
    silent_trainer(private, max_epochs=1).fit(Normed(), *loaders(clients(N)))
    assert private.round == 1
