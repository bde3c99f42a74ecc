"""Who talks to whom, and with which weights: graphs of clients and their mixing matrices.

Shapes: N = clients.

A mixing matrix W is float64 ``[N, N]``, non-negative and doubly stochastic: ``weights[i, j]`` is what client *i* gives
to the row it receives from client *j*, and a gossip step is ``X <- W X``. How fast gossip forgets disagreement is its
spectral gap, ``1 - ||W - 11^T/N||_2``: 1 averages everything in one step, 0 never agrees.

A topology of your own is one method, ``graph``; see :class:`Ring`.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import networkx as nx
import numpy as np

from lightning_fed.checks import check_choice, check_counts, check_numbers, check_paths, given
from lightning_fed.mixing_matrix import checked_doubly_stochastic, frozen, metropolis_weights, uniform_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mixing = Literal["metropolis", "uniform"]
TopologyName = Literal["ring", "torus", "exponential", "one-peer-exponential", "star", "complete"]

EXACT_CONSENSUS = 1e-12
CONNECTED_DRAWS = 100


class Topology(ABC):
    """A graph over any number of clients, perhaps another one each round, and its mixing matrix.

    Args:
        mixing: how edges become weights. ``"metropolis"`` (Metropolis-Hastings; Xiao, Boyd, Lall 2006):
            ``w_ij = 1 / (1 + max(deg_i, deg_j))`` and the remainder on the diagonal, doubly stochastic on every
            undirected graph. ``"uniform"``: ``1 / (1 + deg_i)`` for each neighbour and oneself, doubly stochastic only
            if all degrees are equal, also on directed graphs.

    Raises:
        ValueError: if ``mixing`` is unknown.
    """

    mixings: tuple[str, ...] = get_args(Mixing)

    def __init__(self, mixing: Mixing = "metropolis") -> None:
        check_choice("mixing", mixing, *self.mixings)
        self.mixing: str = mixing
        self._matrices: dict[tuple[int, int], np.ndarray] = {}
        self._connected: set[int] = set()

    @abstractmethod
    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        """The edges of one round.

        Args:
            num_clients: N.
            round: the number of the gossip step, from 0.

        Returns:
            A graph on the nodes ``0 .. N-1`` without self loops: ``nx.Graph``, or ``nx.DiGraph`` whose edge ``(u, v)``
            means that u sends to v.
        """

    def period(self, num_clients: int) -> int | None:
        """Rounds after which the graphs repeat: 1 for a static topology, None if they never do."""
        return 1

    def weights(self, num_clients: int, round: int = 0) -> np.ndarray:
        """The mixing matrix of one round.

        Args:
            num_clients: N.
            round: the number of the gossip step, from 0.

        Returns:
            Read-only float64 ``[N, N]``, doubly stochastic; the non-zeros of row i are i's in-neighbours and i itself.
            Rounds that share a matrix get the same array object, so a caller may cache by identity.

        Raises:
            ValueError: if the graph does not suit this number of clients, if the union of the graphs of a period is not
                connected (not checked if there is no period), or if the weights are not doubly stochastic.
        """
        if num_clients < 1:
            raise ValueError(f"num_clients={num_clients} must be at least 1.")
        period = self.period(num_clients)
        key = num_clients, round if period is None else round % period
        if key not in self._matrices:
            self._check_connected(num_clients)
            if period is None:
                self._matrices.clear()  # an endless run must not keep an endless list of matrices
            self._matrices[key] = self._matrix(*key)
        return self._matrices[key]

    def spectral_gap(self, num_clients: int, round: int | None = None) -> float:
        """How much disagreement a gossip step removes: ``1 - ||W - 11^T/N||_2``, in ``[0, 1]``.

        Args:
            num_clients: N.
            round: look at this round's matrix alone. None: at a whole period of T rounds, as the gap per round
                ``1 - ||W_{T-1} ... W_0 - 11^T/N||_2 ** (1/T)``; the same for a static topology.

        Raises:
            ValueError: as :meth:`weights`; or if ``round`` is None and the topology never repeats.
        """
        period = self.period(num_clients)
        if round is not None:
            rounds = [round]
        elif period is not None:
            rounds = list(range(period))
        else:
            raise ValueError(f"{type(self).__name__} never repeats and has no gap per period: name a round.")
        product = np.eye(num_clients)
        for number in rounds:
            product = self.weights(num_clients, number) @ product
        distance = float(np.linalg.norm(product - 1 / num_clients, 2))
        return 1 - distance ** (1 / len(rounds)) if distance > EXACT_CONSENSUS else 1.0

    def plot(self, num_clients: int, axes: Axes | None = None) -> Axes:
        """Draw the graph (of a time-varying topology: all edges of a period), titled with its spectral gap.

        Args:
            num_clients: N.
            axes: where to draw; None makes a new figure, ``axes.figure``, that no pyplot state knows of.

        Returns:
            The axes. Needs matplotlib.
        """
        from matplotlib.figure import Figure

        axes = axes if axes is not None else Figure(figsize=(4, 4)).add_subplot()
        union = self._union(num_clients)
        nx.draw_networkx(
            union, nx.circular_layout(union), ax=axes, node_size=200, font_size=8, node_color="C0", edge_color="0.6"
        )
        gap = self.spectral_gap(num_clients, round=None if self.period(num_clients) else 0)
        axes.set_title(f"{type(self).__name__}, {num_clients} clients, spectral gap {gap:.3g}")
        axes.set_axis_off()
        return axes

    def _union(self, num_clients: int) -> nx.Graph:
        """All edges of a period; those of round 0 if there is no period."""
        return nx.compose_all([self.graph(num_clients, round) for round in range(self.period(num_clients) or 1)])

    def _check_connected(self, num_clients: int) -> None:
        if num_clients in self._connected:
            return
        if self.period(num_clients) is not None:
            # Under doubly stochastic weights a weakly connected graph is strongly connected: one test serves both.
            parts = nx.number_connected_components(self._union(num_clients).to_undirected())
            if parts > 1:
                raise ValueError(
                    f"{type(self).__name__} with num_clients={num_clients} is not connected: it falls into {parts} "
                    "parts that would never agree. Add edges between them, or use another topology."
                )
        self._connected.add(num_clients)

    def _matrix(self, num_clients: int, round: int) -> np.ndarray:
        graph = self.graph(num_clients, round)
        name = type(self).__name__
        if set(graph) != set(range(num_clients)):
            raise ValueError(
                f"{name} has {len(graph)} nodes, but num_clients={num_clients}: its nodes must be the integers "
                f"0 .. {num_clients - 1}."
            )
        if nx.number_of_selfloops(graph):
            loop = next(iter(nx.nodes_with_selfloops(graph)))
            raise ValueError(f"{name} has a self loop at node {loop}: remove it, a client keeps the remaining weight.")
        return frozen(checked_doubly_stochastic(self._weigh(graph), name))

    def _weigh(self, graph: nx.Graph) -> np.ndarray:
        """The mixing matrix ``[N, N]`` of one graph."""
        if self.mixing == "uniform":
            return uniform_weights(graph, type(self).__name__)
        return metropolis_weights(graph, type(self).__name__)


class Ring(Topology):
    """A cycle: client i talks to i - 1 and i + 1. Spectral gap O(1/N^2)."""

    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        return circulant(num_clients, [1])


class Torus(Topology):
    """A grid with wrap-around: four neighbours, fewer if a side is shorter than 3. Spectral gap O(1/N).

    Args:
        rows: side of the grid; None chooses the most square one that N allows (a prime N gives a ring).
        mixing: see :class:`Topology`.
    """

    def __init__(self, rows: int | None = None, mixing: Mixing = "metropolis") -> None:
        super().__init__(mixing)
        check_counts(**given(rows=rows))
        self.rows = rows

    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        rows = self.rows or max(side for side in range(1, math.isqrt(num_clients) + 1) if num_clients % side == 0)
        columns, remainder = divmod(num_clients, rows)
        if remainder:
            raise ValueError(
                f"a torus with rows={rows} does not fit num_clients={num_clients}: choose a divisor of {num_clients}, "
                "or leave rows out for the most square torus."
            )
        grid = nx.empty_graph(num_clients)
        for client in range(num_clients):
            row, column = divmod(client, columns)
            right, below = row * columns + (column + 1) % columns, (row + 1) % rows * columns + column
            grid.add_edges_from((client, neighbour) for neighbour in (right, below) if neighbour != client)
        return grid


class Exponential(Topology):
    """Static exponential graph (Assran et al. 2019; Ying et al. 2021): i sends to i + 1, i + 2, i + 4, ... modulo N.

    Directed; ``tau = ceil(log2 N)`` hops, all weights ``1 / (tau + 1)``. The spectral gap is ``2 / (tau + 1)``.
    """

    def __init__(self) -> None:
        super().__init__(mixing="uniform")

    def graph(self, num_clients: int, round: int = 0) -> nx.DiGraph:
        return circulant(num_clients, exponential_hops(num_clients), directed=True)


class OnePeerExponential(Topology):
    """One-peer exponential graph (Assran et al. 2019; Ying et al. 2021): in round t, i sends to ``i + 2^(t mod tau)``.

    Directed; ``tau = ceil(log2 N)`` is the period, the weights are 1/2 and 1/2. If N is a power of two, the product of
    the matrices of one period is exactly ``11^T / N``.
    """

    def __init__(self) -> None:
        super().__init__(mixing="uniform")

    def period(self, num_clients: int) -> int:
        return max(len(exponential_hops(num_clients)), 1)

    def graph(self, num_clients: int, round: int = 0) -> nx.DiGraph:
        hop = exponential_hops(num_clients)[round % self.period(num_clients) :][:1]
        return circulant(num_clients, hop, directed=True)


class RandomRegular(Topology):
    """A random graph in which every client has the same number of neighbours, drawn once.

    A draw that is not connected is repeated. One client alone needs no neighbours.

    Args:
        degree: neighbours of each client; smaller than N, and ``degree * N`` must be even.
        seed: of the draw.
        mixing: see :class:`Topology`; both give the same weights here.
    """

    def __init__(self, degree: int, seed: int = 0, mixing: Mixing = "metropolis") -> None:
        super().__init__(mixing)
        check_counts(degree=degree)
        check_counts(0, seed=seed)
        self.degree = degree
        self.seed = seed

    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        if num_clients == 1:
            return nx.empty_graph(1)
        if self.degree >= num_clients:
            raise ValueError(
                f"degree={self.degree} needs more than {self.degree} clients, but num_clients={num_clients}: lower the "
                "degree, or use the complete topology."
            )
        if self.degree * num_clients % 2:
            raise ValueError(
                f"no graph has num_clients={num_clients} nodes of degree={self.degree}, because their product is odd: "
                "change one of them by 1."
            )
        draw = random.Random(self.seed)
        for _ in range(CONNECTED_DRAWS):
            graph = nx.random_regular_graph(self.degree, num_clients, seed=draw)
            if nx.is_connected(graph):
                return graph
        raise ValueError(
            f"none of {CONNECTED_DRAWS} random graphs of degree={self.degree} on num_clients={num_clients} nodes "
            f"(seed={self.seed}) was connected: raise the degree."
        )


class ErdosRenyi(Topology):
    """A random graph in which each pair of clients is joined independently (Gilbert 1959), drawn once.

    It is connected with high probability if ``probability`` is well above ``ln(N) / N``; a draw that is not is refused.

    Args:
        probability: of each edge, in (0, 1].
        seed: of the draw.
        mixing: see :class:`Topology`.
    """

    def __init__(self, probability: float, seed: int = 0, mixing: Mixing = "metropolis") -> None:
        super().__init__(mixing)
        check_numbers("(0, 1]", probability=probability)
        check_counts(0, seed=seed)
        self.probability = probability
        self.seed = seed

    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        graph = nx.gnp_random_graph(num_clients, self.probability, seed=self.seed)
        if not nx.is_connected(graph):
            raise ValueError(
                f"the Erdos-Renyi graph of num_clients={num_clients}, probability={self.probability}, seed={self.seed} "
                f"is not connected: take another seed, or a probability well above ln(N)/N = "
                f"{math.log(num_clients) / num_clients:.3g}."
            )
        return graph


class Star(Topology):
    """Client 0 talks to everybody, the others only to client 0. Spectral gap 1/N."""

    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        return nx.star_graph(num_clients - 1)


class Complete(Topology):
    """Everybody talks to everybody: all weights are exactly 1/N, and one gossip step is the mean."""

    def __init__(self) -> None:
        super().__init__(mixing="uniform")

    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        return nx.complete_graph(num_clients)


class GraphFile(Topology):
    """A graph read from a file when it is first needed; its nodes must be the integers ``0 .. N-1``.

    Args:
        path: GraphML (``.graphml``, undirected or directed), or an undirected edge list (any other suffix): one edge
            ``u v`` or ``u v weight`` a line, separated by blanks or commas; ``#`` begins a comment.
        mixing: see :class:`Topology`; then ``weight`` attributes of edges are not used. Or ``"file"``: they are the
            off-diagonal entries of W (of a directed edge from u to v: ``W[v, u]``), and the diagonal is the remainder.
    """

    mixings = (*get_args(Mixing), "file")

    def __init__(self, path: str | Path, mixing: Literal["metropolis", "uniform", "file"] = "metropolis") -> None:
        super().__init__(cast(Mixing, mixing))
        check_paths(path=path)
        self.path = Path(path)

    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        if not self.path.is_file():
            raise ValueError(f"the graph file path={str(self.path)!r} does not exist.")
        graph = self._read_graphml() if self.path.suffix == ".graphml" else self._read_edge_list()
        if set(graph) != set(range(num_clients)):
            raise ValueError(
                f"the graph file {self.path} has {len(graph)} nodes, but num_clients={num_clients}: its nodes must be "
                f"labelled 0 .. {num_clients - 1}."
            )
        return graph

    def _read_graphml(self) -> nx.Graph:
        try:
            graph = nx.read_graphml(self.path, node_type=int)
        except Exception as error:  # the parser raises whatever the XML module does
            raise ValueError(f"{self.path} cannot be read as GraphML with integer node labels: {error}.") from error
        if graph.is_multigraph():
            raise ValueError(f"the graph file {self.path} has parallel edges: keep one edge for each pair of clients.")
        return graph

    def _read_edge_list(self) -> nx.Graph:
        graph = nx.Graph()
        for number, line in enumerate(self.path.read_text().splitlines(), start=1):
            fields = line.split("#")[0].replace(",", " ").split()
            if not fields:
                continue
            try:
                source, target = int(fields[0]), int(fields[1])
                attributes = {"weight": float(fields[2])} if len(fields) > 2 else {}
            except (ValueError, IndexError):
                raise ValueError(
                    f"line {number} of {self.path} is {line.strip()!r}, but must be `u v` or `u v weight` with "
                    "integers u and v."
                ) from None
            if graph.edges.get((source, target), attributes) != attributes:
                raise ValueError(f"line {number} of {self.path} repeats edge {source}-{target} with another weight.")
            graph.add_edge(source, target, **attributes)
        return graph

    def _weigh(self, graph: nx.Graph) -> np.ndarray:
        if self.mixing != "file":
            return super()._weigh(graph)
        for source, target, weight in graph.edges(data="weight"):
            if not (isinstance(weight, (int, float)) and weight > 0):
                raise ValueError(
                    f"edge {source}-{target} of {self.path} has weight={weight!r}, but mixing='file' needs a number "
                    "above 0 on every edge: correct it, or use mixing='metropolis'."
                )
        weights: np.ndarray = nx.to_numpy_array(graph, nodelist=range(len(graph)), weight="weight").T.copy()
        np.fill_diagonal(weights, 1 - weights.sum(axis=1))
        return weights


def circulant(num_clients: int, hops: Iterable[int], directed: bool = False) -> nx.Graph:
    """The graph in which client i is joined to (or, directed, sends to) ``i + hop`` modulo N for every hop."""
    graph = nx.empty_graph(num_clients, create_using=nx.DiGraph if directed else nx.Graph)
    for hop in hops:
        if hop % num_clients:
            graph.add_edges_from((client, (client + hop) % num_clients) for client in range(num_clients))
    return graph


def exponential_hops(num_clients: int) -> list[int]:
    """``2^0 .. 2^(tau-1)`` with ``tau = ceil(log2 N)``; empty for one client."""
    return [2**power for power in range((num_clients - 1).bit_length())]


def by_name(name: str) -> Topology:
    """The topology of a short name, for those that need no arguments.

    Args:
        name: see ``TopologyName``.

    Raises:
        ValueError: if the name is unknown, with the names that are known.
    """
    topologies: dict[str, Callable[[], Topology]] = {
        "ring": Ring,
        "torus": Torus,
        "exponential": Exponential,
        "one-peer-exponential": OnePeerExponential,
        "star": Star,
        "complete": Complete,
    }
    if name not in topologies:
        raise ValueError(
            f"topology={name!r} is unknown: choose one of {', '.join(topologies)}, or pass a Topology object."
        )
    return topologies[name]()
