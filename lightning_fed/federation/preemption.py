"""How a run that is told to end, or that fails, saves itself: at a place where all ranks are, and nothing is half done.

Lightning's own handlers communicate and save at whatever instruction a signal arrives. Here a signal leaves a note. One
rank alone looks at it after each joint step; several ranks compare theirs at the end of a round, where they meet
anyway.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy

# How long a rank that has failed waits for the others to fail at the same place.
SECONDS_TO_MEET = 5.0


class Preemption:
    """Ends a fit, or requeues its job, when a signal has asked for it; decides what is saved after an exception.

    Args:
        strategy: the federation.
        trainer: its Trainer.
        fit: number of the fit, the same on all ranks.
    """

    def __init__(self, strategy: FederatedStrategy, trainer: Trainer, fit: int) -> None:
        self.strategy = strategy
        self.trainer = trainer
        self.fit = fit
        self._ends = self._requeues = False
        self._signals = trainer._signal_connector
        self._requeue: Callable[[int, Any], None] = self._signals._slurm_sigusr_handler_fn
        # Lightning registers what it finds under these names at the end of the set-up.
        vars(self._signals).update(_sigterm_notifier_fn=self._note_end, _slurm_sigusr_handler_fn=self._note_requeue)
        for callback in self._checkpoint_callbacks():
            if callback.__dict__.get("on_exception") is save_nothing:
                del callback.__dict__["on_exception"]

    def _note_end(self, signum: int, frame: FrameType | None) -> None:
        if not self._ends and self.strategy.launcher is not None:
            self.strategy.launcher.kill(signum)  # the ranks that this one has started
        self._ends = True

    def _note_requeue(self, signum: int, frame: FrameType | None) -> None:
        self._requeues = True

    def look(self, round_is_over: bool) -> None:
        """Do what signals have asked for, if this is the place. Every rank calls it after each of its joint steps."""
        strategy = self.strategy
        if strategy.world_size > 1 and not strategy.is_elastic:
            if not round_is_over:
                return
            ranks = strategy.gather_plain((self._ends, self._requeues))
            self._ends, self._requeues = (any(notes) for notes in zip(*ranks))
        if self._requeues:
            self._requeues = False
            self._requeue(signal.SIGUSR1, None)
        if self._ends and not self._signals.received_sigterm:
            rank_zero_info(
                f"SIGTERM: the fit ends in round {strategy.round}, before its joint step {strategy.joint_index}."
            )
            self._signals.received_sigterm = True  # Lightning raises at the end of the batch

    def forget(self) -> None:
        """Give Lightning its handlers back."""
        for name in ("_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"):
            vars(self._signals).pop(name, None)

    def after_exception(self, exception: BaseException) -> None:
        """Keep callbacks from saving what could not be resumed: half a joint step, or ranks at different places.

        A rank that has failed alone would also wait for ranks that wait for it.
        """
        strategy = self.strategy
        place = f"round {strategy.round}, joint step {strategy.joint_index}"
        if strategy.is_within_joint_step:
            reason = f"in the middle of {place}"
        elif strategy.world_size == 1 or strategy.is_elastic or all_are_at(place, self.fit):
            return
        else:
            reason = f"at {place}, where the other ranks are not"
        # Not only on rank zero, which may live.
        print(
            f"rank {strategy.global_rank}: {type(exception).__name__} {reason}, so the federation is not saved as it "
            "is now: resume from the last checkpoint.",
            flush=True,
        )
        for callback in self._checkpoint_callbacks():
            callback.__dict__["on_exception"] = save_nothing

    def _checkpoint_callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, Checkpoint)]


def save_nothing(trainer: Trainer, *args: Any) -> None:
    """What checkpoint callbacks do instead after some exceptions."""


def all_are_at(place: str, fit: int) -> bool:
    """Whether all ranks have failed, at one place."""
    if not dist.is_initialized():
        return False
    keys = [f"lightning_fed/failed in fit {fit}/{rank}" for rank in range(dist.get_world_size())]
    store = dist.distributed_c10d._get_default_store()
    places: list[str] = []

    def ask() -> None:
        # With an error if the others live, or the process that has the store does not.
        with suppress(dist.DistError, RuntimeError):
            store.set(keys[dist.get_rank()], place)
            store.wait(keys, timedelta(seconds=SECONDS_TO_MEET))
            places.extend(store.get(key).decode() for key in keys)

    # If the process that has the store is stopped, no time-out ends the wait for its answer.
    asking = threading.Thread(target=ask, name="failed ranks", daemon=True)
    asking.start()
    asking.join(2 * SECONDS_TO_MEET)
    return places == [place] * len(keys)
