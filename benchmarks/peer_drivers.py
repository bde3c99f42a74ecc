"""Other systems on the same work, each driven by a script of its own in an environment of its own.

A driver takes ``--clients --cohort --rounds --local-steps --batch --model --seed`` and prints one line of JSON with
``cpu_ms_per_update``, ``client_updates_per_s_steady``, ``round_ms_median``, ``first_round_s`` and ``test_acc``. Before
each run the folder's own plain loop runs in the same environment on the same data; ratios are to that.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workloads import Measured, Workload, convnet, mlp

MODELS = {mlp: "mlp", convnet: "cnn"}
SECONDS = 550  # after which a driver is taken for stuck


@dataclass(frozen=True)
class Driver:
    """A script with its fixed arguments.

    Attributes:
        environment: its virtual environment, a folder of ``--venvs``.
        source: a checkout to import from, a folder of ``--sources``.
        rounds: where those of the workload would take too long.
    """

    name: str
    environment: str
    command: str
    source: str | None = None
    rounds: int | None = None


REFERENCES = {"fedavg": "plain_loop.py", "gossip": "gossip_loop.py"}
DRIVERS = {
    "fedavg": (
        Driver("FedLab", "fedlab", "fedlab_sim.py"),
        Driver("pfl", "pfl", "pfl_sim.py"),
        Driver("fluke", "fluke", "fluke_sim.py"),
        Driver("PFLlib", "fedlab", "pfllib_sim.py", source="pfllib/system"),
        Driver("a reused Trainer", "lightning", "lightning_naive.py --impl reuse"),
        Driver("a Trainer for each client", "lightning", "lightning_naive.py --impl fresh"),
        Driver("APPFL", "appfl", "appfl_sim.py"),
        Driver("Flower", "flwr", "flower_sim.py"),
        Driver("NVFlare", "nvflare", "nvflare_sim.py --mode persistent", rounds=8),
    ),
    "gossip": (
        Driver("gossipy", "gossipy", "gossipy_sim.py", source="gossipy"),
        Driver("decentralizepy", "dcp", "decentralizepy_sim.py", source="dcp/src", rounds=30),
    ),
}


@dataclass(frozen=True)
class Peers:
    """Where the drivers are, and what they need."""

    scripts: Path
    environments: Path
    sources: Path

    def compare(self, work: Workload, repeats: int) -> Iterator[tuple[str, list[Measured], list[Measured]]]:
        """The name, the runs and the reference's runs of each driver that is installed.

        Yields:
            ``name, runs, references``; where a driver fails, the name says so and the lists are empty.
        """
        if work.network not in MODELS:
            return
        for driver in DRIVERS[work.algorithm]:
            if not (self.python(driver).exists() and (self.scripts / driver.command.split()[0]).exists()):
                continue
            runs, references = [], []
            try:
                for _ in range(repeats):
                    references.append(self.run(work, driver, REFERENCES[work.algorithm], work.rounds))
                    runs.append(self.run(work, driver, driver.command, driver.rounds or work.rounds))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                yield f"{driver.name} ({type(error).__name__}: {str(error)[-80:]!r})", [], []
            else:
                yield driver.name, runs, references

    def python(self, driver: Driver) -> Path:
        return self.environments / driver.environment / "bin" / "python"

    def run(self, work: Workload, driver: Driver, command: str, rounds: int) -> Measured:
        script, *fixed = command.split()
        sizes = {"clients": work.clients, "cohort": work.cohort, "rounds": rounds, "local-steps": work.steps}
        options = {**sizes, "batch": work.batch, "model": MODELS[work.network], "seed": work.seed}
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if driver.source is not None:
            environment["PYTHONPATH"] = str(self.sources / driver.source)
        done = subprocess.run(
            [str(self.python(driver)), script, *fixed, *arguments],
            cwd=self.scripts,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"system"')]
        if not lines:
            raise RuntimeError(done.stderr[-300:] or "no line of results")
        return measured_by(json.loads(lines[-1]))


def measured_by(line: dict[str, float | None]) -> Measured:
    """A driver's line in our terms; its later round is the median of all but the first."""
    known = {name: math.nan if value is None else value for name, value in line.items()}
    return Measured(
        cpu=known["cpu_ms_per_update"],
        wall=1e3 / known["client_updates_per_s_steady"],
        first=1e3 * known["first_round_s"],
        tenth=known["round_ms_median"],
        setup=math.nan,
        accuracy=known["test_acc"],
    )
