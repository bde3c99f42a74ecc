"""The processes of a federation: how ranks start, and the groups in which they meet."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_fed.checks import check_choice, check_counts, check_seconds, given
from lightning_fed.federation.client_logs import LogEntry, Logs
from lightning_fed.federation.durable_files import DurableCheckpointIO
from lightning_fed.federation.elastic_exchange import ElasticExchange
from lightning_fed.federation.elastic_launcher import ElasticScriptLauncher
from lightning_fed.federation.exchange import CollectiveExchange, Exchange, LoopbackExchange
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.peers import Peers
from lightning_fed.federation.settings import check_backend

SHORT_TEXT = 2048  # bytes


class FederationProcesses(DDPStrategy):
    """Ranks that host clients.

    ``DDPStrategy`` is the base for its launchers and its place in Lightning (``torch.compile``, ``sync_dist``); the
    module is never wrapped, and gradients never leave a client.

    Args:
        num_clients: clients of the federation, N; by default one a host (a rank, or ``ranks_per_client`` ranks).
        ranks_per_client: ranks that train one client together.
        process_group_backend: of ``torch.distributed``; by default NCCL on GPUs and gloo on CPUs.
        timeout: seconds that a rank waits for another one.
        start_method: how Lightning starts ranks when no launcher such as torchrun or SLURM has.
        on_peer_loss: ``"raise"``: all ranks must live. ``"drop"``: those that live go on (an *elastic* federation).
        ping_timeout: seconds in which a living rank of an elastic federation answers.

    Attributes:
        exchange: how the clients' rows meet.
        replicas: the ranks that train one client with this one; None if ``ranks_per_client`` is 1.
        peers: the other ranks of an elastic federation, during a fit; else None.
    """

    def __init__(
        self,
        num_clients: int | None,
        ranks_per_client: int,
        process_group_backend: str | None,
        timeout: float,
        start_method: Literal["popen", "spawn", "fork", "forkserver"],
        on_peer_loss: Literal["raise", "drop"],
        ping_timeout: float,
    ) -> None:
        check_choice("on_peer_loss", on_peer_loss, "raise", "drop")
        check_choice("start_method", start_method, "popen", "spawn", "fork", "forkserver")
        check_counts(ranks_per_client=ranks_per_client, **given(num_clients=num_clients))
        check_seconds(timeout=timeout, ping_timeout=ping_timeout)
        check_backend(process_group_backend)
        if on_peer_loss == "drop" and ranks_per_client > 1:
            raise ValueError(
                f"ranks_per_client={ranks_per_client} makes ranks average gradients at every step, where all must "
                "live, but on_peer_loss='drop' lets them die: use ranks_per_client=1, or on_peer_loss='raise'."
            )
        super().__init__(
            checkpoint_io=DurableCheckpointIO(),
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
            start_method=start_method,
        )
        self._forward_redirection = _ForwardRedirection()
        self._num_clients = num_clients
        self.ranks_per_client = ranks_per_client
        self.on_peer_loss = on_peer_loss
        self.ping_timeout = ping_timeout
        self.peers: Peers | None = None
        self._fits = 0
        self._leads: bool | None = None  # of an elastic federation, also after its fit
        self.exchange: Exchange = LoopbackExchange(Layout(1))
        self.replicas: dist.ProcessGroup | None = None

    @property
    def num_clients(self) -> int:
        """Clients of the federation, N."""
        return self._num_clients or self.world_size // self.ranks_per_client

    @property
    def layout(self) -> Layout:
        """Which host has which clients.

        Raises:
            ValueError: if the clients cannot be spread over the ranks of this run.
        """
        return Layout(self.num_clients, self.world_size, self.ranks_per_client)

    @property
    def is_distributed(self) -> bool:
        # Lightning reads it for `sync_dist`; DDPStrategy's own property warns on every use.
        return True

    @property
    def is_elastic(self) -> bool:
        """Whether ranks may die without the others; one rank alone has nobody to lose."""
        return self.on_peer_loss == "drop" and self.world_size > 1

    @property
    def is_global_zero(self) -> bool:
        """Whether this rank logs, validates and writes checkpoints for all."""
        if self.peers is not None:
            self._leads = self.peers.survivors.is_leader
        return self.global_rank == 0 if self._leads is None else self._leads

    def _configure_launcher(self) -> None:
        if self.on_peer_loss == "drop" and self._start_method == "popen":
            assert self.cluster_environment is not None
            self._launcher = ElasticScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        """Start the process group, or meet the peers; one rank alone needs neither."""
        reset_seed()
        self.set_world_ranks()
        layout = self.layout
        if self.world_size == 1:
            if self.exchange.layout != layout:
                self.exchange = LoopbackExchange(layout)
            return
        if self.is_elastic:
            self._meet_peers(layout)
            return
        super().setup_distributed()
        if self.exchange.layout == layout and isinstance(self.exchange, CollectiveExchange):
            return
        shape, names = (layout.num_hosts, layout.ranks_per_client), ("client", "replica")
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        self.replicas = mesh.get_group("replica") if self.ranks_per_client > 1 else None
        self.exchange = CollectiveExchange(layout, layout.host_of_rank(self.global_rank), mesh.get_group("client"))

    def _meet_peers(self, layout: Layout) -> None:
        """Only a fit needs peers: an elastic federation evaluates on each rank alone."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return
        assert self._timeout is not None
        message_timeout = self._timeout.total_seconds()
        self.peers = Peers(self.global_rank, self.world_size, self._fits, self.ping_timeout, message_timeout)
        self._fits += 1
        self.exchange = ElasticExchange(layout, self.peers)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Ranks that may die decide alone; those of a process group together."""
        return decision if self.is_elastic else super().reduce_boolean_decision(decision, all)

    def teardown(self) -> None:
        self._leads = self.is_global_zero if self.is_elastic else None
        peers, self.peers = self.peers, None
        if peers is not None:
            peers.close()
        super().teardown()

    def gather_plain(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; of an elastic federation this rank's alone.

        Args:
            value: what JSON can hold, so that nothing that comes from another rank is ever unpickled.
        """
        if self.world_size == 1 or self.is_elastic:
            return [value]
        return [json.loads(text) for text in gather_texts(json.dumps(value), self._device_of_messages)]

    @property
    def _device_of_messages(self) -> torch.device:
        return self.root_device if dist.get_backend() == "nccl" else torch.device("cpu")

    def gather_logs(self, logs: Logs) -> list[Logs]:
        """What all ranks have logged in an epoch, in rank order; of an elastic federation this rank's alone."""
        if self.world_size == 1 or self.is_elastic:
            return [logs]
        ranks = self.gather_plain({name: entry.to_plain() for name, entry in logs.items()})
        return [{name: LogEntry.from_plain(plain) for name, plain in of_rank.items()} for of_rank in ranks]


def gather_texts(text: str, device: torch.device) -> list[str]:
    """The texts of all ranks; a collective call. Short ones take a single message, long ones two."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    length = SHORT_TEXT
    while True:
        sizes, everyone = gather_padded(mine, length, device)
        if max(sizes) <= length:
            return [bytes(theirs[:size].tolist()).decode() for theirs, size in zip(everyone, sizes)]
        length = max(sizes)


def gather_padded(message: Tensor, length: int, device: torch.device) -> tuple[list[int], Tensor]:
    """The sizes of all ranks' messages, and their first ``length`` bytes ``[ranks, length]``, padded."""
    head, part = torch.tensor([len(message)]).view(torch.uint8), message[:length]
    mine = torch.cat([head, nn.functional.pad(part, (0, length - len(part)))]).to(device)
    everyone = mine.new_empty(dist.get_world_size() * len(mine))
    dist.all_gather_into_tensor(everyone, mine)
    heads, parts = everyone.cpu().view(-1, len(mine)).split([len(head), length], dim=1)
    return heads.contiguous().view(torch.int64).flatten().tolist(), parts
