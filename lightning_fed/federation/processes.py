"""The processes of a federation: how ranks start, and the groups in which they meet."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch.distributed.device_mesh import init_device_mesh

from lightning_fed.federation.exchange import CollectiveExchange, Exchange, LoopbackExchange
from lightning_fed.federation.layout import Layout


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

    Attributes:
        exchange: how the clients' rows meet.
        replicas: the ranks that train one client with this one; None if ``ranks_per_client`` is 1.
    """

    def __init__(
        self,
        num_clients: int | None,
        ranks_per_client: int,
        process_group_backend: str | None,
        timeout: float,
        start_method: Literal["popen", "spawn", "fork", "forkserver"],
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
            start_method=start_method,
        )
        self._forward_redirection = _ForwardRedirection()
        self._num_clients = num_clients
        self.ranks_per_client = ranks_per_client
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

    def setup_distributed(self) -> None:
        """Start the process group; one rank alone needs none."""
        reset_seed()
        self.set_world_ranks()
        layout = self.layout
        if self.world_size == 1:
            if self.exchange.layout != layout:
                self.exchange = LoopbackExchange(layout)
            return
        super().setup_distributed()
        if self.exchange.layout == layout and isinstance(self.exchange, CollectiveExchange):
            return
        shape, names = (layout.num_hosts, layout.ranks_per_client), ("client", "replica")
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        self.replicas = mesh.get_group("replica") if self.ranks_per_client > 1 else None
        self.exchange = CollectiveExchange(layout, layout.host_of_rank(self.global_rank), mesh.get_group("client"))

    def gather_objects(self, value: Any) -> list[Any]:
        """The (small, picklable) values of all ranks, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values
