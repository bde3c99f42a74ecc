"""Bad settings in configurations and on the command line: refused before any training step, by name and value."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lightning_fed.cli import FederatedCLI

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a user reads: the error, or the last line of what the parser has printed."""
    with pytest.raises((ValueError, SystemExit)) as refused:
        FederatedCLI(["--config", *arguments], run=False)
    if isinstance(refused.value, ValueError):
        return str(refused.value)
    assert refused.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--trainer.strategy.num_clients=0"], ["num_clients=0 must be at least 1"]),
        (["--trainer.strategy.rho=-0.1"], ["rho=-0.1 must not be negative"]),
        (["--trainer.strategy.evaluate=all"], ["evaluate", "'all'"]),
        (["--trainer.strategy.local_steps=1.5"], ["local_steps", "1.5"]),
        (["--trainer.strategy.gossip_stepps=2"], ["gossip_stepps"]),
        (["--trainer.strategy.topology=rung"], ["rung"]),
        (["--trainer.strategy=DFedSPAM"], ["strategy='dfedspam'"]),
        (
            ["--trainer.strategy.local_epochs=2", "--trainer.strategy.local_steps=3"],
            ["local_epochs=2", "local_steps=3"],
        ),
        (["--model.label_smoothing=1.0"], ["label_smoothing=1.0 must be in [0, 1)"]),
        (["--model.lr=fast"], ["lr", "fast"]),
        (["--data.batch_size=0"], ["batch_size=0 must be at least 1"]),
        (["--data.partitioner.alpha=0"], ["alpha=0.0 must be in (0, inf)"]),
        (["--trainer.callbacks+=FederationMonitor", "--trainer.callbacks.every_n_rounds=0"], ["every_n_rounds=0"]),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else None,
)
def test_overrides_of_a_configuration(
    arguments: list[str], names: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fed"])
    message = refusal(capsys, str(QUICKSTART), "--trainer.logger=false", *arguments)
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    ("place", "value", "name"),
    [
        (("trainer", "strategy", "init_args", "rows_device"), "disk", "rows_device"),
        (("trainer", "strategy", "init_args", "timeout"), 0.0, "timeout=0.0"),
        (("model", "init_args", "num_clases"), 10, "num_clases"),
        (("data", "init_args", "seed"), -1, "seed=-1 must be at least 0"),
    ],
    ids=lambda part: part[-1] if isinstance(part, tuple) else None,
)
def test_files(
    place: tuple[str, ...],
    value: object,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fed"])
    config = yaml.safe_load(QUICKSTART.read_text())
    section = config
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    assert name in refusal(capsys, str(tmp_path / "bad.yaml"), "--trainer.logger=false")
