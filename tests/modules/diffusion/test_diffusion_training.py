"""Denoising training against an independent float64 transcription in NumPy, under precisions, configs and classes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import silent_trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.plugins.precision import MixedPrecision
from small_denoisers import CLASSES, LinearNetwork, batches, coloured, dit_config, unet_config
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fed.cli import main
from lightning_fed.modules.diffusion import DiffusionTraining, KarrasUniform, LogNormal, ScoreWeighting
from lightning_fed.modules.diffusion.sampling import euler, heun

NUMBERS, BATCH, STEPS = 3, 5, 12


class Seeds(pl.Callback):
    """Every step draws from a generator of its own, also in a run that is resumed."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


def seeded(step: int) -> tuple[np.ndarray, np.ndarray]:
    """What the module draws in a step in double precision: of levels, then of noise."""
    torch.manual_seed(step)
    return torch.randn(BATCH, dtype=torch.float64).numpy(), torch.randn(BATCH, NUMBERS, dtype=torch.float64).numpy()


class Transcription:
    """EDM's training of ``F(u, t) = W u + t b + c`` by Adam, with its moving average, in plain NumPy."""

    def __init__(self, network: LinearNetwork, sigma_data: float, lr: float, warmup: int, decay: float) -> None:
        self.weights = [weight.detach().numpy().copy() for weight in (network.W, network.b, network.c)]
        self.average = [weight.copy() for weight in self.weights]
        self.m, self.v = ([np.zeros_like(weight) for weight in self.weights] for _ in range(2))
        self.sigma_data, self.lr, self.warmup, self.decay, self.k = sigma_data, lr, warmup, decay, 0

    def loss_and_gradient(self, y: np.ndarray, s: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        (W, b, c), sd = self.weights, self.sigma_data
        c_skip, c_out, c_in = sd**2 / (s**2 + sd**2), s * sd / np.sqrt(s**2 + sd**2), 1 / np.sqrt(s**2 + sd**2)
        weight, time = (s**2 + sd**2) / (s * sd) ** 2, np.log(s) / 4
        x = y + s[:, None] * n
        u = c_in[:, None] * x
        F = u @ W.T + time[:, None] * b + c
        e = c_skip[:, None] * x + c_out[:, None] * F - y
        loss = weight * (e**2).mean(axis=1)
        dF = (weight * c_out)[:, None] * 2 * e / e.size
        return loss, [dF.T @ u, (dF * time[:, None]).sum(axis=0), dF.sum(axis=0)]

    def step(self, gradient: list[np.ndarray]) -> None:
        self.k += 1
        lr = self.lr * min(1.0, self.k / self.warmup)
        for w, m, v, g in zip(self.weights, self.m, self.v, gradient):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            w -= lr * (m / (1 - 0.9**self.k)) / (np.sqrt(v / (1 - 0.999**self.k)) + 1e-8)
        # The first update copies; the k-th after it has k updates behind it.
        done = self.k - 1
        d = 0.0 if done == 0 else min(self.decay, (1 + done) / (10 + done))
        self.average = [d * a + (1 - d) * w for a, w in zip(self.average, self.weights)]


def linear_module(**settings: Any) -> DiffusionTraining:
    defaults: dict[str, Any] = {"sigma_data": 0.7, "lr": 0.05, "warmup_steps": 4, "ema_decay": 0.5}
    return DiffusionTraining(LinearNetwork(NUMBERS), **{**defaults, **settings})


def flat_samples() -> Tensor:
    return torch.randn(STEPS * BATCH, NUMBERS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_trajectory_is_that_of_the_transcription() -> None:
    module, data = linear_module(), flat_samples()
    plain = Transcription(LinearNetwork(NUMBERS), 0.7, 0.05, 4, 0.5)
    trainer = silent_trainer("auto", callbacks=[Seeds()], precision="64-true", max_epochs=1)
    trainer.fit(module, DataLoader(data, BATCH))  # type: ignore[arg-type]
    losses = []
    for step in range(STEPS):
        levels, noise = seeded(step)
        loss, gradient = plain.loss_and_gradient(
            data[step * BATCH : (step + 1) * BATCH].numpy(), np.exp(1.2 * levels - 1.2), noise
        )
        plain.step(gradient)
        losses.append(loss)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(np.mean(losses), rel=1e-12)
    np.testing.assert_allclose(module.last_step["loss"], losses[-1], rtol=1e-10)
    np.testing.assert_allclose(module.last_step["sigma"], np.exp(1.2 * seeded(STEPS - 1)[0] - 1.2), rtol=1e-12)
    assert module.average is not None and int(module.average.n_averaged) == STEPS
    for network, expected in ((module.denoiser, plain.weights), (module.average.module, plain.average)):
        for name, weight in zip("Wbc", expected):
            assert np.abs(getattr(network.network, name).detach().numpy() - weight).max() <= 1e-10
    assert np.abs(plain.weights[0] - LinearNetwork(NUMBERS).W.detach().numpy()).max() > 0.1


def test_settings_reach_the_loss() -> None:
    """Another weight and other noise, against their formulas."""
    module = linear_module(weighting={"name": "score"}, noise="karras").double()
    y, s, n = flat_samples()[:BATCH], torch.tensor([0.1, 0.5, 1.0, 2.0, 40.0]).double(), flat_samples()[BATCH:][:BATCH]
    plain = Transcription(LinearNetwork(NUMBERS), 0.7, 0.05, 4, 0.5)
    loss, _ = plain.loss_and_gradient(y.numpy(), s.numpy(), n.numpy())
    edm = (s**2 + 0.49) / (0.7 * s) ** 2
    np.testing.assert_allclose(module.loss(y, s, n).detach(), loss / edm.numpy() / s.numpy() ** 2, rtol=1e-10)
    assert module.noise == KarrasUniform() and module.weighting == ScoreWeighting()


def test_validation_has_the_same_noise_in_every_epoch_and_leaves_no_trace() -> None:
    module = linear_module(lr=0.0)
    data = DataLoader(flat_samples(), BATCH)  # type: ignore[arg-type]
    values, after = [], []

    class Looks(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            torch.manual_seed(trainer.current_epoch)

        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            values.append(float(trainer.callback_metrics["val/loss"]))
            after.append(torch.rand(1).item())

    trainer = silent_trainer("auto", callbacks=[Looks()], precision="64-true", max_epochs=2)
    trainer.fit(module, data, DataLoader(flat_samples(), 2 * BATCH))  # type: ignore[arg-type]
    assert values[0] == values[1]
    for epoch in (0, 1):
        torch.manual_seed(epoch)
        assert after[epoch] == torch.rand(1).item()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    torch.manual_seed(0)
    module = DiffusionTraining(unet_config())
    start = [parameter.detach().float().clone() for parameter in module.denoiser.parameters()]
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # which the Trainer would not have on a CPU
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}
    trainer = silent_trainer("auto", max_epochs=2, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, batches())
    said = any("average of weights in half precision hardly moves" in str(warning.message) for warning in caught)
    assert said == (precision == "bf16-true")
    assert module.last_step["loss"].dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert torch.isfinite(module.last_step["loss"]).all()
    ends = [parameter.detach().float() for parameter in module.denoiser.parameters()]
    assert all(torch.isfinite(end).all() for end in ends)
    assert sum(not torch.equal(start, end) for start, end in zip(start, ends)) > len(ends) / 2
    assert module.sample(2, seed=0).dtype == torch.float32


@pytest.mark.parametrize(
    "network", [unet_config(num_class_embeds=CLASSES), dit_config(), dit_config(num_embeds_ada_norm=0)]
)
def test_networks_with_and_without_classes_learn(network: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = DiffusionTraining(network, lr=3e-3, sampling_steps=3)
    before = silent_trainer("auto").validate(module, batches(), verbose=False)[0]["val/loss"]
    silent_trainer("auto", max_epochs=6).fit(module, batches())
    module.average = None  # which lags behind
    assert silent_trainer("auto").validate(module, batches(), verbose=False)[0]["val/loss"] < 0.7 * before
    assert module.sample(4, seed=0).shape == (4, 1, 8, 8)


def test_samplers() -> None:
    torch.manual_seed(0)
    config = unet_config()
    first = DiffusionTraining(config, sampling_steps=4)
    second = DiffusionTraining(first.denoiser.network, sampling_steps=7, sampler="euler")
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(first.sample(2, seed=3), heun(first.denoiser.eval(), z, None, 4))
        assert torch.equal(second.sample(2, seed=3), euler(first.denoiser.eval(), z, None, 7))
        assert torch.equal(second.sample(2, seed=3, steps=2), euler(first.denoiser.eval(), z, None, 2))
    # As many evaluations of the network.
    assert first.pipeline_calls() == second.pipeline_calls() == {7: {"num_inference_steps": 7}}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must be in \[0, 1\), or None"),
        ({"noise": "log-normal"}, "noise='log-normal' is unknown: did you mean 'lognormal'"),
        ({"weighting": "scores"}, "weighting='scores' is unknown: did you mean 'score'"),
        ({"sigma_min": 100.0}, "sigma_min=100.0, sigma_max=80.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        linear_module(**settings)


# ---------------------------------------------------------------------------------------------------------- configs


class Coloured(LightningDataModule):
    """What the command line trains on."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(coloured(8), 4)


NETWORK = "".join(f"\n        {name}: {value}" for name, value in unet_config().items() if name != "_class_name")
BY_NAME = f"""
model:
  class_path: DiffusionTraining
  init_args:
    network:
        _class_name: UNet2DModel{NETWORK}
    noise: {{name: karras, low: 0.1}}
    weighting: score
"""
BY_CLASS = f"""
model:
  class_path: DiffusionTraining
  init_args:
    network:
      class_path: diffusers.UNet2DModel
      init_args:{NETWORK}
    noise:
      class_path: KarrasUniform
      init_args: {{low: 0.1}}
    weighting: {{class_path: ScoreWeighting}}
"""
SHORT = [
    "--data=Coloured",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=runs",
]


@pytest.mark.parametrize("config", [BY_NAME, BY_CLASS])
def test_a_config_is_trained_and_its_checkpoint_loads_safely(
    config: str, in_tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-fed"])
    Path("config.yaml").write_text(config)
    main(["fit", "--config=config.yaml", *SHORT])
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    module = DiffusionTraining.load_from_checkpoint(checkpoint, weights_only=True)
    assert module.noise == KarrasUniform(low=0.1) and module.weighting == ScoreWeighting()
    assert module.denoiser.sample_shape == (1, 8, 8)
    # The config that the run has saved is the same one.
    (saved,) = Path("runs").rglob("config.yaml")
    main(["fit", f"--config={saved}", "--trainer.logger.version=again"])
    (again,) = Path("runs/lightning_logs/again").rglob("*.ckpt")
    repeated = DiffusionTraining.load_from_checkpoint(again, weights_only=True)
    assert torch.equal(repeated.sample(2, seed=0), module.sample(2, seed=0))


def test_a_module_of_a_network_object_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = DiffusionTraining(DiffusionTraining(unet_config()).denoiser.network, noise=LogNormal(-1.0, 1.5), lr=0.01)
    trainer = silent_trainer("auto", max_epochs=1)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = DiffusionTraining.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert torch.equal(loaded.sample(2, seed=0), module.sample(2, seed=0))
    assert (loaded.noise, loaded.lr) == (LogNormal(-1.0, 1.5), 0.01)
    assert dict(loaded.hparams) == dict(module.hparams)


def test_a_network_that_is_not_of_diffusers_is_given_again(tmp_path: Path) -> None:
    module = linear_module()
    trainer = silent_trainer("auto", max_epochs=1, precision="64-true")
    trainer.fit(module, DataLoader(flat_samples(), BATCH))  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"network=None: .* must be given again when it is loaded"):
        DiffusionTraining.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    loaded = DiffusionTraining.load_from_checkpoint(
        tmp_path / "one.ckpt", weights_only=True, network=LinearNetwork(NUMBERS)
    )
    assert torch.equal(loaded.sample(2, seed=0, shape=(3,)), module.sample(2, seed=0, shape=(3,)))
