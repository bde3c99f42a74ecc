"""Lightning's own way to start ranks, ``python train.py``, without what makes them die together."""

from __future__ import annotations

import atexit
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import (
    _HYDRA_AVAILABLE,
    _basic_subprocess_cmd,
    _hydra_subprocess_cmd,
)
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from lightning_fed.federation import store_host
from lightning_fed.federation.peer_network import STORE_VARIABLE


class ElasticScriptLauncher(_SubprocessScriptLauncher):
    """Runs the script again for each further rank of this machine; the ranks outlive each other.

    A helper process hosts the store, and ends when the last rank has ended, however it ended. Nobody watches the
    ranks. Rank 0 is the process that the user started: when it is done, or has failed, it waits at its exit for the
    other ranks of its machine, as long as they take; an interrupt during that wait is passed on to them. If it is
    killed, they go on to their end.

    On several machines, the store is on the first of them, at MASTER_ADDR and MASTER_PORT, which must be set on all.
    Where LIGHTNING_FED_STORE is set, that store is used and none is hosted.
    """

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks of this machine, unless another launcher has, and call ``function`` in this one."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _call_children_scripts(self) -> None:
        self._check_can_spawn_children()
        environment = self.cluster_environment
        os.environ.update(
            MASTER_ADDR=environment.main_address,
            MASTER_PORT=str(environment.main_port),
            NODE_RANK=str(environment.node_rank()),
            LOCAL_RANK=str(environment.local_rank()),
            WORLD_SIZE=str(self.num_processes * self.num_nodes),
        )
        # Every rank inherits the pipe's writing end and keeps it, unused, open: its end of file says that all are gone.
        helper_end, ranks_end = os.pipe()
        if STORE_VARIABLE not in os.environ:
            self._provide_store(helper_end)
        os.close(helper_end)
        for local_rank in range(1, self.num_processes):
            command, directory = _command(local_rank)
            process = subprocess.Popen(
                command,
                env={**os.environ, "LOCAL_RANK": str(local_rank)},
                cwd=directory,
                pass_fds=[ranks_end],
            )
            self.procs.append(process)
        atexit.register(_await, self.procs)

    def _provide_store(self, helper_end: int) -> None:
        """Host the store in a process of its own if it belongs on this machine, and say in the environment where."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if self.cluster_environment.node_rank() == 0:
            # On one machine alone nobody else need reach it, and any port will do.
            listener = store_host.listen("127.0.0.1") if self.num_nodes == 1 else store_host.listen("", port)
            if self.num_nodes == 1:
                address, port = listener.getsockname()
            command = [sys.executable, store_host.__file__, str(listener.fileno()), str(helper_end)]
            # In a session of its own, so that what ends the ranks of a terminal does not end it before them.
            subprocess.Popen(command, pass_fds=[listener.fileno(), helper_end], start_new_session=True)
            listener.close()
        os.environ[STORE_VARIABLE] = f"{address}:{port}"


def _command(local_rank: int) -> tuple[Sequence[str], str | None]:
    """What starts another rank, and in which directory."""
    if _HYDRA_AVAILABLE:
        hydra = importlib.import_module("hydra.core.hydra_config")
        if hydra.HydraConfig.initialized():
            return _hydra_subprocess_cmd(local_rank)
    return _basic_subprocess_cmd(), None


def _await(processes: list[subprocess.Popen]) -> None:
    """Wait for the other ranks to end; an interrupt ends them."""
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
