"""Whether a long fit grows: memory, live objects, open files, threads and child processes over thousands of rounds."""

from __future__ import annotations

import gc
import mmap
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from chaos_ranks import Ranks
from chaos_run import Run, module_of, shards, strategy_of, trainer_of
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

SAVE_EVERY_ROUNDS, WARM_UP_ROUNDS = 100, 20
# Rounds whose memory makes one point of the regression: neighbouring rounds are not independent.
BLOCK = 50
SECONDS = 1800.0


class Meter(Callback):
    """Resident memory at the end of each round; live Python objects at the end of each block."""

    def __init__(self, rounds: int) -> None:
        self.process = psutil.Process()
        self.bytes = np.ones(rounds)  # has its memory from the start: a list would grow by what it tells
        self.objects: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bytes[trainer.current_epoch] = self.process.memory_info().rss
        if (trainer.current_epoch + 1) % BLOCK == 0:
            gc.collect()
            self.objects.append(len(gc.get_objects()))


def held() -> tuple[int, int, int]:
    """Open file handles, child processes and threads of this process."""
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), len(process.children(recursive=True)), threading.active_count()


def fit_for_long(strategy: str, rounds: int, folder: str) -> dict[str, Any]:
    """A short fit, to have everything imported, then a long one."""
    results: dict[str, Any] = {}
    for name, epochs in (("before", WARM_UP_ROUNDS), ("after", rounds)):
        seed_everything(0, verbose=False)
        run, meter = Run(strategy, folder, epochs=epochs), Meter(epochs)
        save = ModelCheckpoint(folder, "{epoch}", save_last=True, every_n_epochs=SAVE_EVERY_ROUNDS)
        trainer = trainer_of(run, strategy_of(run, local_steps=1), meter, save)
        data, held_out = shards()
        trainer.fit(module_of(run), DataLoader(data, 12, shuffle=True), DataLoader(held_out, 64))
        del trainer
        results |= {name: held(), "bytes": meter.bytes, "objects": meter.objects}
    return results


def slope(values: np.ndarray, block: int) -> tuple[float, float]:
    """Growth of the second half a round, by least squares on means of blocks, and its standard error."""
    second = values[len(values) // 2 :]
    means = second[: len(second) // block * block].reshape(-1, block).mean(axis=1)
    rounds = block * np.arange(len(means))
    centred = rounds - rounds.mean()
    spread = np.sum(centred**2)
    growth = float(centred @ means / spread)
    left = means - means.mean() - growth * centred
    return growth, float(np.sqrt(left @ left / (len(means) - 2) / spread))


def measure_memory(strategies: list[str], rounds: int) -> int:
    """Print a table, and return how many strategies leak."""
    print(
        "| strategy | rounds | MB at half | MB at the end | growth, bytes a round | live objects, half / end | ", end=""
    )
    print("file handles | processes | threads |\n|---|---|---|---|---|---|---|---|---|", flush=True)
    failed = 0
    for name in strategies:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            fit: Callable[..., Any] = partial(fit_for_long, name, rounds, str(Path(folder)))
            with Ranks(1, fit) as ranks:
                end = ranks.ends(SECONDS)[0]
        if end.value is None:
            raise RuntimeError(end.error)
        memory, objects = end.value["bytes"], end.value["objects"]
        growth, error = slope(memory, BLOCK)
        half = f"{memory[len(memory) // 2] / 1e6:.1f} | {memory[-1] / 1e6:.1f}"
        counts = f"{objects[len(objects) // 2]:,} / {objects[-1]:,}"
        changes = " | ".join(f"{a} -> {b}" for a, b in zip(end.value["before"], end.value["after"]))
        print(f"| {name} | {rounds:,} | {half} | {growth:.0f} +- {error:.0f} | {counts} | {changes} |", flush=True)
        grows = growth - 2 * error > mmap.PAGESIZE / (rounds / 2)  # resident memory is counted in pages
        failed += grows or any(b > a for a, b in zip(end.value["before"], end.value["after"]))
    return failed
