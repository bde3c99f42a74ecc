"""The examples of the page on one-step generators run as they are written, with less training."""

from __future__ import annotations

from pathlib import Path

from documentation import ROOT, example, execute
from lightning.pytorch import Callback

PAGE = ROOT / "docs" / "diffusion.md"


def test_a_digit_is_distilled_and_drawn_by_diffusers(in_tmp_path: Path) -> None:
    blocks = example(PAGE, "distillation")
    for epochs in ("max_epochs=130", "max_epochs=100"):
        assert epochs in blocks[0]
        blocks[0] = blocks[0].replace(epochs, "max_epochs=1, limit_train_batches=6")
    names = execute(PAGE, blocks)
    (export,) = example(PAGE, "export")
    drawn = execute(PAGE, [export.replace(".manual_seed(0))", '.manual_seed(0), output_type="pt")')])
    ours = (names["images"] / 2 + 0.5).clamp(0, 1)
    assert names["images"].shape == (16, 1, 8, 8)
    assert (drawn["images"] - ours).abs().max() <= 1e-5


def test_the_monitors_are_callbacks() -> None:
    assert all(isinstance(callback, Callback) for callback in execute(PAGE, example(PAGE, "monitors"))["callbacks"])
