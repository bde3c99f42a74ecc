"""MoDeST: decentralized training with a fresh sample of nodes and a fresh committee of aggregators in every round.

Shapes: N = clients (the nodes), C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fed.attacks import Attack
from lightning_fed.checks import check_kinds, given
from lightning_fed.federation.algorithm import RoundFacts
from lightning_fed.federation.availability import AlwaysOn, Availability
from lightning_fed.federation.clients import ClientBank
from lightning_fed.federation.exchange import Exchange
from lightning_fed.federation.participation import Participation
from lightning_fed.federation.robust_mixing import combined_row
from lightning_fed.federation.sampler import ClientBatchSampler, JointBatch
from lightning_fed.federation.settings import check_undecided
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.federation.task_sampler import TaskSampler
from lightning_fed.federation.virtual_clock import VirtualClock
from lightning_fed.modest.live import LiveFederation
from lightning_fed.modest.rules import Rules
from lightning_fed.modest.simulation import SEED_MODEL, FederationDied, Model, RoundPlan, Simulation
from lightning_fed.robust import RobustMix
from lightning_fed.strategies.robust_settings import check_aggregators, check_number_of_clients


class MoDeSTStrategy(FederatedStrategy):
    """No server, no graph: a hash-chosen sample trains in each round, and hash-chosen nodes average its models.

    Every node computes from its own view who is asked for round k: the nodes in the order of ``md5("<node>-<k>")``.
    The first ``sample_size`` that answer a ping are the sample, the first ``num_aggregators`` the aggregators. A
    participant sends its model to the aggregators of round k + 1. An aggregator that has enough of them sends their
    uniform mean to the sample of round k + 1. Views (who is a member, and when last active) ride on every model.

    Three variants have been published. The defaults, and several aggregators, are those of the MoDeST code of 2023 (de
    Vos et al., arXiv 2302.13837v1). ``success_rounding="down"``, ``aggregation_timeout=300`` and ``min_models=3`` are
    what the Plexus code of 2025 adds. Restarts are ours: without them, a round whose aggregators all die would never
    end, whatever the variant; they change nothing while nobody fails.

    Args:
        sample_size: s, nodes that train in a round.
        num_aggregators: a, nodes that average a round's models, each for itself. Participants train on the first
            average that reaches them.
        success_fraction: share of the sample whose models an aggregator waits for. A sample that was found to be
            shorter than ``sample_size`` counts as it was found.
        success_rounding: whether that share is rounded ``"up"`` or ``"down"`` to a number of models.
        aggregation_timeout: seconds after its first model at which an aggregator goes on with ``min_models`` or more,
            or drops what it has; by default it waits.
        min_models: see there.
        ping_timeout: seconds in which a node answers a ping, or is replaced by the next in hash order.
        activity_window: rounds without a sign of life after which a node is no longer asked; by default 50, or
            ``N / s (ln N + 5)`` if that is more, so that nodes are not forgotten while they wait for their turn.
        restart_timeout: seconds without any progress after which the newest model that a live node has is sent to a
            new sample.
        availability: when nodes are there; by default always.
        robust: a rule that takes the place of the aggregators' means, see :mod:`lightning_fed.robust`; by default none.
        attack: simulated hostile clients, see :mod:`lightning_fed.attacks`; by default none.
        **federation: see :class:`~lightning_fed.federation.strategy.FederatedStrategy`; ``participation`` is decided by
            the protocol.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        sample_size: int = 10,
        num_aggregators: int = 1,
        success_fraction: float = 1.0,
        success_rounding: Literal["up", "down"] = "up",
        aggregation_timeout: float | None = None,
        min_models: int = 3,
        ping_timeout: float = 5.0,
        activity_window: int | None = None,
        restart_timeout: float = 60.0,
        availability: Availability | None = None,
        robust: RobustMix | None = None,
        attack: Attack | None = None,
        **federation: Any,
    ) -> None:
        self.rules = Rules(
            sample_size=sample_size,
            num_aggregators=num_aggregators,
            success_fraction=success_fraction,
            success_rounding=success_rounding,
            aggregation_timeout=aggregation_timeout,
            min_models=min_models,
            ping_timeout=ping_timeout,
            activity_window=activity_window,
            restart_timeout=restart_timeout,
        )
        check_undecided(federation, participation="it is MoDeST's sample, whose size is sample_size")
        check_kinds(Availability, **given(availability=availability))
        super().__init__(participation=HashSample(self), ping_timeout=ping_timeout, **federation)
        self.availability = availability or AlwaysOn()
        self.robust = robust
        self.attack = attack
        check_aggregators(self)
        self._simulation: Simulation | None = None
        self._models: dict[Model, list[Tensor]] = {}
        self._live: LiveFederation | None = None
        self._trained_here: dict[int, set[int]] = {}

    # ------------------------------------------------------------------------------------------------------ protocol

    @property
    def simulation(self) -> Simulation:
        """The protocol, played by symbols; the same on every rank. Exists from the first training loader on."""
        if self._simulation is None:
            self._simulation = self._new_simulation()
        return self._simulation

    def _new_simulation(self) -> Simulation:
        """A simulation that stands before the first round."""
        work, shards = self.sampler.work, self.shards
        return Simulation(
            num_clients=self.num_clients,
            rules=self.rules,
            availability=self.availability,
            clock=self.clock,
            model_bytes=self.bank.row_bytes if self.float_buffers == "mix" else self.bank.rows.row_bytes,
            local_steps=lambda client: work.optimizer_steps_per_round(len(shards[client])),
            seed=self.seed,
        )

    def replay(self, rounds: int) -> list[RoundPlan]:
        """What happens in the first so many rounds, simulated once more; past plans are not kept.

        Raises:
            FederationDied: if the federation does not get through them.
        """
        simulation = self._new_simulation()
        return [simulation.plan(round + 1) for round in range(rounds)]

    def plan(self, round: int) -> RoundPlan:
        """What happens in one of the engine's rounds, which are numbered from 0: this one, the last, or a later one.

        Raises:
            LookupError: if the round is over for longer.
            RuntimeError: if the federation has died out; names the last checkpoint.
        """
        try:
            return self.simulation.plan(round + 1)
        except FederationDied as death:
            raise RuntimeError(f"{death}: {self._last_checkpoint()}.") from None

    def trained_in(self, round: int) -> Collection[int]:
        """The clients that train in a round; between real processes, those of this rank that have begun to."""
        return self.plan(round).starts if self._live is None else self._trained_here.get(round, ())

    def setup_distributed(self) -> None:
        self.availability.validate(self.num_clients)
        if self.is_elastic:
            refuse_simulation(self)
        super().setup_distributed()
        check_number_of_clients(self)

    # ------------------------------------------------------------------------------------------------------ numbers

    def setup_algorithm(self, bank: ClientBank, exchange: Exchange) -> None:
        self._simulation = None
        self._models = {SEED_MODEL: [vector.clone() for vector in bank.consensus[:2]]}
        self._newest = SEED_MODEL

    def start_round(self, rows: Tensor, buffers: Tensor, exchange: Exchange) -> None:
        if self._live is not None:
            self._trained_here = {at: clients for at, clients in self._trained_here.items() if at + 1 >= self.round}
            return
        self.simulation.forget_before(self.round)  # which keeps the round before this one: its numbers count from 1
        starts = self.plan(self.round).starts
        matrices = [rows, buffers] if self.float_buffers == "mix" else [rows]
        for source in {model for model in starts.values() if model.is_trained}:  # a restart from somebody's own model
            one = np.eye(1, self.num_clients, source.client)[0]
            self._models[source] = [exchange.average(matrix, one) for matrix in matrices]
        self._place_starts(matrices, exchange)

    def _place_starts(self, matrices: list[Tensor], exchange: Exchange) -> None:
        """``x_i <- the aggregated model that reached it`` for this rank's clients that train in this round."""
        for client, model in self.plan(self.round).starts.items():
            if client in exchange.clients:
                for matrix, vector in zip(matrices, self._models[model]):
                    matrix[client - exchange.clients.start] = vector

    def corrupt_rows(self, rows: Tensor, exchange: Exchange) -> None:
        if self.attack is None:
            return
        began = rows.clone()
        self._place_starts([began], exchange)
        self.attack.corrupt(rows, began, exchange, self.cohort, (self.seed, self.round))

    def pass_time(self, clock: VirtualClock, cohort: np.ndarray, local_steps: np.ndarray) -> None:
        plan = self.plan(self.round)
        clock.now[:] = plan.ended
        clock.training_seconds += plan.training_seconds

    def mix(self, rows: Tensor, exchange: Exchange) -> None:
        if self._live is not None:
            self._adopt_newest(exchange)
            return
        starts = self._next_starts()  # first, for an average of this round may still be added meanwhile
        plan, next_round = self.plan(self.round), self.round + 2
        exchange.sent_bytes += plan.sent_bytes
        averages = [Model(next_round, aggregator, False) for aggregator in plan.averages]
        self._newest = next((model for model in averages if model in starts), averages[0])
        used = {self._newest, *starts}
        self._models = {SEED_MODEL: self._models[SEED_MODEL]}
        for model in used.intersection(averages):
            self._models[model] = [self._average(rows, model, exchange)]

    def _next_starts(self) -> set[Model]:
        """The models from which the next round begins; none if the federation dies in it, which is told then."""
        try:
            return set(self.simulation.plan(self.round + 2).starts.values())
        except FederationDied:
            return set()

    def mix_buffers(self, buffers: Tensor, exchange: Exchange) -> None:
        for model, vectors in self._models.items():
            if self._live is None and model != SEED_MODEL:
                vectors.append(self._average(buffers, model, exchange))

    def _average(self, rows: Tensor, model: Model, exchange: Exchange) -> Tensor:
        """``1/m sum`` of the m models that arrived at an aggregator, or what the robust rule makes of them; ``[P]``."""
        if self.robust is not None:
            return combined_row(self.robust, rows, self._weights(model), exchange)
        return exchange.average(rows, self._weights(model))

    def _weights(self, model: Model) -> np.ndarray:
        """Of the clients in an average, ``[N]``."""
        contributors = np.array(self.plan(self.round).averages[model.client])
        kept = np.setdiff1d(contributors, self.dropped)
        contributors = kept if len(kept) else contributors  # if all were dropped, their rows are the mean of the others
        weights = np.zeros(self.num_clients)
        weights[contributors] = 1 / len(contributors)
        return weights

    def consensus(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """The average that was done first, of those on which somebody goes on to train."""
        return self._models[self._newest][0]

    def consensus_buffers(self, buffers: Tensor, exchange: Exchange) -> Tensor:
        mixed = self.float_buffers == "mix" and len(self._models[self._newest]) == 2
        return self._models[self._newest][1] if mixed else super().consensus_buffers(buffers, exchange)

    # --------------------------------------------------------------------------------------------------------- facts

    def round_facts(self, round: int) -> RoundFacts:
        if self._live is not None:
            return RoundFacts(self._live.counts_of_round())
        plan = self.plan(round)
        numbers = {
            "live_nodes": plan.live,
            "aggregators": len(plan.averages),
            "ping_timeouts": plan.ping_timeouts,
            "models_received": plan.models_received,
            "restarts": plan.restarts,
            "round_seconds": plan.ended - plan.began,
        }
        return RoundFacts(numbers, list(plan.averages), plan.joined, plan.left, plan.offline)

    # ---------------------------------------------------------------------------------------------- real processes

    def make_sampler(self, loader: DataLoader[Any], **plan: Any) -> ClientBatchSampler:
        if self.peers is None:
            return super().make_sampler(loader, **plan)
        if self._live is None or self._live.network is not self.peers.network:
            assert self.lightning_module is not None
            epochs, survivors = self.lightning_module.trainer.max_epochs, self.peers.survivors
            self._live = LiveFederation(
                self.peers,
                self.layout,
                self.rules,
                self.seed,
                round=self.round + 1,
                model=torch.cat(self._models[self._newest][: len(self._widths())]).cpu(),
                sent_bytes=self.exchange.sent_bytes,
                last_round=epochs + 1 if epochs is not None and epochs >= 0 else math.inf,
                leader=lambda: survivors.leader,
            )
        lookahead = 1 + loader.num_workers * (loader.prefetch_factor or 0)
        return TaskSampler(self._take, lookahead, **plan)

    def _take(self, round: int) -> list[int] | None:
        """Wait for clients of this rank to train in a round, and give them the models from which they start."""
        assert self._live is not None and self.peers is not None
        if round + 2 < self._live.last_round:
            self.peers.survivors.update_soon()
        else:  # somebody must validate the result
            self.peers.survivors.update()
        tasks = self._live.take(round + 1)
        if tasks is None:
            return None
        self.bank.bind_nothing()
        for client, model in tasks.items():
            for row, part in zip(self._parts_of(client), model.split(self._widths())):
                row.copy_(part)
            if self.optimizer_state_policy == "reset":
                self.bank.forget(client)
        self._trained_here.setdefault(round, set()).update(tasks)
        return sorted(tasks)

    def after_joint_step(self, joint: JointBatch) -> None:
        """Send out the models of clients that have done their work."""
        if self._live is None or not joint.parts:
            return
        self._live.give_sign()
        minibatches = self.sampler.work.batches_per_round
        done = [part.client for part in joint.parts if part.index + 1 == minibatches(len(self.shards[part.client]))]
        if done:
            self.bank.bind_nothing()
        for client in done:
            model = torch.cat(self._parts_of(client)).cpu()
            if bool(torch.isfinite(model).all()):
                self._live.trained(client, joint.round + 1, model)
            elif self.on_nonfinite == "raise":
                raise RuntimeError(
                    f"the model of client {client} is not finite at the end of round {joint.round}: lower the learning "
                    "rate or clip gradients, or set on_nonfinite='drop' to go on without it."
                )

    def _parts_of(self, client: int) -> list[Tensor]:
        """What of a client travels: parameters, and float buffers unless they are local."""
        matrices = (self.bank.rows, self.bank.buffers) if self.float_buffers == "mix" else (self.bank.rows,)
        return [matrix.matrix[self.bank.slot(client)] for matrix in matrices]

    def _widths(self) -> list[int]:
        return [len(part) for part in self._parts_of(self.exchange.clients.start)]

    def _adopt_newest(self, exchange: Exchange) -> None:
        """The round is over: take its aggregated model, which the leader is shown, or the newest that is here."""
        assert self._live is not None
        awaits = self.is_global_zero or self.round + 2 == self._live.last_round
        patience = self.ping_timeout if awaits else 0.0
        model = self._live.await_model(self.round + 2, patience)
        exchange.sent_bytes[:] = self._live.count_bytes()
        self._newest = Model(self.round + 2, SEED_MODEL.client, False)
        device = self.bank.rows.matrix.device
        self._models = {
            SEED_MODEL: self._models[SEED_MODEL],
            self._newest: [part.to(device) for part in model.split(self._widths())],
        }

    # -------------------------------------------------------------------------------------------------- checkpoints

    def algorithm_state(self) -> dict[str, Any]:
        return {
            "protocol": self._protocol(),
            "newest": list(self._newest),
            "models": [(list(model), vectors) for model, vectors in self._models.items()],
        }

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        saved, mine = state["protocol"], self._protocol()
        for name in mine:
            if saved.get(name) != mine[name]:
                raise ValueError(
                    f"the checkpoint's federation has {name}={saved.get(name)!r}, but this run has {mine[name]!r}, so "
                    "its rounds cannot be repeated: resume with the settings of the run that saved it."
                )
        like = self._models[SEED_MODEL]
        self._newest = Model(*state["newest"])
        self._models = {
            Model(*model): [vector.to(template) for vector, template in zip(vectors, like)]
            for model, vectors in state["models"]
        }

    def _protocol(self) -> dict[str, Any]:
        """All that the course of the protocol depends on, beside the data: a resumed run repeats it."""
        availability = {"availability": type(self.availability).__name__, **vars(self.availability)}
        return {
            **asdict(self.rules),
            **{name: str(value) for name, value in availability.items()},
            "on_peer_loss": "drop" if self.is_elastic else "raise",
        }

    def _last_checkpoint(self) -> str:
        """Where a federation that has died can be taken up again, for a message."""
        assert self.lightning_module is not None
        callbacks = self.lightning_module.trainer.checkpoint_callbacks
        files = [Path(path) for c in callbacks if isinstance(c, ModelCheckpoint) for path in saved_by(c)]
        files = [path for path in files if path.exists()]
        if not files:
            return "no checkpoint was saved; add a ModelCheckpoint callback to keep what was reached"
        return f"the last checkpoint is {str(max(files, key=lambda path: path.stat().st_mtime))!r}"


class HashSample(Participation):
    """Who trains in a round, as MoDeST's protocol decides it."""

    def __init__(self, strategy: MoDeSTStrategy) -> None:
        self.strategy = strategy

    def cohort(self, round: int, num_clients: int, seed: int) -> np.ndarray:
        return np.array(sorted(self.strategy.trained_in(round)), dtype=np.int64)

    def validate(self, num_clients: int) -> None:
        if self.strategy.rules.sample_size > num_clients:
            raise ValueError(
                f"sample_size={self.strategy.rules.sample_size} is larger than num_clients={num_clients}: lower the "
                "sample size, or add clients."
            )


def saved_by(callback: ModelCheckpoint) -> list[str]:
    """The files that a callback has written and not deleted."""
    return [path for path in (callback.last_model_path, *callback.best_k_models, callback.best_model_path) if path]


def refuse_simulation(strategy: MoDeSTStrategy) -> None:
    """Real processes live and die in real time, and see their own clients only.

    Raises:
        ValueError: naming the setting that asks for something else.
    """
    way_out = "but with on_peer_loss='drop' rounds are those of real processes, which know each other by messages alone"
    for setting, is_asked, instead in (
        ("availability", not isinstance(strategy.availability, AlwaysOn), "leave it out"),
        ("clock", strategy.clock is not None, "leave it out"),
        ("rounds_per_epoch", strategy.rounds_per_epoch != 1, "use 1"),
        ("evaluate", strategy.evaluate != "consensus", "use 'consensus'"),
    ):
        if is_asked:
            raise ValueError(f"{setting}={getattr(strategy, setting)!r} is for simulations, {way_out}: {instead}.")
