"""Settings of every test: one thread, nothing sent over a network, GPU tests only where there is a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Before any library reads them, and for the processes that tests start.
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The same examples in every run, and as much time for each as a busy machine needs.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """The test's working directory is its tmp_path, which is returned: loggers and checkpoints write there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
