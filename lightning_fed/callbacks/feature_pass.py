"""Looking at features in the middle of a fit without leaving a trace: which samples, which layers, no change.

Shapes: B = samples of a batch, C = classes, d = numbers of a feature.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed.federation.sampler import JointDataset, loading_of
from lightning_fed.federation.strategy import FederatedStrategy

DEFAULT_BATCH_SIZE = 128
Pool = Callable[[Any], Tensor]
SplitBatch = Callable[[Any], tuple[Any, Tensor]]


# ------------------------------------------------------------------------------------------------------- which samples


class Samples(NamedTuple):
    """What one rank looks at.

    Attributes:
        batches: of this rank.
        are_shared: the ranks have different samples, so that sums over ranks count each sample once.
        limit: look at so many batches; None for all.
    """

    batches: Iterable[Any]
    are_shared: bool
    limit: int | None


def samples_of(trainer: Trainer, data: str, batch_size: int | None = None, max_batches: int | None = None) -> Samples:
    """Every sample of the training or the (first) validation set once, in a fixed order; each rank has its part.

    The loader's own order and the samples with which ``DistributedSampler`` fills up are left aside. Of federated
    training data: what belongs to a client, without what clients hold out.

    Args:
        trainer: in a fit.
        data: ``"train"`` or ``"val"``.
        batch_size: by default the loader's.
        max_batches: of each rank, of samples spread evenly over the data set, since many are sorted by class; None for
            all. Of an iterable data set the first ones.

    Raises:
        ValueError: if there is no such loader, or several training loaders.
    """
    loader = training_loader(trainer) if data == "train" else validation_loader(trainer)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return Samples(loader, True, max_batches)  # an order of its own, which its author divides among ranks
    dataset: Any = loader.dataset
    collate, size = loader.collate_fn, loader.batch_size
    indices = getattr(own_sampler(loader), "indices", None)  # of a SubsetRandomSampler
    if isinstance(dataset, JointDataset):
        strategy = federation_in(trainer)
        assert strategy is not None
        indices = np.unique(np.concatenate(strategy.shards))
        collate, size = dataset.collate, strategy.sampler.work.batch_size
        dataset = dataset.dataset
    if size is None and loader.batch_sampler is not None:
        size = DEFAULT_BATCH_SIZE
    if size is not None:  # otherwise the data set itself comes in batches
        size = batch_size or size
    numbers = np.asarray(range(len(dataset)) if indices is None else indices)
    ranks = 1 if is_elastic(trainer) else trainer.world_size
    shared = len(numbers) >= ranks
    if shared:
        numbers = numbers[trainer.global_rank % ranks :: ranks]
    limit = len(numbers) if max_batches is None else max_batches * (size or 1)
    if limit < len(numbers):
        numbers = numbers[np.linspace(0, len(numbers), limit, endpoint=False).astype(int)]
    loading = {**loading_of(loader), "persistent_workers": False}
    own: Any = DataLoader(dataset, batch_size=size, sampler=numbers.tolist(), collate_fn=collate, **loading)
    return Samples(own, shared, max_batches)


def training_loader(trainer: Trainer) -> Any:
    """The fit's training loader."""
    combined = trainer.fit_loop._combined_loader
    loaders = [] if combined is None else combined.flattened
    if len(loaders) != 1:
        raise ValueError(f"data='train' needs one training loader, but there are {len(loaders)}: use data='val'.")
    return loaders[0]


def validation_loader(trainer: Trainer) -> Any:
    """The first of the fit's validation loaders."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._data_source.is_defined():
        loop.setup_data()  # Lightning has not called it yet if validation is due in a later epoch only
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    if not loaders:
        raise ValueError("data='val' needs a validation loader, but there is none: pass one to `fit`, or data='train'.")
    return loaders[0]


def own_sampler(loader: DataLoader[Any]) -> Any:
    """The user's sampler, also where Lightning has wrapped it to divide its samples among ranks."""
    sampler = loader.sampler
    if isinstance(sampler, DistributedSamplerWrapper):
        return getattr(sampler.dataset, "_sampler", sampler)
    return sampler


def federation_in(trainer: Trainer) -> FederatedStrategy | None:
    """The Trainer's strategy if it is a federated one."""
    return trainer.strategy if isinstance(trainer.strategy, FederatedStrategy) else None


def is_elastic(trainer: Trainer) -> bool:
    """Whether ranks may die, so that one must not wait for another."""
    strategy = federation_in(trainer)
    return strategy is not None and strategy.is_elastic


# ---------------------------------------------------------------------------------------------------------- no change


@contextmanager
def undisturbed(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The module in evaluation mode without gradients, in a federation as the consensus model; a collective call.

    Afterwards everything is as before: training flags, buffers, random generators (of Python, NumPy, PyTorch on CPU and
    CUDA), and the client that the module was. ``self.log`` does nothing within.
    """
    modes = {layer: layer.training for layer in module.modules()}
    with ExitStack() as stack:
        stack.enter_context(as_consensus(trainer))
        stack.enter_context(kept_buffers(module))
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.no_grad())
        shadow = module.__dict__.get("log")
        module.__dict__["log"] = lambda *args, **kwargs: None
        try:
            module.eval()
            yield
        finally:
            del module.__dict__["log"]
            if shadow is not None:
                module.__dict__["log"] = shadow
            for layer, mode in modes.items():
                layer.training = mode


@contextmanager
def as_consensus(trainer: Trainer) -> Iterator[None]:
    """In a federation, the module is the consensus model; afterwards again the client that it was."""
    strategy = federation_in(trainer)
    if strategy is None:
        yield
        return
    bound = strategy.bank.bound
    strategy.refresh_consensus()
    try:
        yield
    finally:
        if bound is not None:
            strategy.bank.bind_client(bound)


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Undo what a forward pass does to buffers even in evaluation mode."""
    before = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for owner, name, buffer, value in before:
            owner._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)


# ------------------------------------------------------------------------------------------------------- which layers


class Seen(NamedTuple):
    """One batch, as the layers that are looked at have seen it.

    Attributes:
        features: of each layer, ``[B, d]``; under ``""`` those that the classifier is measured with.
        logits: of the classifier, ``[B, C]``.
        labels: integer ``[B]``.
    """

    features: dict[str, Tensor]
    logits: Tensor
    labels: Tensor


class FeatureTap:
    """Reads layers by forward hooks, which exist only while :meth:`batches` runs.

    Args:
        module: the user's module.
        head: name of the classifier; None: the layer with a weight matrix whose output the module returns.
        layer: name of the layer whose output is the feature; None: the input of the head.
        layers: names of further layers.
        split_batch: from a batch to ``(inputs, labels)``; None: its first two elements.
        pool: from a layer's output to ``[B, d]``; None: a mean over the positions of feature maps ``[B, d, H, W]``.

    Raises:
        ValueError: if no layer has one of the names.
    """

    def __init__(
        self,
        module: LightningModule,
        head: str | None,
        layer: str | None,
        layers: Iterable[str],
        split_batch: SplitBatch | None,
        pool: Pool | None,
    ) -> None:
        self.module = module
        self.head = None if head is None else layer_named(module, head, "head")
        self.layers = {name: layer_named(module, name, "layers") for name in layers}
        if layer is not None:
            self.layers[""] = layer_named(module, layer, "layer")
        self.layer = layer
        self.split_batch = split_batch or first_two
        self.pool = pool

    def batches(self, trainer: Trainer, samples: Samples) -> Generator[Seen, None, None]:
        """Run the module's ``forward`` on each batch, as Lightning would (transfer, precision).

        Raises:
            ValueError: if a layer yields no feature vectors, or the head is not found.
        """
        seen: dict[str, Any] = {}
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(hooked(layer, seen, output=name))
            if self.head is not None:
                stack.enter_context(hooked(self.head, seen, output="logits of the head", input="input of the head"))
            for batch in islice(samples.batches, samples.limit):
                inputs, labels = self.split_batch(on_device(trainer, self.module, batch))
                seen.clear()
                with trainer.precision_plugin.forward_context():
                    if self.head is None:
                        self.head = self._find_head(inputs)
                        stack.enter_context(
                            hooked(self.head, seen, output="logits of the head", input="input of the head")
                        )
                    self.module(inputs)
                yield self._checked(seen, labels)

    def _checked(self, seen: dict[str, Any], labels: Tensor) -> Seen:
        silent = [name or str(self.layer) for name in self.layers if name not in seen]
        if "logits of the head" not in seen or silent:
            raise ValueError(
                f"the layers {silent or ['head']} did not run in `{type(self.module).__name__}.forward`, which the "
                "features are taken from: name layers that do."
            )
        logits = seen["logits of the head"]
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(
                f"the head yields {described(logits)}, but must yield logits [batch, classes]: name another head=."
            )
        names = {name: name or str(self.layer) for name in self.layers}
        taken = {name: self._feature(shown, seen[name], labels) for name, shown in names.items()}
        if self.layer is None:
            taken[""] = self._feature("input of the head", seen.get("input of the head"), labels)
        return Seen(taken, logits, labels)

    def _feature(self, name: str, output: Any, labels: Tensor) -> Tensor:
        feature = output if self.pool is None else self.pool(output)
        if self.pool is None and isinstance(feature, Tensor) and feature.ndim >= 4:
            feature = feature.flatten(2).mean(dim=2)
        if not isinstance(feature, Tensor) or feature.ndim != 2 or len(feature) != len(labels):
            raise ValueError(
                f"layer {name!r} yields {described(feature)} for {len(labels)} labels, but a feature is a vector a "
                f"sample, [{len(labels)}, d] (or feature maps [{len(labels)}, d, height, width], which are averaged): "
                "name another layer, or pass pool=, a function from its output to vectors."
            )
        return feature

    def _find_head(self, inputs: Any) -> nn.Module:
        """The layer with a weight matrix whose output is what ``forward`` returns."""
        outputs: dict[str, Any] = {}
        candidates = {name: layer for name, layer in self.module.named_modules() if is_classifier(layer)}
        with ExitStack() as stack:
            for name, layer in candidates.items():
                stack.enter_context(hooked(layer, outputs, output=name, keep=True))
            result = self.module(inputs)
        found = [name for name, output in outputs.items() if output is result]
        if not found:
            raise ValueError(
                f"`{type(self.module).__name__}.forward` does not return the output of a linear layer, so the "
                f"classifier must be named: head=..., perhaps one of {list(candidates)[-5:]}."
            )
        return candidates[found[-1]]


@contextmanager
def hooked(layer: nn.Module, into: dict[str, Any], output: str, input: str | None = None, keep: bool = False) -> Any:
    """Put copies of a layer's output, and of its first input, into a dictionary; ``keep``: the very same output."""

    def copy(value: Any) -> Any:  # an in-place operation may follow
        return value.detach().clone() if isinstance(value, Tensor) else value

    def after(layer: nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
        into[output] = result if keep else copy(result)

    def before(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if input is not None and inputs:
            into[input] = copy(inputs[0])

    hooks = [layer.register_forward_hook(after), layer.register_forward_pre_hook(before)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def on_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """The batch as Lightning passes it to a step."""
    batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    return trainer.strategy.batch_to_device(batch)


def first_two(batch: Any) -> tuple[Any, Tensor]:
    """``(inputs, labels)`` of a batch that begins with them."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise ValueError(
            f"a batch is {described(batch)}, not (inputs, labels): pass split_batch=, a function from a batch to these."
        )
    return batch[0], batch[1]


def layer_named(module: nn.Module, name: str, argument: str) -> nn.Module:
    """A submodule by its dotted name.

    Raises:
        ValueError: if there is none, with the names that come nearest.
    """
    layers = {known: layer for known, layer in module.named_modules() if known}
    if name not in layers:
        same_end = [known for known in layers if known.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        near = dict.fromkeys([*same_end[:3], *difflib.get_close_matches(name, list(layers), n=3, cutoff=0.3)])
        names = list(near) or list(layers)
        raise ValueError(f"{argument}: {type(module).__name__} has no layer {name!r}. The nearest names: {names}.")
    return layers[name]


def is_classifier(layer: nn.Module) -> bool:
    """Whether a layer has a weight matrix, ``[C, d]``, as a linear layer does."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def described(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
