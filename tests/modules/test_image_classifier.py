"""ImageClassifier under plain Lightning; that strategies leave it alone is tested with the strategies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.modules import MLP, ImageClassifier, SmallConvNet


@pytest.fixture(scope="module")
def digits():
    """The 8x8 digits in a fixed order: 1,437 to train with, 360 to test with."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(labels)[order]
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def quiet_trainer(folder, **settings):
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.mark.parametrize(("network", "size"), [(SmallConvNet(), 6186), (MLP(), 8970)])
def test_small_networks_have_the_documented_size(network, size):
    assert sum(parameter.numel() for parameter in network.parameters()) == size
    assert network(torch.rand(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"model": "small_convnet", "in_channels": 3}, (3, 32, 32)),
        ({"model": "resnet18_cifar", "in_channels": 3}, (3, 32, 32)),
        ({"model": "mlp", "image_size": 12}, (1, 12, 12)),
        ({"model": "resnet18", "in_channels": 3}, (3, 32, 32)),
        ({"model": "vit_tiny_patch16_224", "image_size": 32}, (1, 32, 32)),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(12, 7))}, (3, 2, 2)),
    ],
    ids=["small_convnet", "resnet18_cifar", "mlp", "timm", "timm with image_size", "object"],
)
def test_networks_map_images_to_logits(settings, shape):
    assert ImageClassifier(num_classes=7, **settings)(torch.rand(2, *shape)).shape == (2, 7)


def test_small_convnet_learns_the_digits(digits, tmp_path):
    seed_everything(0)
    module = ImageClassifier("small_convnet", lr=0.05, momentum=0.9)
    trainer = quiet_trainer(tmp_path, max_epochs=10)
    train, test = digits
    trainer.fit(module, DataLoader(train, batch_size=16, shuffle=True))
    (logged,) = trainer.test(module, DataLoader(test, batch_size=360), verbose=False)
    assert logged["test/acc"] >= 0.97


def test_logged_values_are_means_over_samples(digits, tmp_path):
    # lr=0 keeps the model as it is, and the last batch is smaller: every value is known without Lightning.
    _, data = digits
    module = ImageClassifier("mlp", lr=0.0)
    images, labels = data.tensors
    with torch.no_grad():
        logits = module(images)
    loss, accuracy = F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()

    trainer = quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    loader = DataLoader(data, batch_size=100)
    trainer.fit(module, loader, loader)
    fitted = {name: value.item() for name, value in trainer.callback_metrics.items()}
    (tested,) = trainer.test(module, loader, verbose=False)

    assert fitted == pytest.approx({"train/loss": loss, "train/acc": accuracy, "val/loss": loss, "val/acc": accuracy})
    assert tested == pytest.approx({"test/loss": loss, "test/acc": accuracy})


def test_label_smoothing_is_of_the_training_loss_only(digits, tmp_path):
    _, data = digits
    trainer = quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    loader = DataLoader(data, batch_size=360)
    module = ImageClassifier("mlp", lr=0.0, label_smoothing=0.2)
    trainer.fit(module, loader, loader)
    images, labels = data.tensors
    logits = module(images)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item())
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.2)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(smoothed.item())


def test_predictions_are_probabilities_with_or_without_labels(digits):
    module = ImageClassifier("mlp")
    images, labels = digits[1][:5]
    probabilities = module.predict_step(images, 0)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(module.predict_step((images, labels), 0), probabilities)


def test_learning_rate_decays_every_epoch(digits, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=3, limit_train_batches=2)
    trainer.fit(ImageClassifier("mlp", lr=0.8, lr_decay_per_epoch=0.5), DataLoader(digits[1], batch_size=4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)


def test_optimizer_takes_its_settings_and_leaves_frozen_parameters_out():
    module = ImageClassifier("mlp", optimizer="adamw", lr=0.01, weight_decay=0.3)
    module.model.layers[1].requires_grad_(False)
    (group,) = module.configure_optimizers().param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.01, 0.3, 4)
    (group,) = ImageClassifier("mlp", momentum=0.4).configure_optimizers().param_groups
    assert group["momentum"] == 0.4


def test_checkpoint_loads_without_arguments_and_without_trust(digits, tmp_path):
    module = ImageClassifier("mlp", num_classes=10, lr=0.3, optimizer="adamw")
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    trainer.fit(module, DataLoader(digits[1], batch_size=8))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    images, _ = digits[1][:4]
    torch.testing.assert_close(loaded(images), module(images))
    assert loaded.hparams == module.hparams


def test_network_object_is_given_again_to_load_its_checkpoint(digits, tmp_path):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    module = ImageClassifier(network())
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    trainer.fit(module, DataLoader(digits[1], batch_size=8))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, model=network())
    images, _ = digits[1][:4]
    torch.testing.assert_close(loaded(images), module(images))


def test_training_step_runs_stacked_under_vmap(digits):
    # As many clients at once are trained: stacked parameters, and `self.log` replaced by a collector.
    modules = [ImageClassifier("small_convnet") for _ in range(3)]
    images, labels = digits[1][:12]
    images_CB, labels_CB = images.reshape(3, 4, 1, 8, 8), labels.reshape(3, 4)
    parameters, _ = stack_module_state([module.model for module in modules])

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = ImageClassifier("small_convnet")
            self.classifier.log = lambda *args, **kwargs: None

        def forward(self, images, labels):
            return self.classifier.training_step((images, labels), 0)

    step = Step()
    parameters = {f"classifier.model.{name}": value for name, value in parameters.items()}
    losses = vmap(lambda weights, *batch: functional_call(step, weights, batch))(parameters, images_CB, labels_CB)
    expected = [F.cross_entropy(module(images_CB[c]), labels_CB[c]) for c, module in enumerate(modules)]
    torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet_of_mine"}, "model='resnet_of_mine' is no known network"),
        ({"model": "mlp", "pretrained": True}, "'mlp' has no pretrained weights"),
        ({"model": "small_convnet", "image_size": 8}, "image_size=8: 'small_convnet' takes images of any size"),
        ({"model": "resnet18", "image_size": 32}, "image_size=32: 'resnet18' takes images of any size"),
        ({"optimizer": "adam"}, "optimizer='adam' is not one of"),
        ({"lr_decay_per_epoch": 0.0}, r"lr_decay_per_epoch=0.0 must be in \(0, 1\]"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**settings)


def test_images_with_other_channels_are_refused():
    with pytest.raises(ValueError, match="in_channels=1, but the images have 3 channels: set in_channels=3"):
        ImageClassifier()(torch.rand(2, 3, 8, 8))
