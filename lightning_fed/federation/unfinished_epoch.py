"""The end of an epoch to which an interrupted run has not come.

A checkpoint that is saved behind an epoch's last joint step lacks what belongs to the end of the epoch: validation,
what was logged in the epoch, and what callbacks make of both, as the count of ``EarlyStopping``. Lightning resumes it
with the next epoch, and would leave all that out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.progress import _ProcessedTracker

from lightning_fed.federation.running_values import take_running_values

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy


def finish_epoch(strategy: FederatedStrategy) -> None:
    """Come to the end of an epoch whose joint steps were all done when the run was interrupted; else do nothing.

    For the strategy's ``on_train_start``, which comes after those of callbacks.
    """
    module = strategy.lightning_module
    assert module is not None
    trainer, fit_loop, epoch_loop = module.trainer, module.trainer.fit_loop, module.trainer.fit_loop.epoch_loop
    if not (epoch_loop.restarted_on_train_batch_end and epoch_loop.batch_progress.is_last_batch):
        return
    count_epoch_as_begun(fit_loop)
    # From here on as in an epoch's last `on_train_batch_end`, and after it.
    trainer._logger_connector.on_batch_start(None)
    module._current_fx_name = "on_train_batch_end"
    take_running_values(strategy.local_step)
    strategy.local_step.logs.publish_step()
    module._current_fx_name = None
    trainer._logger_connector.on_batch_end()
    epoch_loop.batch_progress.increment_completed()
    trainer._logger_connector.update_train_step_metrics()
    assert fit_loop._data_fetcher is not None
    epoch_loop.on_advance_end(fit_loop._data_fetcher)
    fit_loop.on_advance_end()


def count_epoch_as_begun(fit_loop: _FitLoop) -> None:
    """Take back that Lightning has counted the epoch as done, and that it would skip the begin of the next one."""
    for count in (fit_loop.epoch_progress.current, fit_loop.epoch_progress.total):
        assert isinstance(count, _ProcessedTracker)
        count.processed -= 1
        count.completed -= 1
    fit_loop._restarting = False
    fit_loop.reset_restart_stage()
    fit_loop.epoch_loop.restarting = False
    fit_loop.epoch_loop.reset_restart_stage()
