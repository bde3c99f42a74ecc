"""Follows the curvature of the training loss while a model trains, under any strategy and without a change to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset, Subset
from torchmetrics import Metric

from lightning_fed.callbacks.feature_pass import as_consensus, described, is_elastic, on_device, samples_of
from lightning_fed.checks import check_callables, check_choice, check_counts, check_names, check_numbers, given
from lightning_fed.curvature import Hessian, loss_along, stability_threshold, top_eigenvalue, trace
from lightning_fed.federation.randomness import seed_generators
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.second_pass import loss_of, on_gpu, restored_buffers, unlogged
from lightning_fed.sharpness import ascent, check_ball

# Of start vectors, signs, drawn samples, dropout masks: the same in each measurement, so that curves are smooth.
SEED = 0
# The loss is looked at for 0, 1, ..., 10 times rho.
MULTIPLES = range(11)


class SharpnessMonitor(Callback):
    """Measures the top Hessian eigenvalue, the trace, and how the loss rises towards the worst point around the model.

    On a fixed batch: samples drawn from the data by a fixed seed, the same in each measurement. Every rank computes all
    of it, so that the numbers do not depend on how many there are. (The ranks of an iterable data set have batches of
    their own; the mean is logged.) Measured are the model at the start of the fit, that of every ``every_n_epochs``
    epochs, and the last one. Training goes on bit by bit as without it. In a federation the consensus model is
    measured, on samples of all clients. Under mixed precision the loss is evaluated without autocast, in the weights'
    float32. Not for strategies that split the module itself over ranks (FSDP).

    Logged for all loggers and, at the end of epochs, for ``ModelCheckpoint`` with ``save_on_train_epoch_end=True``:

    * ``sharpness/top_eigenvalue``: the largest (not: largest in magnitude) of the Hessian of the mean loss;
    * ``sharpness/trace``, and its standard error ``sharpness/trace_error``;
    * ``sharpness/ascent_rise``: ``L(w + rho g / ||g||) - L(w)``, g the gradient of the same batch: SAM's sharpness;
    * if the optimizer is one ``torch.optim.SGD`` with one learning rate: ``sharpness/threshold``, at which full-batch
      descent on a quadratic becomes unstable (``2 / lr``; more with momentum), and ``sharpness/stability``,
      ``top_eigenvalue / threshold``, which is ``top_eigenvalue lr / 2`` for plain SGD: 1 is the edge of stability.

    :class:`~lightning_fed.callbacks.GeometryReport` draws them.

    Args:
        every_n_epochs: measure after every so many epochs.
        num_batches: of the fixed batch; more of them cost time, not memory.
        batch_size: samples of each; None for the loader's.
        data: ``"train"``, or the (first) ``"val"`` loader's data set.
        rho: the radius of ``ascent_rise`` (SAM's default), and a tenth of the largest one in the picture.
        iterations: of power iteration, at most.
        tolerance: stop earlier if ``||H v - value v||`` is below this share of the value.
        trace_samples: vectors of Hutchinson's estimate.
        mode: ``"eval"``, or ``"train"``: modules in the modes in which they train, with BatchNorm's batch statistics
            and one fixed mask of dropout.
        loss: from the module and a batch (on its device) to a scalar; None: what ``training_step`` returns. A module
            with manual optimization needs it.
        prefix: of the logged names. Two monitors need two.

    Raises:
        ValueError: if a setting is out of range; at the start of the fit, if the strategy splits modules or there is no
            loss to take; at the first measurement, if ``training_step`` returns none.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        num_batches: int = 8,
        batch_size: int | None = None,
        data: Literal["train", "val"] = "train",
        rho: float = 0.05,
        iterations: int = 100,
        tolerance: float = 0.01,
        trace_samples: int = 20,
        mode: Literal["eval", "train"] = "eval",
        loss: Callable[[LightningModule, Any], Tensor] | None = None,
        prefix: str = "sharpness",
    ) -> None:
        check_counts(every_n_epochs=every_n_epochs, num_batches=num_batches, iterations=iterations)
        check_counts(**given(batch_size=batch_size))
        check_counts(2, trace_samples=trace_samples)
        check_callables(**given(loss=loss))
        check_names(prefix=prefix)
        check_numbers(tolerance=tolerance)
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance} must be in (0, 1): a share of the eigenvalue.")
        check_ball(rho)
        if rho == 0:
            raise ValueError("rho=0 is no radius: the loss does not rise over no distance (SAM's default is 0.05).")
        check_choice("data", data, "train", "val")
        check_choice("mode", mode, "eval", "train")
        self.every_n_epochs, self.num_batches, self.batch_size, self.data = (
            every_n_epochs,
            num_batches,
            batch_size,
            data,
        )
        self.rho, self.iterations, self.tolerance, self.trace_samples = rho, iterations, tolerance, trace_samples
        self.mode, self.loss, self.prefix = mode, loss, prefix
        # For each logged name without prefix, (epochs done, value).
        self.curves: dict[str, list[tuple[int, float]]] = {}
        # For the first and the last measurement: epochs done, and the loss at each radius of `radii`.
        self.profiles: list[tuple[int, list[float]]] = []
        self._batches: list[Any] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)

    @property
    def radii(self) -> list[float]:
        """Distances from the model, along the ascent direction, at which the loss is measured."""
        return [self.rho * multiple for multiple in MULTIPLES]

    # --------------------------------------------------------------------------------------------------------- when

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, FederatedStrategy)):
            raise ValueError(
                f"{type(self).__name__} needs whole weights on each rank, which {type(trainer.strategy).__name__} does "
                "not keep: use strategy='auto', 'ddp' or one of lightning_fed."
            )
        if self.loss is None and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} has manual optimization, so its training_step would step the optimizers: "
                f"pass {type(self).__name__}(loss=...), a function from the module and a batch to the loss."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch
        kept = {name: [point for point in points if point[0] <= done] for name, points in self.curves.items()}
        self.curves = {name: points for name, points in kept.items() if points}
        self.profiles = [profile for profile in self.profiles if profile[0] <= done]
        self._batches = []
        if not self.curves and self._is_mine(trainer):
            self._log_apart(trainer, self._measure(trainer, pl_module, done))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch + 1
        if done % self.every_n_epochs or not self._is_mine(trainer):
            return
        for name, value in self._measure(trainer, pl_module, done).items():
            # Ranks have the same value already; sync_dist keeps Lightning from asking for it.
            pl_module.log(name, value, on_step=False, on_epoch=True, sync_dist=not is_elastic(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch
        if self._is_mine(trainer) and (not self.profiles or done > self.profiles[-1][0]):
            self._log_apart(trainer, self._measure(trainer, pl_module, done))
        self._batches = []

    @staticmethod
    def _is_mine(trainer: Trainer) -> bool:
        """Whether this rank measures: all do, but where ranks may die, one speaks for all."""
        return trainer.is_global_zero or not is_elastic(trainer)

    @staticmethod
    def _log_apart(trainer: Trainer, values: dict[str, float]) -> None:
        """Log where Lightning has no epoch to log for."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": trainer.current_epoch, **values}, step=step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "curves": {name: list(points) for name, points in self.curves.items()},
            "profiles": [(done, list(losses)) for done, losses in self.profiles],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {name: list(points) for name, points in state_dict["curves"].items()}
        self.profiles = [(done, list(losses)) for done, losses in state_dict["profiles"]]

    # --------------------------------------------------------------------------------------------------------- what

    def _measure(self, trainer: Trainer, module: LightningModule, done: int) -> dict[str, float]:
        """All numbers of the module as it is now, under their logged names; in a federation a collective call."""
        with untouched(trainer, module, self.mode):
            if not self._batches:
                seed_generators(SEED, module.device)
                number = 1 if trainer.fast_dev_run else self.num_batches  # type: ignore[attr-defined]
                self._batches = fixed_batches(trainer, self.data, number, self.batch_size)
            seed_generators(SEED, module.device)
            batches = [on_device(trainer, module, batch) for batch in self._batches]
            losses = [partial(self._evaluate, trainer, module, batch, index) for index, batch in enumerate(batches)]
            hessian = Hessian(losses, module.parameters())
            gradient = hessian.gradient()
            top = top_eigenvalue(hessian, self.iterations, self.tolerance, seed=SEED)
            estimate = trace(hessian, self.trace_samples, seed=SEED)
            direction = ascent(hessian.parameters, gradient, rho=1.0)
            profile = loss_along(losses, hessian.parameters, direction, self.radii)
        self.profiles = [*self.profiles[:1], (done, profile)]
        values = {
            "top_eigenvalue": top.value,
            "trace": estimate.value,
            "trace_error": estimate.error,
            "ascent_rise": profile[1] - profile[0],
        }
        threshold = threshold_of(trainer)
        if threshold is not None:
            values |= {"threshold": threshold, "stability": top.value / threshold}
        for name, value in values.items():
            self.curves.setdefault(name, []).append((done, value))
        return {f"{self.prefix}/{name}": value for name, value in values.items()}

    def _evaluate(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> Tensor:
        """The loss of one batch, with the random numbers of every other time."""
        seed_generators(SEED + index, module.device)
        plugin = trainer.precision_plugin
        with nullcontext() if isinstance(plugin, MixedPrecision) else plugin.forward_context():
            if self.loss is not None:
                loss: Tensor | None = self.loss(module, batch)
            else:
                takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
                loss = loss_of(module.training_step(*(batch, index) if takes_index else (batch,)), 1)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not (loss.requires_grad or not torch.is_grad_enabled()):
            source = "loss=" if self.loss is not None else f"{type(module).__name__}.training_step"
            raise ValueError(
                f"{source} gave {described(loss)} for batch {index} of the fixed batch, but {type(self).__name__} "
                "needs a scalar loss that depends on the parameters: pass loss=, a function from the module and a "
                "batch to it."
            )
        return loss.reshape(())


@contextmanager
def untouched(trainer: Trainer, module: LightningModule, mode: str) -> Iterator[None]:
    """The module as the consensus model and in the mode that is asked for; what is done with it leaves no trace.

    Neither in buffers, metrics, logs, training flags and random generators, nor in which client the module is.
    """
    modes = {layer: layer.training for layer in module.modules()}
    with ExitStack() as stack:
        stack.enter_context(as_consensus(trainer))
        stack.enter_context(isolate_rng(include_cuda=on_gpu(module)))
        stack.enter_context(restored_buffers(module))
        # A compiled step has no second derivative.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for part in module.modules():
            if isinstance(part, LightningModule):
                stack.enter_context(unlogged(part))
            elif isinstance(part, Metric):
                stack.enter_context(restored_metric(part))
        try:
            if mode == "eval":
                module.eval()
            yield
        finally:
            for layer, training in modes.items():
                layer.training = training


@contextmanager
def restored_metric(metric: Metric) -> Iterator[None]:
    """Undo updates. (A metric that is only silenced returns its last value, but before the first step it has none.)"""
    about = {name: metric.__dict__[name] for name in ("_update_count", "_computed", "_forward_cache")}
    values: dict[str, Any] = {name: getattr(metric, name) for name in metric._defaults}
    saved: dict[str, Any] = metric._copy_state_dict()
    try:
        yield
    finally:
        metric.__dict__.update(about)
        for name, value in values.items():
            setattr(metric, name, value)
            if isinstance(value, list):
                value[:] = saved[name]
            elif not torch.equal(value, saved[name]):
                value.copy_(saved[name])


def fixed_batches(trainer: Trainer, data: str, num_batches: int, batch_size: int | None) -> list[Any]:
    """Batches of samples drawn from the data set; a data set without an order of its own gives its first ones.

    The first ones of all data sets would be of one class where samples are sorted by class.

    Raises:
        ValueError: if there is none.
    """
    loader = samples_of(trainer, data, batch_size).batches
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        size = len(loader.dataset)  # type: ignore[arg-type]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(SEED))
        drawn = Subset(loader.dataset, order[: num_batches * (loader.batch_size or 1)].tolist())
        loader = DataLoader(drawn, loader.batch_size, collate_fn=loader.collate_fn)
    batches = list(islice(loader, num_batches))
    if not batches:
        raise ValueError(f"data={data!r}: there is no batch to measure sharpness on.")
    return batches


def threshold_of(trainer: Trainer) -> float | None:
    """The eigenvalue at the edge of stability of the Trainer's optimizer; None if it is not known."""
    if len(trainer.optimizers) != 1 or not isinstance(trainer.optimizers[0], SGD):
        return None
    settings = {
        (float(group["lr"]), group["momentum"], group["nesterov"], group["dampening"])
        for group in trainer.optimizers[0].param_groups
    }
    lr, momentum, nesterov, dampening = settings.pop()
    if settings or dampening or not 0 < lr < math.inf:
        return None
    return stability_threshold(lr, momentum, nesterov)
