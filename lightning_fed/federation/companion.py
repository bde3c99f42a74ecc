"""The callback that a federated strategy brings along, for the hooks that Lightning gives to callbacks only."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_fed.federation.preemption import Preemption
from lightning_fed.federation.rounds import start_round
from lightning_fed.federation.running_values import running_values, take_running_values
from lightning_fed.federation.sampler import JointBatch

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy


class Companion(Callback):
    """Begins rounds, publishes logs, and watches monitors. First of the Trainer's callbacks."""

    def __init__(self, strategy: FederatedStrategy) -> None:
        self.strategy = strategy
        self._fits = 0
        self._preemption: Preemption | None = None

    @classmethod
    def accompany(cls, trainer: Trainer, strategy: FederatedStrategy) -> None:
        """Become the first callback of a Trainer, once."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, cls) for callback in callbacks):
            callbacks.insert(0, cls(strategy))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Every batch would begin with a broadcast that keeps the ranks in lock step, and that pairs with other
        # collectives as soon as one rank has more batches.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if self.strategy.is_elastic:
            self._leave_to_leader(trainer)
            if not self.strategy.is_global_zero:
                self._log_apart(trainer)
        # What steps log is reduced over ranks already; what hooks log is compared if it is monitored.
        warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\(.*sync_dist=True")
        before_transfer = type(pl_module)._on_before_batch_transfer
        owners = [owner for owner in (pl_module, trainer.datamodule) if owner is not None]  # type: ignore[attr-defined]
        has_hook = any(is_overridden("on_before_batch_transfer", owner) for owner in owners)

        def of_each_client(batch: Any, dataloader_idx: int = 0) -> Any:
            if not isinstance(batch, JointBatch):
                return before_transfer(pl_module, batch, dataloader_idx)
            if has_hook:
                batch.replace(lambda minibatch: before_transfer(pl_module, minibatch, dataloader_idx), one_by_one=True)
            return batch

        pl_module.__dict__["_on_before_batch_transfer"] = of_each_client

        if stage == "fit":
            self._fits += 1
            self._preemption = Preemption(self.strategy, trainer, self._fits)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._preemption is not None:
            self._preemption.after_exception(exception)
            self._preemption.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._preemption is not None:
            self._preemption.forget()
            self._preemption = None
        pl_module.__dict__.pop("_on_before_batch_transfer", None)
        for replaced in ("_broadcast_sigterm_tensor", "_should_check_val_fx", "_build_kwargs"):
            trainer.fit_loop.epoch_loop.__dict__.pop(replaced, None)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            for replaced in ("_should_skip_check", "_should_skip_saving_checkpoint"):
                callback.__dict__.pop(replaced, None)

    def _log_apart(self, trainer: Trainer) -> None:
        """A rank that takes over must log beside what other leaders have logged: a CSVLogger would delete that."""
        for logger in trainer.loggers:
            if getattr(logger, "_experiment", None) is None and hasattr(logger, "_version"):
                version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
                logger._version = f"{version}_rank_{self.strategy.global_rank}"

    def _leave_to_leader(self, trainer: Trainer) -> None:
        """In an elastic federation one rank validates, and only there callbacks find the metrics that they monitor."""
        strategy, loop = self.strategy, trainer.fit_loop.epoch_loop
        is_due = loop._should_check_val_fx
        loop._should_check_val_fx = lambda data_fetcher: (  # type: ignore[method-assign]
            strategy.is_global_zero and is_due(data_fetcher)
        )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            for skips in ("_should_skip_check", "_should_skip_saving_checkpoint"):
                if isinstance(callback, (EarlyStopping, ModelCheckpoint)) and hasattr(type(callback), skips):
                    callback.__dict__[skips] = partial(self._is_not_mine, getattr(type(callback), skips), callback)

    def _is_not_mine(self, skips: Callable[[Any, Trainer], bool], callback: Callback, trainer: Trainer) -> bool:
        return not self.strategy.is_global_zero or skips(callback, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.fit_loop._combined_loader
        if loader is not None and len(loader.flattened) > 1:
            raise ValueError(
                f"{len(loader.flattened)} training loaders were given, but a client draws its minibatches from one: "
                "combine the data sets, or call one loader inside a collate function."
            )

        # Lightning would look at the signature of `training_step` again for every batch.
        trainer.fit_loop.epoch_loop._build_kwargs = self._arguments_of_step  # type: ignore[method-assign]

    def _arguments_of_step(self, kwargs: OrderedDict[str, Any], batch: Any, batch_idx: int) -> OrderedDict[str, Any]:
        kwargs["batch"] = batch
        if self.strategy.local_step.takes_batch_idx:
            kwargs["batch_idx"] = batch_idx
        return kwargs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        in_rows = {id(parameter) for parameter in self.strategy.bank.parameters}
        thawed = [
            name for name, value in pl_module.named_parameters() if value.requires_grad and id(value) not in in_rows
        ]
        if thawed:
            raise ValueError(
                f"the parameters {thawed[:5]} became trainable during the fit, but rows hold those that were trainable "
                "at its start, so clients would share them unknowingly: set requires_grad before the fit."
            )
        work = self.strategy.sampler.work
        if trainer.accumulate_grad_batches != work.accumulate:
            raise ValueError(
                f"accumulate_grad_batches changed from {work.accumulate} to {trainer.accumulate_grad_batches} during "
                "the fit, but a federation's rounds are planned with a fixed number: set it in the Trainer instead of "
                "a GradientAccumulationScheduler."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        local_step = self.strategy.local_step
        local_step.joint, local_step.batch_idx = batch, batch_idx
        take_running_values(local_step)
        local_step.epoch_is_over, local_step.values_before_validation = False, None
        if local_step.shows_batches:
            batch.replace(lambda minibatch: minibatch, one_by_one=True)
        if batch.index == 0:
            start_round(self.strategy)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.strategy.local_step.before_optimizer_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.strategy.local_step.logs.publish_step()
        if self._preemption is not None:
            self._preemption.look(batch.is_last_of_round)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peers = self.strategy.peers
        if peers is not None and self.strategy.is_global_zero:
            peers.survivors.end()
            if trainer.should_stop and not peers.is_stopped:
                peers.stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peers = self.strategy.peers
        if peers is not None and peers.is_stopped:
            trainer.should_stop = True
        take_running_values(self.strategy.local_step)
        gather = self.strategy.gather_logs if peers is None else peers.gather_logs
        self.strategy.local_step.logs.publish_epoch(gather)
        self.strategy.local_step.epoch_is_over = True
        if self.strategy.joint_index:
            rank_zero_warn(
                f"epoch {trainer.current_epoch} ended within round {self.strategy.round} (after "
                f"{self.strategy.joint_index} joint steps), which goes on in the next epoch: limit_train_batches, "
                "max_steps and fast_dev_run count joint steps, and clients communicate at the end of a round only. Use "
                "local_steps for shorter rounds."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            local_step = self.strategy.local_step
            take_running_values(local_step)
            local_step.values_before_validation = running_values(local_step)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.strategy.evaluation.publish()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.strategy.evaluation.publish()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._check_monitors(trainer)

    def _check_monitors(self, trainer: Trainer) -> None:
        """Refuse a monitored metric that ranks disagree on: they would save and stop at different times.

        Runs after each validation, that of the sanity check included, which comes before the first training step
        (unless ``num_sanity_val_steps=0``).

        Raises:
            ValueError: naming the metric and each rank's value.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [c.monitor for c in callbacks if isinstance(c, (ModelCheckpoint, EarlyStopping))]
        monitors += [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
        metrics = trainer.callback_metrics
        mine = {name: float(metrics[name]) for name in monitors if name is not None and name in metrics}
        ranks = self.strategy.gather_plain(mine)
        for name in {name for values in ranks for name in values}:
            values = [values.get(name) for values in ranks]
            if len({str(value) for value in values}) > 1:
                raise ValueError(
                    f"the monitored metric {name!r} differs between ranks ({values}; None: not logged), so they would "
                    "save and stop at different times: log it in `validation_step`, where it is reduced over ranks, or "
                    "with sync_dist=True."
                )
