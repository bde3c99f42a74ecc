"""Simulated time: by hand for small federations, the same on any number of ranks and after a resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, silent_trainer
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks

from lightning_fed import FedAvgStrategy, GossipStrategy
from lightning_fed.federation.exchange import LoopbackExchange
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.virtual_clock import Constant, LogNormal, Uniform, VirtualClock

RING = np.array([[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]], dtype=bool)
PARAMETER_BYTES = 4 * sum(parameter.numel() for parameter in Classifier(norm=False).parameters())


def bound(num_clients: int, seed: int = 0, **settings: Any) -> VirtualClock:
    clock = VirtualClock(**settings)
    clock.bind(num_clients, seed)
    return clock


def table(directory: Path, text: str) -> str:
    path = directory / "table.csv"
    path.write_text(text)
    return str(path)


def mixed_devices(directory: Path) -> str:
    """Three clients: a slow computer, a slow upload, a slow download."""
    header = "client,seconds_per_step,upload,download\n"
    return table(directory, header + "0,10,100,100\n1,1,20,100\n2,1,100,50\n")


# ---------------------------------------------------------------------------------------------------------- by hand


def test_a_ring_of_three_by_hand(tmp_path: Path) -> None:
    clock = bound(3, devices_csv=mixed_devices(tmp_path), latency=0.5)
    clock.local_work(np.array([0, 1, 2]), [1, 2, 3])
    assert clock.now.tolist() == [10, 2, 3]
    clock.mixed(np.ones((3, 3), dtype=bool), 200)
    assert clock.now.tolist() == [
        max(10, 2 + 0.5 + 200 / 20, 3 + 0.5 + 200 / 100),
        max(10 + 0.5 + 200 / 100, 2, 3 + 0.5 + 200 / 100),
        max(10 + 0.5 + 200 / 50, 2 + 0.5 + 200 / 20, 3),
    ]
    assert (clock.training_seconds, clock.elapsed, clock.server_now) == (15.0, 14.5, 0.0)


def test_what_things_take(tmp_path: Path) -> None:
    clock = bound(3, devices_csv=mixed_devices(tmp_path), latency=0.5)
    assert clock.compute_seconds(0, 3) == 30
    assert clock.transfer_seconds(0, 2, 100) == 0.5 + 100 / 50
    assert clock.transfer_seconds(2, 0, 100) == 0.5 + 100 / 100
    assert clock.transfer_seconds(1, 1, 100) == 0
    assert bound(2, bandwidth=float("inf"), latency=0.25).transfer_seconds(0, 1, 10**12) == 0.25


def test_a_server_waits_for_its_cohort_and_absent_clients_for_nobody(tmp_path: Path) -> None:
    clock = bound(3, devices_csv=mixed_devices(tmp_path), latency=0.5)
    clock.downloaded(np.array([1, 2]), 100)
    assert clock.now.tolist() == [0, 1.5, 2.5]
    clock.local_work(np.array([1, 2]), [1, 1])
    clock.uploaded(np.array([1, 2]), 100)
    assert clock.server_now == max(2.5 + 0.5 + 100 / 20, 3.5 + 0.5 + 100 / 100)
    assert clock.now.tolist() == [0, 2.5, 3.5]
    clock.downloaded(np.array([0]), 100)
    assert clock.now.tolist() == [8 + 0.5 + 1, 2.5, 3.5]


def test_a_slow_client_delays_its_neighbours_one_hop_a_round() -> None:
    clock = bound(5, seconds_per_step=1.0, latency=0.0, bandwidth=float("inf"))
    clock.now[0] = 100.0
    for reached in ([0, 1, 4], [0, 1, 2, 3, 4]):
        before = clock.now.copy()
        clock.mixed(RING, 10)
        assert np.flatnonzero(clock.now >= 100).tolist() == reached
        assert (clock.now >= before).all()


def test_the_exchange_tells_the_clock_of_algorithms_messages_only() -> None:
    clock = VirtualClock(seconds_per_step=1.0, latency=1.0, bandwidth=8.0)
    exchange = LoopbackExchange(Layout(3))
    exchange.keep_time(clock, 0)
    rows = torch.ones(3, 4)
    exchange.mean(rows)
    exchange.sum(rows)
    exchange.gather_rows(np.ones(3))
    assert clock.elapsed == 0
    exchange.mix_(rows, np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]))
    assert clock.now.tolist() == [3, 3, 0]
    exchange.upload_mean(rows, np.array([0, 0, 1.0]))
    assert clock.server_now == 3
    exchange.download(rows[0], rows, np.array([2]))
    assert clock.now.tolist() == [3, 3, 6]
    exchange.mix_(rows[:, :0], np.full((3, 3), 1 / 3))  # a message of nothing is not sent
    assert clock.now.tolist() == [3, 3, 6]


# ----------------------------------------------------------------------------------------------------- whole rounds


def timed(strategy: Any, norm: bool = False, world_size: int = 1, max_epochs: int = 3, **trainer: Any) -> VirtualClock:
    """The clock after a fit of clients with 10, 12, 14, ... samples: 3, 3, 4, 4, ... minibatches a round."""
    pl.seed_everything(7, verbose=False)
    ckpt_path = trainer.pop("ckpt_path", None)
    trainer_ = silent_trainer(strategy, world_size, max_epochs=max_epochs, **trainer)
    trainer_.fit(Classifier(norm=norm), *loaders(clients(strategy.num_clients)), ckpt_path=ckpt_path)
    return strategy.clock


def test_rounds_of_fedavg_by_hand() -> None:
    clock = timed(FedAvgStrategy(num_clients=3, clock=VirtualClock(1.0, 0.25, PARAMETER_BYTES / 2)))
    transfer, busiest = 0.25 + 2, 4
    assert clock.server_now == 3 * (2 * transfer + busiest)
    assert clock.elapsed == clock.server_now
    assert clock.training_seconds == 3 * (3 + 3 + 4)
    assert clock.now.tolist() == [2 * (2 * transfer + busiest) + transfer + steps for steps in (3, 3, 4)]


def test_rounds_of_gossip_by_hand() -> None:
    clock = timed(GossipStrategy(num_clients=3, gossip_steps=2, clock=VirtualClock(1.0, 0.25, PARAMETER_BYTES / 2)))
    # The two others wait for the busiest client's message; it has theirs after its own step, or a message later.
    now = np.zeros(3)
    for _ in range(3):
        now += [3, 3, 4]
        for _ in range(2):
            now = np.array([max(now[i], *(now[j] + 2.25 for j in range(3) if j != i)) for i in range(3)])
    assert clock.now.tolist() == now.tolist()
    assert clock.server_now == 0


def test_gradient_accumulation_counts_optimizer_steps() -> None:
    clock = timed(FedAvgStrategy(num_clients=3, clock=VirtualClock(1.0, 0.0)), accumulate_grad_batches=2)
    assert clock.training_seconds == 3 * (2 + 2 + 2)


def test_buffers_travel_with_the_parameters() -> None:
    settings: dict[str, Any] = {"seconds_per_step": 1.0, "latency": 0.25, "bandwidth": 1000.0}
    module = Classifier(norm=True)
    parameters = 4 * sum(parameter.numel() for parameter in module.parameters())
    buffers = 4 * sum(buffer.numel() for buffer in module.buffers() if buffer.is_floating_point())
    assert buffers > 0
    for float_buffers, size in (("mix", parameters + buffers), ("local", parameters)):
        strategy = FedAvgStrategy(num_clients=3, float_buffers=float_buffers, clock=VirtualClock(**settings))
        assert timed(strategy, norm=True, max_epochs=1).server_now == pytest.approx(2 * (0.25 + size / 1000) + 4)
        gossip = GossipStrategy(
            num_clients=5, local_steps=1, float_buffers=float_buffers, clock=VirtualClock(**settings)
        )
        assert timed(gossip, norm=True, max_epochs=1).now == pytest.approx([1 + 0.25 + size / 1000] * 5)


def test_the_delay_spreads_one_hop_a_round_though_buffers_are_mixed(tmp_path: Path) -> None:
    lines = "".join(f"{client},{50 if client == 0 else 1},inf,inf\n" for client in range(7))
    path = table(tmp_path, "client,seconds_per_step,upload,download\n" + lines)
    strategy = GossipStrategy(num_clients=7, local_steps=1, clock=VirtualClock(devices_csv=path, latency=0.0))
    assert timed(strategy, norm=True, max_epochs=1).now.tolist() == [50, 50, 1, 1, 1, 1, 50]


def random_clock() -> VirtualClock:
    return VirtualClock(LogNormal(0.1, 0.5), Uniform(0.01, 0.2), LogNormal(1e4, 1.0))


STRATEGIES: dict[str, Any] = {
    "fedavg": lambda: FedAvgStrategy(num_clients=6, cohort_size=3, clock=random_clock()),
    "gossip": lambda: GossipStrategy(num_clients=6, participation=UniformSample(4), clock=random_clock()),
    "one-peer": lambda: GossipStrategy(num_clients=6, topology="one-peer-exponential", clock=random_clock()),
}


def times(name: str, world_size: int, **trainer: Any) -> dict[str, Any]:
    return timed(STRATEGIES[name](), norm=True, world_size=world_size, **trainer).state()


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_have_the_clock_of_one(name: str) -> None:
    alone = times(name, 1)
    assert alone["training_seconds"] > 0
    assert run_ranks(2, times, name, 2) == [alone, alone]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_goes_on_with_its_time(tmp_path: Path, name: str) -> None:
    whole = times(name, 1, max_epochs=4)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    times(name, 1, max_epochs=2, enable_checkpointing=True, callbacks=[keep])
    strategy = STRATEGIES[name]()
    strategy.seed = 12345  # of other devices: the checkpoint knows better
    resumed = timed(strategy, norm=True, max_epochs=4, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert resumed.state() == whole


def test_a_checkpoint_without_a_clock_starts_one(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    timed(FedAvgStrategy(num_clients=3), max_epochs=2, enable_checkpointing=True, callbacks=[keep])
    strategy = FedAvgStrategy(num_clients=3, clock=VirtualClock(1.0, 0.0, float("inf")))
    with pytest.warns(UserWarning, match="saved without a clock, so time is counted from its round on"):
        clock = timed(strategy, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert clock.elapsed == 4


def test_a_second_fit_goes_on_and_a_new_module_starts_anew() -> None:
    strategy = FedAvgStrategy(num_clients=3, clock=VirtualClock(1.0, 0.0, float("inf")))
    trainer, module = silent_trainer(strategy, max_epochs=1), Classifier(norm=False)
    trainer.fit(module, *loaders(clients(3)))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, *loaders(clients(3)))
    assert strategy.clock is not None and strategy.clock.elapsed == 8
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Classifier(norm=False), *loaders(clients(3)))
    assert strategy.clock.elapsed == 4


# ------------------------------------------------------------------------------------------------- draws and tables


def test_draws_depend_on_the_seed_alone() -> None:
    def values(seed: int) -> tuple[list[float], list[float]]:
        np.random.seed(1)
        clock = bound(10, seed, seconds_per_step=Uniform(1, 2), latency=LogNormal(1, 1), bandwidth=Uniform(1, 2))
        others = range(1, 10)
        return [clock.compute_seconds(j, 1) for j in others], [clock.transfer_seconds(0, j, 100) for j in others]

    assert values(3) == values(3)
    for one, other in zip(values(3), values(4)):
        assert len(set(one) | set(other)) == 18


def test_binding_twice_changes_nothing_and_another_seed_starts_anew() -> None:
    clock = bound(4, seconds_per_step=Uniform(1, 2))
    clock.local_work(np.arange(4), [1, 2, 3, 4])
    state = clock.state()
    clock.bind(4, 0)
    assert clock.state() == state
    clock.bind(4, 1)
    assert clock.elapsed == clock.training_seconds == 0


def test_the_state_is_readable_as_weights_only(tmp_path: Path) -> None:
    clock = bound(4, latency=0.5)
    clock.local_work(np.array([1, 2]), np.array([3, 4]))
    clock.uploaded(np.array([1]), 100)
    torch.save(clock.state(), tmp_path / "clock.pt")
    other = VirtualClock(latency=0.5)
    other.load_state(torch.load(tmp_path / "clock.pt", weights_only=True))
    assert other.state() == clock.state() and other.server_now > 0


def test_distributions_have_their_medians_and_bounds() -> None:
    generator = np.random.default_rng(0)
    assert Constant(3).draw(generator, 2).tolist() == [3.0, 3.0]
    uniform = Uniform(2, 4).draw(generator, 10_000)
    assert uniform.min() >= 2 and uniform.max() <= 4 and np.mean(uniform) == pytest.approx(3, abs=0.05)
    lognormal = LogNormal(5, 0.7).draw(generator, 10_000)
    assert np.median(lognormal) == pytest.approx(5, rel=0.05)
    assert np.log(lognormal).std() == pytest.approx(0.7, rel=0.05)


def test_a_thousand_clients_are_bound_quickly() -> None:
    seconds = []
    for seed in range(3):
        clock, begin = random_clock(), time.perf_counter()
        clock.bind(1000, seed)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.2
    assert clock._latency.nbytes < 5e6


def test_latencies_of_a_table_stand_for_both_directions(tmp_path: Path) -> None:
    path = table(tmp_path, "from,to,seconds\n0,1,1\n1,0,3\n0,2,5\n2,1,7\n1,1,9\n")
    clock = bound(3, latency_csv=path, bandwidth=float("inf"))
    seconds = [[clock.transfer_seconds(i, j, 10) for j in range(3)] for i in range(3)]
    assert seconds == [[0, 1, 5], [3, 0, 7], [5, 7, 0]]
    clock.uploaded(np.array([1]), 10)
    assert clock.server_now == (3 + 7) / 2
    clock.reset()
    clock.downloaded(np.array([1]), 10)
    assert clock.now[1] == (1 + 7) / 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client,seconds_per_step,upload,download\n0,1,1,1\n", r"no line for clients \[1\].*lower num_clients=2"),
        ("client,seconds_per_step,upload,download\n0,1,1,1\n0,1,1,1\n", "line 3: client 0 has a line already"),
        ("client,seconds_per_step,upload,download\n0,1,0,1\n", r"line 2: .*upload and download .* above 0"),
        ("client,seconds_per_step,upload,download\n0,inf,1,1\n", "line 2: seconds_per_step must be finite"),
        ("client,seconds_per_step,upload,download\n2,1,1,1\n", "line 2: client=2 is not a client"),
        ("client,seconds_per_step,upload\n0,1,1\n", r"line 1: the columns \['download'\] are missing"),
    ],
)
def test_bad_devices_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"devices_csv=.*{message}"):
        bound(2, devices_csv=table(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from,to,seconds\n0,1,1\n", "no line between clients 0 and 2: add one direction of every pair"),
        ("from,to,seconds\n0,1,1\n0,1,2\n", "line 3: the pair from=0, to=1 has a line already"),
        ("from,to,seconds\n0,1,-1\n", "line 2: seconds=-1 must be finite and at least 0"),
        ("from,to,seconds\n0,3,1\n", "line 2: to=3 is not a client"),
        ("from,to,seconds\n0,1,soon\n", "line 2: seconds='soon' is not a number"),
    ],
)
def test_bad_latencies_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"latency_csv=.*{message}"):
        bound(3, latency_csv=table(tmp_path, text))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(2, 1), "low=2 and high=1"),
        (lambda: VirtualClock(bandwidth=1.0, devices_csv="x.csv"), "bandwidth and devices_csv='x.csv'"),
        (lambda: VirtualClock(latency=1.0, latency_csv="x.csv"), "latency and latency_csv='x.csv'"),
        (lambda: bound(2, devices_csv="nowhere.csv"), "devices_csv='nowhere.csv' is not a file"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bad_table_stops_the_fit_before_it_begins(tmp_path: Path) -> None:
    strategy = GossipStrategy(num_clients=3, clock=VirtualClock(latency_csv=table(tmp_path, "from,to,seconds\n")))
    with pytest.raises(ValueError, match="no line between clients 0 and 1"):
        timed(strategy)


def test_a_clock_comes_from_yaml(in_tmp_path: Path) -> None:
    prefix = "lightning_fed.federation.virtual_clock"
    latency = {"class_path": f"{prefix}.LogNormal", "init_args": {"median": 0.05, "sigma": 0.5}}
    arguments = {"seconds_per_step": 0.5, "latency": latency, "bandwidth": 1}
    entry = {"class_path": f"{prefix}.VirtualClock", "init_args": arguments}
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--strategy", type=GossipStrategy)
    config = {"class_path": "lightning_fed.GossipStrategy", "init_args": {"num_clients": 3, "clock": entry}}
    text = parser.dump(parser.parse_object({"strategy": config}))
    Path("config.yaml").write_text(text)
    parsed = parser.parse_args(["--config=config.yaml"])
    assert parser.dump(parsed) == text
    clock = parser.instantiate_classes(parsed).strategy.clock
    clock.bind(3, 0)
    assert clock.compute_seconds(0, 2) == 1.0
    written = bound(3, seconds_per_step=0.5, latency=LogNormal(0.05, 0.5), bandwidth=1)
    assert clock.transfer_seconds(0, 1, 10) == written.transfer_seconds(0, 1, 10)
