"""What all diffusion modules share: the moving average, sampling that leaves no trace, batches that do not fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from federations import all_rows, silent_trainer
from small_denoisers import CLASSES, LinearNetwork, batches, coloured, dit_config, unet_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FedAvgStrategy
from lightning_fed.data import FederatedDataset
from lightning_fed.modules.diffusion import DiffusionModule, DiffusionTraining, EDMDenoiser, load_denoiser
from lightning_fed.modules.diffusion.diffusion_module import CLASS_KEY


class Seeds(pl.Callback):
    """Every batch draws from a generator of its own, also in a run that is resumed."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        torch.manual_seed(1000 * trainer.current_epoch + args[-1])


class Weights(pl.Callback):
    """The trained weights after every step, as one vector."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.seen):
            self.seen.append(flat(pl_module.denoiser))


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().reshape(-1) for parameter in module.parameters()])


def module_of(**settings: Any) -> DiffusionTraining:
    torch.manual_seed(0)
    network = settings.pop("network", unet_config())
    return DiffusionTraining(network, **{"sampling_steps": 2, **settings})


def fit(module: pl.LightningModule, *callbacks: pl.Callback, ckpt_path: Any = None, **settings: Any) -> pl.Trainer:
    trainer = silent_trainer("auto", callbacks=[Seeds(), *callbacks], **settings)
    trainer.fit(module, batches(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


# ------------------------------------------------------------------------------------------------- the moving average


@pytest.mark.parametrize("accumulate", [1, 4])  # six batches: the last window of four is incomplete
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_the_average_is_that_of_the_formula(decay: float, accumulate: int) -> None:
    """d = min(decay, (1 + k) / (10 + k)) at the k-th update after the first, which copies; one update a step."""
    module, weights = module_of(ema_decay=decay, lr=0.01), Weights()
    trainer = fit(module, weights, accumulate_grad_batches=accumulate, precision="64-true")
    assert len(weights.seen) == trainer.global_step == 3 * -(-6 // accumulate)
    expected = weights.seen[0]
    for k, w in enumerate(weights.seen[1:], start=1):
        d = min(decay, (1 + k) / (10 + k))
        expected = d * expected + (1 - d) * w
    assert module.average is not None and int(module.average.n_averaged) == trainer.global_step
    assert (flat(module.average.module) - expected).abs().max() <= 1e-14
    assert ((flat(module.denoiser) - expected).abs().max() > 1e-4) == (decay > 0)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_resumed_run_goes_on_to_the_bit(accumulate: int, tmp_path: Path) -> None:
    whole = module_of()
    fit(whole, accumulate_grad_batches=accumulate, max_epochs=3)
    trainer = fit(module_of(), accumulate_grad_batches=accumulate, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = module_of()
    fit(resumed, accumulate_grad_batches=accumulate, max_epochs=3, ckpt_path=tmp_path / "one.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_first_batch_of_a_resumed_run_is_no_step_yet(tmp_path: Path) -> None:
    """It would be averaged a second time."""
    trainer = fit(module_of(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = module_of()
    updates = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            updates.append((trainer.global_step, int(pl_module.average.n_averaged)))

    fit(resumed, Looks(), accumulate_grad_batches=3, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    # Lightning calls callbacks before the module.
    assert updates == [(6, 6), (6, 6), (7, 6), (7, 7), (7, 7), (8, 7)]
    assert int(resumed.average.n_averaged) == 8  # type: ignore[union-attr]


def test_samples_and_validation_are_the_averages() -> None:
    module = module_of(lr=0.01)
    assert module.generator is module.denoiser
    fit(module)
    assert module.average is not None and module.generator is module.average.module
    averaged = module.sample(2, seed=0)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(module(x, 1.0), module.average.module(x, 1.0))
    loss = silent_trainer("auto").validate(module, batches(), verbose=False)[0]["val/loss"]
    module.average = None
    assert not torch.equal(module.sample(2, seed=0), averaged)
    assert silent_trainer("auto").validate(module, batches(), verbose=False)[0]["val/loss"] != loss
    assert module_of(ema_decay=None).average is None


def test_the_average_is_not_trained_and_worries_nobody(capsys: Any) -> None:
    module = module_of()
    trained = {id(parameter) for parameter in module.denoiser.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|no `val_dataloader`)")
        trainer = fit(module, enable_model_summary=True, max_epochs=1, log_every_n_steps=1)
    (optimizer,) = trainer.optimizers
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == trained
    assert all(parameter.requires_grad is False for parameter in module.average.parameters())  # type: ignore[union-attr]
    assert all(submodule.training for submodule in module.modules())


def test_a_network_that_comes_in_evaluation_mode_is_trained_with_its_dropout() -> None:
    """Models that are loaded come so, and Lightning leaves modes as they are."""
    network = module_of(network=unet_config(dropout=0.5)).denoiser.network.eval()
    modes = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            modes.append(pl_module.denoiser.network.training)

    fit(module_of(network=network), Looks(), max_epochs=1)
    assert modes == [True] * 6


# ---------------------------------------------------------------------------------------------------------- federation


def federation(module: DiffusionTraining, **settings: Any) -> FedAvgStrategy:
    dataset = FederatedDataset(coloured(24), [list(range(12)), list(range(12, 24))])
    pl.seed_everything(5, verbose=False)
    strategy = FedAvgStrategy(num_clients=2)
    silent_trainer(strategy, max_epochs=2, **settings).fit(module, DataLoader(dataset, 4))
    return strategy


def test_a_federation_leaves_the_average_out(caplog: Any, tmp_path: Path) -> None:
    module, plain = module_of(lr=0.01), module_of(lr=0.01, ema_decay=None)
    with caplog.at_level("INFO"):
        strategy = federation(module)
    assert "ema_decay is not used: samples of a federation come from its consensus model" in caplog.text
    rows = all_rows(strategy)
    assert rows.shape == (2, sum(parameter.numel() for parameter in module.denoiser.parameters()))
    assert (rows == all_rows(federation(plain))).all()
    assert int(module.average.n_averaged) == 0 and module.generator is module.denoiser  # type: ignore[union-attr]
    assert torch.equal(module.sample(2, seed=0), plain.sample(2, seed=0))


def test_a_federation_forgets_the_average_of_a_run_before_it() -> None:
    module = module_of(lr=0.01)
    fit(module)
    assert module.generator is not module.denoiser
    federation(module)
    assert module.generator is module.denoiser


def test_a_checkpoint_of_a_federation_is_that_of_its_consensus(tmp_path: Path) -> None:
    module = module_of(lr=0.01)
    strategy = federation(module)
    strategy.lightning_module.trainer.save_checkpoint(tmp_path / "one.ckpt")  # type: ignore[union-attr]
    loaded = DiffusionTraining.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert torch.equal(loaded.sample(2, seed=0), module.sample(2, seed=0))
    # Not of the average, which is where training began.
    assert torch.equal(flat(load_denoiser(str(tmp_path / "one.ckpt"))), flat(module.denoiser))


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("seed", [0, None])
def test_sampling_leaves_no_trace(seed: int | None) -> None:
    module = module_of(network=unet_config(dropout=0.3))
    module.denoiser.network.mid_block.eval()
    modes = [submodule.training for submodule in module.modules()]
    state, numbers = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    first, second = module.sample(3, seed=seed), module.sample(3, seed=seed)
    assert [submodule.training for submodule in module.modules()] == modes and len(set(modes)) == 2
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(first, second) == (seed is not None)
    assert not first.requires_grad and first.dtype == torch.float32


def test_modes_come_back_when_sampling_fails() -> None:
    module = module_of()
    with pytest.raises(ValueError, match="steps=0"):
        module.sample(1, steps=0)
    assert all(submodule.training for submodule in module.modules())


def test_labels_take_turns_unless_given() -> None:
    module = module_of(network=unet_config(num_class_embeds=CLASSES))
    turns = module.sample(5, seed=0)
    assert torch.equal(turns, module.sample(5, [0, 1, 2, 0, 1], seed=0))
    assert torch.equal(turns, module.sample(5, torch.tensor([0, 1, 2, 0, 1]), seed=0))
    assert not torch.equal(turns, module.sample(5, [2, 1, 2, 0, 1], seed=0))
    dit = module_of(network=dit_config())
    assert dit.sample(2, [0, CLASSES], seed=0).shape == (2, 1, 8, 8)  # the second of no class


@pytest.mark.parametrize(
    ("network", "arguments", "says"),
    [
        (unet_config(), {"num": 0}, "num=0 must be at least 1"),
        (unet_config(), {"num": 2, "class_labels": [0, 1]}, "the network knows no classes"),
        (unet_config(num_class_embeds=3), {"num": 2, "class_labels": [0, 3]}, r"\[0, 3\] must be 2 integers in 0 .. 2"),
        (unet_config(num_class_embeds=3), {"num": 2, "class_labels": [0]}, r"\[0\] must be 2 integers in 0 .. 2"),
        (unet_config(num_class_embeds=3), {"num": 1, "class_labels": [-1]}, "must be 1 integers"),
        (unet_config(num_class_embeds=3), {"num": 1, "class_labels": [0.5]}, "must be 1 integers"),
        (dit_config(), {"num": 1, "class_labels": [4]}, r"\[4\] must be 1 integers in 0 .. 3"),
        (unet_config(), {"num": 1, "shape": (3, 8, 8)}, r"images are \[3, 8, 8\], the network is for \[1, 8, 8\]"),
        (unet_config(sample_size=None), {"num": 1}, r"shape=None: .* pass shape=\(C, H, W\)"),
    ],
)
def test_samples_that_cannot_be_drawn(network: dict[str, Any], arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        module_of(network=network).sample(**arguments)


def test_a_shape_is_given_where_the_network_does_not_tell() -> None:
    assert module_of(network=unet_config(sample_size=None)).sample(2, seed=0, shape=(1, 4, 6)).shape == (2, 1, 4, 6)
    assert DiffusionTraining(LinearNetwork(3).float()).sample(2, seed=0, shape=(3,)).shape == (2, 3)


# ----------------------------------------------------------------------------------------------------------- bad input


def train_on(module: DiffusionModule, *tensors: Tensor) -> None:
    silent_trainer("auto", max_epochs=1).fit(module, DataLoader(TensorDataset(*tensors), 4))


IMAGES = torch.rand(4, 1, 8, 8) * 2 - 1


@pytest.mark.parametrize(
    ("network", "tensors", "says"),
    [
        (unet_config(), [torch.zeros(4, 3, 8, 8)], r"images are \[3, 8, 8\], the network is for \[1, 8, 8\]"),
        (unet_config(), [torch.zeros(4, 1, 16, 16)], r"images are \[1, 16, 16\].*sample_size"),
        (unet_config(sample_size=None), [torch.zeros(4, 1, 8, 7)], "images of 8 x 7 do not fit"),
        (unet_config(), [torch.zeros(4, 1, 8, 8, dtype=torch.uint8)], "images are torch.uint8"),
        (unet_config(num_class_embeds=3), [IMAGES], "knows 3 classes, but batches have no labels"),
        (unet_config(num_class_embeds=3), [IMAGES, torch.arange(4)], "labels are in 0 .. 3, but .* 3 classes"),
        (unet_config(num_class_embeds=3), [IMAGES, torch.arange(4) - 2], "labels are in -2 .. 1"),
        (dit_config(), [IMAGES], "a DiT: with num_embeds_ada_norm=0"),
    ],
)
def test_batches_that_do_not_fit(network: dict[str, Any], tensors: list[Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train_on(module_of(network=network), *tensors)


def test_batches_that_are_no_tuples() -> None:
    data: Any = [{"image": image} for image in IMAGES]
    with pytest.raises(ValueError, match=r"batches are dict: they must be images, or \(images, labels\)"):
        silent_trainer("auto", max_epochs=1).fit(module_of(), DataLoader(data, 4))


@pytest.mark.parametrize(("images", "warns"), [(IMAGES, 0), (IMAGES.abs(), 1), (IMAGES * 100, 1)])
def test_a_range_that_is_not_that_of_diffusers_is_told_once(images: Tensor, warns: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_on(module_of(), images.repeat(3, 1, 1, 1))
    assert sum("diffusion models are trained" in str(warning.message) for warning in caught) == warns


def test_a_checkpoint_names_its_class(tmp_path: Path) -> None:
    trainer = fit(module_of(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)[CLASS_KEY] == "DiffusionTraining"


def test_a_module_of_a_denoiser_object() -> None:
    denoiser = module_of().denoiser
    assert DiffusionTraining(denoiser).denoiser.network is denoiser.network
    assert isinstance(DiffusionTraining(denoiser).denoiser, EDMDenoiser)
