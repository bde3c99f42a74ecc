"""The launchers of elastic federations: real processes, of which some are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lightning_fed.launch import main, parse

ROOT = Path(__file__).parents[1]
DEADLINE = 180.0  # seconds; processes that import everything start slowly on a busy machine

# A rank of few imports. Each writes its process id, waits until the test lets it go on, and leaves a word.
RANK = """
import os, pathlib, socket, sys, time

rank, count = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
host, port = os.environ["LIGHTNING_FED_STORE"].split(":")
pathlib.Path(f"pid-{rank}-{count}.tmp").write_text(str(os.getpid()))
os.rename(f"pid-{rank}-{count}.tmp", f"pid-{rank}-{count}")
while not os.path.exists("go"):
    time.sleep(0.02)
socket.create_connection((host, int(port)), timeout=10).close()
pathlib.Path(f"done-{rank}").write_text(os.environ["LOCAL_RANK"] + " " + os.environ["GROUP_RANK"])
sys.exit(int(os.environ.get("EXIT_CODE", 0)))
"""

# A training script with Lightning's own environment and the elastic launcher in place of the stock one.
SCRIPT = """
import os, pathlib, sys, time
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning_fed.federation.elastic_launcher import ElasticScriptLauncher
from lightning_fed.federation.peer_network import PeerNetwork, store_address

def train():
    rank = int(os.environ.get("LOCAL_RANK", 0))
    network = PeerNetwork(*store_address(), rank, int(sys.argv[1]))
    pathlib.Path(f"pid-{rank}.tmp").write_text(str(os.getpid()))
    os.rename(f"pid-{rank}.tmp", f"pid-{rank}")
    while not os.path.exists("go") and not (rank == 0 and os.path.exists("go-0")):
        time.sleep(0.02)
    if os.path.exists("go"):
        others = set(range(1, int(sys.argv[1])))
        while not others <= network.ping(others, 1):
            pass
        network.store.add("met", 1)
        while network.store.add("met", 0) < len(others):
            time.sleep(0.02)
    network.close()
    pathlib.Path(f"done-{rank}").touch()

ElasticScriptLauncher(LightningEnvironment(), int(sys.argv[1]), 1).launch(train)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a command in tmp_path; it and all that it has started are killed after the test."""
    started: list[subprocess.Popen] = []

    def start(*command: str, **environment: str) -> subprocess.Popen:
        inherited = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**inherited, "PYTHONPATH": str(ROOT), "TEST_PLACE": str(tmp_path), **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in [*started, *descendants(tmp_path)]:
        process.kill()
    for process in started:
        process.communicate()


def descendants(place: Path) -> list[psutil.Process]:
    """All living processes of the test in this place, orphans too."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_PLACE") == str(place) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], object], timeout: float = DEADLINE) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s in vain"
        time.sleep(0.02)


def await_pids(place: Path, *names: str) -> list[int]:
    wait_until(lambda: all((place / f"pid-{name}").exists() for name in names))
    return [int((place / f"pid-{name}").read_text()) for name in names]


def done(place: Path) -> dict[str, str]:
    return {file.name.removeprefix("done-"): file.read_text() for file in place.glob("done-*")}


def launch(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lightning_fed.launch", *arguments]


def ranks(num_ranks: int, *arguments: str) -> list[str]:
    return launch("--ranks", str(num_ranks), *arguments, "--", sys.executable, "-c", RANK)


def test_survivors_go_on_after_rank_0_was_killed(start: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    launcher = start(*ranks(3))
    pids = await_pids(tmp_path, "0-0", "1-0", "2-0")
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    _, log = launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == 0
    assert done(tmp_path) == {"1": "1 0", "2": "2 0"}
    assert "rank 0 was ended by SIGKILL" in log and "rank 2 ended well" in log and "2 of 3 ranks ended well" in log
    assert not descendants(tmp_path)


@pytest.mark.slow
def test_a_crashed_rank_starts_again_as_often_as_allowed(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    launcher = start(*ranks(2, "--restarts", "1"))
    for count in range(2):
        os.kill(await_pids(tmp_path, f"0-{count}")[0], signal.SIGKILL)
    (tmp_path / "go").touch()
    _, log = launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == 0
    assert done(tmp_path) == {"1": "1 0"} and log.count("rank 0 was ended by SIGKILL") == 2


@pytest.mark.slow
def test_the_launcher_fails_if_no_rank_ended_well(start: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    launcher = start(*ranks(2), EXIT_CODE="7")
    _, log = launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == 1 and log.count("failed with exit code 7") == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_launcher_leaves_no_orphan(
    start: Callable[..., subprocess.Popen], tmp_path: Path, number: signal.Signals
) -> None:
    launcher = start(*ranks(2, "--restarts", "3"))
    await_pids(tmp_path, "0-0", "1-0")
    launcher.send_signal(number)
    launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == 1
    assert not descendants(tmp_path)


@pytest.mark.slow
def test_a_second_interrupt_kills_ranks_that_do_not_end(start: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    launcher = start(*ranks(2))
    for pid in await_pids(tmp_path, "0-0", "1-0"):
        os.kill(pid, signal.SIGSTOP)
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=DEADLINE)
    assert not descendants(tmp_path)


@pytest.mark.slow
def test_two_machines_and_a_store_of_its_own(start: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    store = start(*launch("--ranks", "0"))
    assert store.stderr is not None
    port = store.stderr.readline().split()[-1]
    address = f"127.0.0.1:{port}"
    (tmp_path / "go").touch()
    machines = [start(*ranks(4, "--ranks-of-this-machine", part, "--store", address)) for part in ("0-1", "2-3")]
    for machine in machines:
        machine.communicate(timeout=DEADLINE)
        assert machine.returncode == 0
    assert done(tmp_path) == {"0": "0 0", "1": "1 0", "2": "0 1", "3": "1 1"}
    store.terminate()
    store.communicate(timeout=DEADLINE)
    assert store.returncode == 0


@pytest.mark.slow
def test_the_machine_with_the_store_waits_for_the_other(start: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    first = start(*ranks(2, "--ranks-of-this-machine", "0-0"))
    assert first.stderr is not None
    port = first.stderr.readline().split()[-1]
    wait_until(lambda: "0" in done(tmp_path))
    time.sleep(0.5)
    assert first.poll() is None
    second = start(*ranks(2, "--ranks-of-this-machine", "1-1", "--store", f"127.0.0.1:{port}"))
    for machine in (second, first):
        machine.communicate(timeout=DEADLINE)
        assert machine.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2"], "a command is needed"),
        (["--ranks", "0", "--", "true"], "a command is needed"),
        (["--ranks", "-1", "--", "true"], "must not be negative"),
        (["--ranks", "4", "--ranks-of-this-machine", "1-2", "--", "true"], "the same number of ranks"),
        (["--ranks", "4", "--ranks-of-this-machine", "0-2", "--", "true"], "the same number of ranks"),
        (["--ranks", "4", "--ranks-of-this-machine", "two", "--", "true"], "FIRST-LAST"),
        (["--ranks", "4", "--store", "here", "--", "true"], "--store"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_keeps_its_own_options() -> None:
    settings = parse(["--ranks", "2", "--", "train", "--ranks", "7", "--", "rest"])
    assert settings.ranks == 2 and settings.command == ["train", "--ranks", "7", "--", "rest"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
def test_script_ranks_outlive_rank_0_and_take_the_store_with_them(
    start: Callable[..., subprocess.Popen], tmp_path: Path, script: Path
) -> None:
    main_process = start(sys.executable, str(script), "3")
    await_pids(tmp_path, "0", "1", "2")
    assert len(descendants(tmp_path)) == 4  # with the host of the store
    main_process.kill()
    main_process.wait()
    (tmp_path / "go").touch()
    wait_until(lambda: not descendants(tmp_path))
    assert sorted(done(tmp_path)) == ["1", "2"]


@pytest.mark.slow
def test_rank_0_of_a_script_waits_for_the_others(
    start: Callable[..., subprocess.Popen], tmp_path: Path, script: Path
) -> None:
    main_process = start(sys.executable, str(script), "2")
    await_pids(tmp_path, "0", "1")
    (tmp_path / "go-0").touch()
    wait_until(lambda: "0" in done(tmp_path))
    time.sleep(0.5)
    assert main_process.poll() is None
    (tmp_path / "go").touch()
    main_process.communicate(timeout=DEADLINE)
    assert main_process.returncode == 0
    assert sorted(done(tmp_path)) == ["0", "1"]
    wait_until(lambda: not descendants(tmp_path))


@pytest.mark.slow
def test_an_interrupt_ends_the_ranks_for_which_rank_0_waits(
    start: Callable[..., subprocess.Popen], tmp_path: Path, script: Path
) -> None:
    main_process = start(sys.executable, str(script), "2")
    await_pids(tmp_path, "0", "1")
    (tmp_path / "go-0").touch()
    wait_until(lambda: "0" in done(tmp_path))
    time.sleep(0.5)
    main_process.send_signal(signal.SIGINT)
    main_process.communicate(timeout=DEADLINE)
    assert sorted(done(tmp_path)) == ["0"]
    wait_until(lambda: not descendants(tmp_path))
