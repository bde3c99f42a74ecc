"""Which rank hosts which clients."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fed.checks import check_counts


@dataclass(frozen=True)
class Layout:
    """Clients in contiguous blocks over *hosts*; a host is one rank, or ``ranks_per_client`` replicas.

    Attributes:
        num_clients: clients of the federation, N.
        num_ranks: processes.
        ranks_per_client: ranks that train one client together, on slices of its batches.

    Raises:
        ValueError: if the clients cannot be spread that way.
    """

    num_clients: int
    num_ranks: int = 1
    ranks_per_client: int = 1

    def __post_init__(self) -> None:
        check_counts(num_clients=self.num_clients, num_ranks=self.num_ranks, ranks_per_client=self.ranks_per_client)
        if self.num_ranks % self.ranks_per_client:
            raise ValueError(
                f"ranks_per_client={self.ranks_per_client} does not divide the {self.num_ranks} ranks of this run: "
                "choose a divisor, or change `devices`/`num_nodes` of the Trainer."
            )
        if self.num_clients < self.num_hosts:
            raise ValueError(
                f"num_clients={self.num_clients} is smaller than the {self.num_hosts} hosts "
                f"({self.num_ranks} ranks / ranks_per_client={self.ranks_per_client}), so some ranks would idle for "
                "ever: raise `num_clients`, lower `devices`, or let several ranks train one client "
                "(`ranks_per_client`)."
            )

    @property
    def num_hosts(self) -> int:
        return self.num_ranks // self.ranks_per_client

    def host_of_rank(self, rank: int) -> int:
        return rank // self.ranks_per_client

    def replica_of_rank(self, rank: int) -> int:
        return rank % self.ranks_per_client

    def clients_of(self, host: int) -> range:
        """The block of clients on one host; the first ``N % num_hosts`` blocks are one client longer."""
        size, longer = divmod(self.num_clients, self.num_hosts)
        start = host * size + min(host, longer)
        return range(start, start + size + (host < longer))
