"""Image classification with a network from timm, a small network, or your own."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_fed.checks import check_choice, check_counts, check_flags, check_kinds, check_numbers, given
from lightning_fed.modules.networks import MLP, SmallConvNet, resnet18_cifar

Batch = tuple[Tensor, Tensor]


class ImageClassifier(LightningModule):
    """Cross-entropy training of an image classifier. It knows nothing of federation and runs under any strategy.

    Logged once an epoch: ``train/loss``, ``train/acc``, ``val/loss``, ``val/acc``, ``test/loss``, ``test/acc``. Losses
    are mean cross-entropies in nats (label smoothing in training only), accuracies lie in [0, 1].

    Args:
        model: ``"small_convnet"``, ``"mlp"``, ``"resnet18_cifar"``, the name of any timm model, or a network that maps
            images to logits.
            A network given as an object is not stored in the checkpoint's hyperparameters, so it must be given again:
            ``ImageClassifier.load_from_checkpoint(path, model=network)``.
        num_classes: number of classes.
        in_channels: channels of the images. 1 fits the digits; photographs have 3. A network given as an object
            knows its own.
        image_size: side of the square images in pixels, for networks that depend on it (``"mlp"``, vision
            transformers). None is the network's own default: 8 for ``"mlp"``, usually 224 in timm.
        pretrained: start from timm's pretrained weights, which timm downloads.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: learning rate of every local step.
        momentum: of SGD. 0, because federated algorithms are stated for plain SGD as local optimizer.
        weight_decay: of either optimizer.
        lr_decay_per_epoch: factor on the learning rate after every epoch, which is a round under a federated strategy
            with its default ``rounds_per_epoch``. 1 keeps the rate constant.
        label_smoothing: in [0, 1), of the training loss.

    Shapes:
        images ``[B, in_channels, H, W]`` float, labels ``[B]`` integer, logits ``[B, num_classes]``.

    Raises:
        ValueError: if no network has that name, a setting does not apply to the network, or is out of range.
    """

    def __init__(
        self,
        model: str | nn.Module = "small_convnet",
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int | None = None,
        pretrained: bool = False,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.05,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_decay_per_epoch: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        # Plain values only, so that torch's weights_only loading accepts the checkpoint.
        self.save_hyperparameters(ignore="model" if isinstance(model, nn.Module) else None)
        check_kinds((str, nn.Module), model=model)
        check_counts(2, num_classes=num_classes)
        check_counts(in_channels=in_channels, **given(image_size=image_size))
        check_flags(pretrained=pretrained)
        check_choice("optimizer", optimizer, "sgd", "adamw")
        check_numbers("[0, inf)", lr=lr, momentum=momentum, weight_decay=weight_decay)
        check_numbers(lr_decay_per_epoch=lr_decay_per_epoch, label_smoothing=label_smoothing)
        if not 0 < lr_decay_per_epoch <= 1:
            raise ValueError(f"lr_decay_per_epoch={lr_decay_per_epoch} must be in (0, 1]; 1 keeps the rate constant.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1); 0 is plain cross-entropy.")
        self.optimizer, self.lr, self.momentum, self.weight_decay = optimizer, lr, momentum, weight_decay
        self.lr_decay_per_epoch, self.label_smoothing = lr_decay_per_epoch, label_smoothing
        self.in_channels = in_channels if isinstance(model, str) else None
        if isinstance(model, str):
            model = create_network(model, num_classes, in_channels, image_size, pretrained)
        self.model = model
        # Training accuracy is a plain mean of batches: a metric object cannot run under torch.func.vmap.
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        channels = images.shape[1]
        if self.in_channels not in (None, channels):
            raise ValueError(
                f"in_channels={self.in_channels}, but the images have {channels} channels: set in_channels={channels}."
            )
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        size = len(labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        self.log("train/acc", accuracy, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", self.val_accuracy, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", self.test_accuracy, batch)

    def predict_step(self, batch: Tensor | Batch, batch_idx: int) -> Tensor:
        """Class probabilities ``[B, num_classes]`` of a batch of images, with or without labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer: Optimizer
        if self.optimizer == "sgd":
            optimizer = SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        else:
            optimizer = AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.lr_decay_per_epoch == 1:
            return optimizer
        return [optimizer], [ExponentialLR(optimizer, gamma=self.lr_decay_per_epoch)]

    def _evaluate(self, split: str, accuracy: MulticlassAccuracy, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        size = len(labels)
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        self.log(f"{split}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)


def create_network(
    name: str, num_classes: int, in_channels: int, image_size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """A freshly initialized network that maps images ``[B, in_channels, H, W]`` to logits ``[B, num_classes]``.

    Args:
        name: ``"small_convnet"``, ``"mlp"``, ``"resnet18_cifar"`` or the name of a timm model.
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: side of the square images in pixels; None is the network's own default.
        pretrained: start from timm's pretrained weights.

    Raises:
        ValueError: if no network has that name, or a setting does not apply to it.
    """
    any_size = f"image_size={image_size}: {name!r} takes images of any size. Leave image_size out."
    if name in ("small_convnet", "mlp", "resnet18_cifar"):
        if pretrained:
            raise ValueError(f"pretrained=True: {name!r} has no pretrained weights. Drop it, or name a timm model.")
        if name == "mlp":
            return MLP(num_classes, in_channels) if image_size is None else MLP(num_classes, in_channels, image_size)
        if image_size is not None:
            raise ValueError(any_size)
        return (SmallConvNet if name == "small_convnet" else resnet18_cifar)(num_classes, in_channels)
    if not timm.is_model(name):
        raise ValueError(
            f"model={name!r} is no known network: use 'small_convnet', 'mlp', 'resnet18_cifar', or a name from "
            "timm.list_models()."
        )
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(name, pretrained, num_classes=num_classes, in_chans=in_channels, **size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise ValueError(any_size) from error
