"""A progress bar that speaks of rounds."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_fed.callbacks.federation_monitor import accuracies_in, federation_of
from lightning_fed.checks import check_counts, check_flags

SECONDS_BETWEEN_LOG_LINES = 10.0


class RoundProgressBar(TQDMProgressBar):
    """``Round 12/60: 100%|███| 8/8 [..., cohort=10, val/acc=0.912, consensus=0.034]``: the joint steps of an epoch.

    Beside the cohort's size it shows an accuracy that validation logged, the consensus distance if a
    :class:`~lightning_fed.callbacks.FederationMonitor` measures it, and what the module logs with ``prog_bar=True``.
    Where the output is neither a terminal nor a notebook (CI, a batch system), it draws at most every ten seconds and
    leaves out the bars of validations inside a fit.

    Args:
        refresh_rate: joint steps between updates; 0 switches the bar off.
        process_position: lines to leave free above, for other bars.
        leave: keep the finished bar of every epoch.

    Raises:
        ValueError: at set-up, if the Trainer's strategy is not a federated one.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        check_counts(0, refresh_rate=refresh_rate, process_position=process_position)
        check_flags(leave=leave)
        super().__init__(refresh_rate, process_position, leave)
        self._round = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._round = federation_of(trainer, self).round

    @property
    def total_train_batches(self) -> int | float:
        # Lightning puts what `max_steps` leaves in the place of an unknown length; an epoch is shorter than that.
        return math.inf if math.isinf(self.trainer.num_training_batches) else super().total_train_batches

    def init_train_tqdm(self) -> Tqdm:
        return super().init_train_tqdm() if is_interactive() else self._log_lines(self.train_description)

    def init_sanity_tqdm(self) -> Tqdm:
        return super().init_sanity_tqdm() if is_interactive() else Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        if is_interactive():
            return super().init_validation_tqdm()
        if self.trainer.state.fn == "fit":
            return Tqdm(disable=True)
        return self._log_lines(self.validation_description)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._describe(trainer, federation_of(trainer, self).round)
        self.train_progress_bar.refresh()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The batch's own round: the strategy's has already moved on if this was the last step of the round.
        self._describe(trainer, batch.round)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        strategy = federation_of(trainer, self)
        shown: dict[str, Any] = {
            "cohort": strategy.participation.cohort(self._round, strategy.num_clients, strategy.seed).size
        }
        accuracies = accuracies_in(trainer)
        if accuracies:
            name = min(accuracies, key=len)  # not its minimum over clients, say
            shown[name] = accuracies[name]
        if "fed/consensus_distance" in trainer.callback_metrics:
            shown["consensus"] = float(trainer.callback_metrics["fed/consensus_distance"])
        logged = super().get_metrics(trainer, pl_module)
        logged.pop("v_num", None)
        return {**shown, **logged}

    def _describe(self, trainer: Trainer, round: int) -> None:
        """Name the round that is under way, to be seen at the next refresh."""
        self._round = round
        per_epoch = federation_of(trainer, self).sampler.rounds_per_epoch
        known = trainer.max_epochs is not None and trainer.max_epochs >= 0
        total = f"/{trainer.max_epochs * per_epoch}" if known else ""  # type: ignore[operator]
        self.train_progress_bar.set_description(f"Round {round + 1}{total}", refresh=False)

    def _log_lines(self, description: str) -> LogLines:
        return LogLines(desc=description, disable=self.is_disabled, file=sys.stdout, bar_format=self.BAR_FORMAT)


class LogLines(Tqdm):
    """A bar for a log file: it draws when it is new, when it closes, and at most every ten seconds in between."""

    _drawn_at = float("-inf")

    def refresh(self, *args: Any, **kwargs: Any) -> bool | None:
        if time.monotonic() - self._drawn_at < SECONDS_BETWEEN_LOG_LINES:
            return None
        self._drawn_at = time.monotonic()
        drawn: bool | None = super().refresh(*args, **kwargs)
        return drawn


def is_interactive() -> bool:
    """Whether somebody watches: a terminal or a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules
