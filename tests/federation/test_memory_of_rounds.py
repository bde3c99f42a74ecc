"""What communication takes beside the rows and the state: memory that does not grow with the number of clients."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, silent_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fed import GossipStrategy
from lightning_fed.compression import Compressor, Identity, Layer, LowRank, Quantize, RandK, ScaledSign, TopK
from lightning_fed.federation import compressed_channel
from lightning_fed.federation.compressed_channel import CompressedChannel
from lightning_fed.federation.error_feedback import CompressedMean
from lightning_fed.federation.exchange import LoopbackExchange
from lightning_fed.federation.gradient_step import runs
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.public_copies import PublicCopies

N, LAYERS = 64, [Layer("first", torch.Size([40, 50])), Layer("second", torch.Size([48]))]
P = 2048
RING = sum(np.roll(np.eye(N), shift, axis=1) for shift in (-1, 0, 1)) / 3
COMPRESSORS = [TopK(0.02), TopK(0.02, "layer"), RandK(0.02), ScaledSign(), Quantize(2), LowRank(1)]


class LargestTensor(TorchDispatchMode):
    """The most bytes that any single operation has returned in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        floats = [value for value in args if is_tensor(value) and value.is_floating_point()]
        if len({value.dtype for value in floats}) > 1:  # computed in the wider one, in memory that is not shown
            self.bytes = max(self.bytes, 8 * max(value.numel() for value in floats))
        known = {value.untyped_storage().data_ptr() for value in (*args, *(kwargs or {}).values()) if is_tensor(value)}
        result = function(*args, **(kwargs or {}))
        if is_tensor(result) and result.untyped_storage().data_ptr() not in known:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_channel, "CPU_BLOCK_BYTES", 4 * 3 * P)  # three float32 rows
    monkeypatch.setattr(compressed_channel, "KEPT_BYTES", 4 * 3 * P)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_publishing_takes_little_memory_beside_the_rows(compressor: Compressor) -> None:
    rows = torch.randn(N, P, generator=torch.Generator().manual_seed(0))
    channel = CompressedChannel(compressor, LAYERS, rows, seed=0)
    x_hat, exchange = PublicCopies(channel, RING, torch.zeros_like(rows)), LoopbackExchange(Layout(N))
    with LargestTensor() as largest:
        x_hat.publish(rows, exchange, 0)
        x_hat.mix_(rows, 0.3)
    assert largest.bytes <= max(8 * 3 * P, N * channel.message_bytes) < rows.nbytes / 4


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("method", ["econtrol", "ef21", "ef", "none"])
def test_error_feedback_takes_little_memory_beside_its_state(method: Any) -> None:
    rows, exchange = torch.randn(N, P, generator=torch.Generator().manual_seed(0)), LoopbackExchange(Layout(N))
    mean = CompressedMean(TopK(0.02), method, None, "zero", LAYERS, torch.zeros(N, P), exchange, seed=0)
    with LargestTensor() as largest:
        mean.estimate(rows, exchange)
    assert 0 < largest.bytes < rows.nbytes / 8


@pytest.mark.parametrize("compressor", [*COMPRESSORS, Identity()], ids=repr)
def test_blocks_of_clients_do_not_show(compressor: Compressor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in messages, nor in warm starts, nor in what is measured."""

    def run() -> list[Any]:
        draw = torch.Generator().manual_seed(0)
        rows, exchange = torch.randn(N, P, generator=draw), LoopbackExchange(Layout(N))
        channel = CompressedChannel(compressor, LAYERS, rows, seed=0)
        x_hat = PublicCopies(channel, RING, torch.zeros_like(rows))
        for step in range(3):
            x_hat.publish(rows, exchange, step)
            x_hat.mix_(rows, 0.3)
        return [rows, *x_hat.client_matrices("x").values(), torch.tensor([*x_hat.measure(exchange).values()])]

    whole = run()
    monkeypatch.setattr(compressed_channel, "CPU_BLOCK_BYTES", 4 * 3 * P)
    monkeypatch.setattr(compressed_channel, "KEPT_BYTES", 4 * 3 * P)
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("compressor", "kept"), [(ScaledSign(), 3), (TopK(0.1), 0)], ids=repr)
def test_only_so_much_of_the_messages_stays_unpacked(compressor: Compressor, kept: int) -> None:
    rows, exchange = torch.ones(N, P), LoopbackExchange(Layout(N))
    channel = CompressedChannel(compressor, LAYERS, rows, seed=0)
    sent = channel.send(lambda place, out: out.copy_(rows[place]), exchange.everyone, exchange, 0)
    assert len(sent._kept) == kept
    sent.add_received_(rows, RING)
    assert not sent._kept


def test_the_error_of_a_message_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_channel, "NUMBERS_PER_PART", 10)
    rows, exchange = torch.randn(N, P, dtype=torch.float64), LoopbackExchange(Layout(N))
    channel, own = CompressedChannel(TopK(0.1, "layer"), LAYERS, rows, seed=0), torch.zeros_like(rows)
    assert len(channel.parts) == 2 and "compression_error" not in channel.measure(exchange)
    channel.send(lambda place, out: out.copy_(rows[place]), exchange.everyone, exchange, 0, [(own, 1.0)])
    expected = ((rows - own).norm(dim=1) / rows.norm(dim=1)).mean()
    assert channel.measure(exchange)["compression_error"] == pytest.approx(float(expected), rel=1e-12)


STEP = {"local_steps": 1, "rounds_per_epoch": 2}


class Plain(Classifier):
    """Client 1's loss is not a number in one round."""

    def __init__(self, bad_round: int = -1) -> None:
        super().__init__(norm=False, dropout=0)
        self.bad_round = bad_round

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        strategy = self.trainer.strategy
        return loss * torch.nan if (strategy.round, strategy.bank.bound) == (self.bad_round, 1) else loss


class LargeTensors(pl.Callback):
    """How many matrices as large as the rows exist after a round."""

    count = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        gc.collect()
        shape = trainer.strategy.bank.rows.matrix.shape
        matrices = [value for value in gc.get_objects() if type(value) is Tensor and value.shape == shape]
        self.count = len({matrix.untyped_storage().data_ptr() for matrix in matrices})


@pytest.mark.parametrize(
    ("settings", "matrices"),
    [({"method": "tracking"}, 4), ({"method": "beer", "compressor": TopK(0.1)}, 8)],
    ids=["tracking", "beer"],
)
@pytest.mark.parametrize("clients_per_step", [1, 3])
def test_matrices_of_gradient_tracking(settings: dict[str, Any], matrices: int, clients_per_step: int) -> None:
    """Rows, gradients, trackers and last gradients; two public copies and two pulls."""
    strategy, large = (
        GossipStrategy(num_clients=32, clients_per_step=clients_per_step, **settings, **STEP),
        LargeTensors(),
    )
    silent_trainer(strategy, max_epochs=1, callbacks=[large]).fit(Plain(), *loaders(clients(32, step=0)))
    assert large.count == matrices


@pytest.mark.parametrize("settings", [{"method": "tracking"}, {"method": "beer", "compressor": TopK(0.1)}])
def test_a_run_resumes_after_a_step_that_was_left_out(settings: dict[str, Any], tmp_path: Path) -> None:
    """It counts as no round of the algorithm, there either."""

    def fit(epochs: int, bad_round: int, resume: str | None = None) -> pl.Trainer:
        pl.seed_everything(3, verbose=False)
        strategy = GossipStrategy(num_clients=4, **settings, **STEP)
        trainer = silent_trainer(strategy, max_epochs=epochs)
        trainer.fit(Plain(bad_round), *loaders(clients(4)), ckpt_path=resume)
        return trainer

    with pytest.warns(UserWarning, match="round 3: a gradient is not finite"):
        whole, first = fit(4, bad_round=3), fit(2, bad_round=3)
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = fit(4, -1, str(tmp_path / "first.ckpt"))
    torch.testing.assert_close(resumed.strategy.bank.rows.matrix, whole.strategy.bank.rows.matrix, rtol=0, atol=0)
    np.testing.assert_array_equal(resumed.strategy.exchange.sent_bytes, whole.strategy.exchange.sent_bytes)


def test_neighbors_among_rows() -> None:
    assert list(runs([4])) == [(0, 1)]
    assert list(runs([2, 3, 4, 7, 9, 10])) == [(0, 3), (3, 4), (4, 6)]
