"""SIGKILL at random moments, one after another: the resumed run ends with the bits of one that was never killed.

The runs are those of ``benchmarks/chaos.py``.
"""

from __future__ import annotations

import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chaos_case import SECONDS_TO_END, Case, outcome_of, run_whole
from chaos_ranks import Ranks
from chaos_run import SAVE_EVERY, STRATEGIES, Run, complete_files, differences, fit

from lightning_fed.federation.durable_files import stage


def assert_kills_lose_nothing(run: Run, kills: int, seed: str) -> None:
    """Start or resume, kill, as often as it takes, and compare what the last resume leads to."""
    whole = run_whole(replace(run, folder=run.folder + "-whole"))
    case = Case(run, whole, random.Random(seed))
    for _ in range(kills):
        if case.kill() is None:
            shutil.rmtree(case.folder)  # the run had ended before: begin again
    outcome = case.finish()
    assert case.waits, "no kill came before the run had ended"
    assert differences(whole.outcome, outcome) == []
    assert differences(whole.outcome, {**outcome, "model": outcome["model"] + 1e-9}) == ["model"]


def test_three_kills_lose_nothing(tmp_path: Path) -> None:
    assert_kills_lose_nothing(Run("D-PSGD", str(tmp_path / "run"), epochs=3), 3, "three")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_kills_lose_nothing(name: str, ranks: int, tmp_path: Path) -> None:
    assert_kills_lose_nothing(Run(name, str(tmp_path / "run"), ranks), 2, f"{name} {ranks}")


def test_a_run_that_was_resumed_behind_an_epoch_can_be_resumed_again(tmp_path: Path) -> None:
    def finish(name: str, resume: Path | None) -> dict[str, object]:
        run = Run("D-PSGD", str(tmp_path / name), epochs=3, keeps_all=True, resume=resume and str(resume))
        with Ranks(1, fit, run, log=run.log) as ranks:
            return outcome_of(ranks.ends(SECONDS_TO_END))

    whole = finish("whole", None)
    steps = whole["steps"][0] // 3  # type: ignore[index]
    end_of_epoch = tmp_path / f"whole/step={2 * steps}.ckpt"
    assert (2 * steps) % SAVE_EVERY == 0 and end_of_epoch in complete_files(tmp_path / "whole")
    assert differences(whole, finish("resumed", end_of_epoch)) == []
    within_the_next = tmp_path / f"resumed/step={2 * steps + SAVE_EVERY}.ckpt"
    assert differences(whole, finish("again", within_the_next)) == []


def write_without_room(path: str, room: int) -> str:
    """What is raised if a file may not grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        stage({"one": torch.zeros(20_000), "two": torch.zeros(20_000)}, path)
    except Exception as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.parametrize("room", [100, 50_000, 120_000, 1_000_000])
def test_a_disk_may_be_full_at_any_byte_of_a_file(room: int, tmp_path: Path) -> None:
    with Ranks(1, write_without_room, str(tmp_path / "file.pt"), room) as ranks:
        (end,) = ranks.ends(SECONDS_TO_END).values()
    assert end.value == ("OSError" if room < 1_000_000 else "nothing"), end.error
    assert [path.name for path in tmp_path.iterdir()] == ([] if room < 1_000_000 else ["file.pt.writing"])
