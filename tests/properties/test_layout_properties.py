"""Layouts, graphs and partitions: what must hold for any numbers of clients, ranks and samples."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fed.federation.layout import Layout
from lightning_fed.mixing_matrix import restrict
from lightning_fed.partition import IID, ByAttribute, Dirichlet, Partitioner, QuantitySkew, Shards
from lightning_fed.topology import (
    Complete,
    ErdosRenyi,
    Exponential,
    GraphFile,
    OnePeerExponential,
    RandomRegular,
    Ring,
    Star,
    Topology,
    Torus,
)


@given(hosts=st.integers(1, 40), more=st.integers(0, 200), replicas=st.integers(1, 4))
def test_every_client_is_on_one_host_in_contiguous_blocks_of_nearly_equal_size(
    hosts: int, more: int, replicas: int
) -> None:
    layout = Layout(hosts + more, hosts * replicas, replicas)
    blocks = [layout.clients_of(host) for host in range(layout.num_hosts)]
    assert [client for block in blocks for client in block] == list(range(hosts + more))
    sizes = {len(block) for block in blocks}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    ranks = [(layout.host_of_rank(rank), layout.replica_of_rank(rank)) for rank in range(hosts * replicas)]
    assert sorted(ranks) == [(host, replica) for host in range(hosts) for replica in range(replicas)]


# ---------------------------------------------------------------------------------------------------------- topologies

TOPOLOGIES: dict[str, Callable[[int, int], Topology]] = {
    "ring": lambda n, seed: Ring(),
    "torus": lambda n, seed: Torus(),
    "exponential": lambda n, seed: Exponential(),
    "one-peer exponential": lambda n, seed: OnePeerExponential(),
    "star": lambda n, seed: Star(),
    "complete": lambda n, seed: Complete(),
    "random regular": lambda n, seed: RandomRegular(min(4, n - 1) if n > 1 else 1, seed),
    "Erdos-Renyi": lambda n, seed: ErdosRenyi(1.0 if n < 8 else 0.9, seed),
}


def assert_mixes(topology: Topology, num_clients: int) -> None:
    """W of every round is doubly stochastic on the round's edges, symmetric if undirected; a period is connected."""
    identity, union = np.eye(num_clients, dtype=bool), nx.empty_graph(num_clients)
    for round in range(topology.period(num_clients) or 1):
        weights, graph = topology.weights(num_clients, round), topology.graph(num_clients, round)
        assert weights.min() >= 0
        np.testing.assert_allclose([weights.sum(axis=0), weights.sum(axis=1)], 1, rtol=0, atol=1e-12)
        edges = nx.to_numpy_array(graph, nodelist=range(num_clients), weight=None).T > 0
        np.testing.assert_array_equal(weights > 0, edges | identity)
        if not graph.is_directed():
            np.testing.assert_array_equal(weights, weights.T)
        union.add_edges_from(graph.edges)
    assert nx.is_connected(union)


@pytest.mark.parametrize("name", TOPOLOGIES)
@given(num_clients=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_weights_of_any_topology(name: str, num_clients: int, seed: int) -> None:
    if name == "random regular" and num_clients % 2:
        num_clients += 1
    topology, same = TOPOLOGIES[name](num_clients, seed), TOPOLOGIES[name](num_clients, seed)
    assert_mixes(topology, num_clients)
    np.testing.assert_array_equal(topology.weights(num_clients), same.weights(num_clients))


@given(data=st.data(), num_clients=st.integers(2, 12))
def test_any_connected_graph_of_a_file_mixes_and_any_other_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, num_clients: int
) -> None:
    pairs = [(i, j) for i in range(num_clients) for j in range(i)]
    chosen = data.draw(st.lists(st.sampled_from(pairs), min_size=1, unique=True))
    graph = nx.empty_graph(num_clients)
    graph.add_edges_from(chosen)
    path = tmp_path_factory.mktemp("graph") / "graph.edgelist"
    path.write_text("\n".join(f"{i} {j}" for i, j in chosen) + "\n")
    if nx.is_connected(graph):
        assert_mixes(GraphFile(path), num_clients)
        return
    with pytest.raises(ValueError, match=r"not connected|its nodes must be"):
        GraphFile(path).weights(num_clients)


@pytest.mark.parametrize("name", ["ring", "torus", "star", "complete", "random regular"])
@given(data=st.data(), pairs=st.integers(1, 10))
def test_a_cohorts_weights_are_doubly_stochastic_and_leave_the_absent_alone(
    name: str, data: st.DataObject, pairs: int
) -> None:
    num_clients = 2 * pairs
    present = np.array(data.draw(st.lists(st.booleans(), min_size=num_clients, max_size=num_clients)))
    weights = TOPOLOGIES[name](num_clients, 0).weights(num_clients)
    found = restrict(weights, present)
    np.testing.assert_allclose([found.sum(axis=0), found.sum(axis=1)], 1, rtol=0, atol=1e-12)
    assert found.min() >= 0
    both = np.outer(present, present) & ~np.eye(num_clients, dtype=bool)
    np.testing.assert_array_equal(found[both], weights[both])
    assert not found[~both & ~np.eye(num_clients, dtype=bool)].any()


# ---------------------------------------------------------------------------------------------------------- partitions

PARTITIONERS: dict[str, Callable[[np.ndarray], Partitioner]] = {
    "IID": lambda labels: IID(),
    "Dirichlet": lambda labels: Dirichlet(0.5, min_samples=0),
    "balanced Dirichlet": lambda labels: Dirichlet(0.1, balanced=True),
    "shards": lambda labels: Shards(2),
    "quantity skew": lambda labels: QuantitySkew(0.5, min_samples=0),
    "by attribute": lambda labels: ByAttribute((np.arange(len(labels)) // 2).tolist()),
}


@pytest.mark.parametrize("name", PARTITIONERS)
@given(data=st.data(), num_clients=st.integers(1, 8), seed=st.integers(0, 2**63 - 1))
def test_each_sample_has_one_owner_who_depends_on_the_seed_alone(
    name: str, data: st.DataObject, num_clients: int, seed: int
) -> None:
    size = data.draw(st.integers(2 * num_clients, 80))
    labels = np.array(data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    parts = PARTITIONERS[name](labels)(labels, num_clients, seed)
    np.random.seed(0)  # the global stream has no say
    again = PARTITIONERS[name](labels)(labels.copy(), num_clients, seed)
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(size))
    assert all(np.array_equal(part, same) for part, same in zip(parts, again))
    if name in ("IID", "balanced Dirichlet"):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if name == "by attribute":
        owner = np.empty(size, dtype=int)
        for client, part in enumerate(parts):
            owner[part] = client
        np.testing.assert_array_equal(owner[: size // 2 * 2 : 2], owner[1::2])


@given(
    num_clients=st.integers(1, 6), least=st.integers(0, 6), seed=st.integers(0, 2**31), kind=st.sampled_from([0, 1, 2])
)
def test_everybody_has_the_least_number_of_samples_that_was_asked_for(
    num_clients: int, least: int, seed: int, kind: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, 4, 60)
    partitioner = (
        Dirichlet(0.5, min_samples=least),
        Dirichlet(0.5, min_samples=least, balanced=True),
        QuantitySkew(0.5, min_samples=least),
    )[kind]
    try:
        sizes = [len(part) for part in partitioner(labels, num_clients, seed)]
    except ValueError as error:
        assert f"min_samples={least}" in str(error)
        return
    assert min(sizes) >= least and sum(sizes) == 60
