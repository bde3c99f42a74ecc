from __future__ import annotations

import importlib
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fed.mixing_matrix import restrict
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
    by_name,
)

NAMES = ["ring", "torus", "exponential", "one-peer-exponential", "star", "complete"]

# rho = ||W - 11^T/N||_2 of Metropolis-Hastings weights, computed independently of this package.
RHO = {
    8: {"ring": 0.8047, "torus": 0.5000, "star": 0.8750, "exponential": 0.5000},
    16: {"ring": 0.9493, "torus": 0.6000, "star": 0.9375, "exponential": 0.6000},
    32: {"ring": 0.9872, "torus": 0.8828, "star": 0.9688, "exponential": 0.6667},
    64: {"ring": 0.9968, "torus": 0.8828, "star": 0.9844, "exponential": 0.7143},
    100: {"ring": 0.9987, "torus": 0.9236, "star": 0.9900, "exponential": 0.7500},
}


def assert_mixes(topology: Topology, num_clients: int, round: int = 0) -> None:
    """W is doubly stochastic, frozen, and non-zero exactly on the diagonal and the edges (column to row)."""
    weights = topology.weights(num_clients, round)
    assert weights.shape == (num_clients, num_clients) and weights.dtype == np.float64
    assert not weights.flags.writeable
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
    expected = np.eye(num_clients, dtype=bool)
    graph = topology.graph(num_clients, round)
    for source, target in graph.edges:
        expected[target, source] = True
        if not graph.is_directed():
            expected[source, target] = True
    np.testing.assert_array_equal(weights > 0, expected)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), num_clients=st.integers(1, 40), round=st.integers(0, 10))
def test_weights_are_doubly_stochastic_on_the_edges(name, num_clients, round):
    assert_mixes(by_name(name), num_clients, round)


@settings(max_examples=30, deadline=None)
@given(num_clients=st.integers(1, 40), probability=st.floats(0.3, 1), seed=st.integers(0, 1000))
def test_random_graphs_are_doubly_stochastic_or_refused(num_clients, probability, seed):
    try:
        assert_mixes(ErdosRenyi(probability, seed), num_clients)
    except ValueError as error:
        assert "is not connected" in str(error)


@pytest.mark.parametrize(("degree", "num_clients"), [(2, 7), (3, 8), (4, 40), (1, 2), (4, 1)])
def test_random_regular_graph(degree, num_clients):
    topology = RandomRegular(degree, seed=3)
    assert_mixes(topology, num_clients)
    assert {count for _, count in topology.graph(num_clients).degree} == {min(degree, num_clients - 1)}
    np.testing.assert_array_equal(topology.weights(num_clients), RandomRegular(degree, seed=3).weights(num_clients))


@pytest.mark.parametrize("num_clients", RHO)
@pytest.mark.parametrize("name", ["ring", "torus", "star", "exponential"])
def test_spectral_gap_has_the_known_value(name, num_clients):
    assert 1 - by_name(name).spectral_gap(num_clients) == pytest.approx(RHO[num_clients][name], abs=5e-5)


@pytest.mark.parametrize(("num_clients", "rho"), [(8, 0.4194), (16, 0.8119), (32, 0.9497), (64, 0.9872), (100, 0.9947)])
def test_four_gossip_steps_on_a_ring(num_clients, rho):
    weights = np.linalg.matrix_power(Ring().weights(num_clients), 4)
    assert np.linalg.norm(weights - 1 / num_clients, 2) == pytest.approx(rho, abs=5e-5)


def test_random_regular_graph_mixes_much_faster_than_a_ring():
    # 0.5845 in one draw of degree 10 on 100 nodes; other draws lie near 2 sqrt(9) / 11 = 0.545 (Friedman 2008).
    assert 1 - RandomRegular(10).spectral_gap(100) == pytest.approx(0.57, abs=0.05)


def test_small_rings():
    np.testing.assert_array_equal(Ring().weights(1), [[1.0]])
    np.testing.assert_allclose(Ring().weights(2), [[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(Ring().weights(3), np.full((3, 3), 1 / 3))


@pytest.mark.parametrize("name", NAMES)
def test_one_client_keeps_its_row(name):
    np.testing.assert_array_equal(by_name(name).weights(1), [[1.0]])
    assert by_name(name).spectral_gap(1) == 1


def test_complete_weights_are_exact():
    assert (Complete().weights(7) == 1 / 7).all()
    assert Complete().spectral_gap(7) == 1


def test_torus_is_as_square_as_possible():
    assert sorted(Torus().graph(12).neighbors(0)) == [1, 3, 4, 8]  # 3 x 4
    assert sorted(Torus(rows=2).graph(12).neighbors(0)) == [1, 5, 6]  # the wrap-around of a side of 2 is the same edge
    assert nx.is_isomorphic(Torus().graph(7), Ring().graph(7))


def test_exponential_edges_point_from_sender_to_receiver():
    weights = Exponential().weights(5)  # hops 1, 2, 4
    np.testing.assert_allclose(weights[0], [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4])  # 0 hears 4, 3 and 1, not 2
    assert sorted(Exponential().graph(5).successors(0)) == [1, 2, 4]


def test_one_peer_exponential_repeats_with_the_same_arrays():
    topology = OnePeerExponential()
    assert topology.period(16) == 4 and topology.period(17) == 5 and topology.period(1) == 1
    assert topology.weights(16, 1) is topology.weights(16, 5)
    assert topology.weights(16, 1) is not topology.weights(16, 2)
    np.testing.assert_allclose(topology.weights(8, 2)[5], [0, 0.5, 0, 0, 0, 0.5, 0, 0])  # hop 4: 5 hears 1


@pytest.mark.parametrize("num_clients", [8, 16])
def test_one_peer_exponential_averages_exactly_in_a_period_on_powers_of_two(num_clients):
    topology = OnePeerExponential()
    rounds = range(topology.period(num_clients))
    product = np.linalg.multi_dot([topology.weights(num_clients, round) for round in rounds])
    np.testing.assert_allclose(product, 1 / num_clients, atol=1e-15)
    assert topology.spectral_gap(num_clients) == 1
    assert topology.spectral_gap(num_clients, round=1) == pytest.approx(0, abs=1e-12)  # hop 2 alone is not connected


def test_one_peer_exponential_is_inexact_otherwise():
    topology = OnePeerExponential()
    product = np.linalg.multi_dot([topology.weights(100, round) for round in range(7)])
    assert np.abs(product - 0.01).max() == pytest.approx(5.6e-3, abs=5e-5)
    assert topology.spectral_gap(100) == pytest.approx(1 - np.linalg.norm(product - 0.01, 2) ** (1 / 7))


def test_static_topology_gives_one_array():
    ring = Ring()
    assert ring.period(6) == 1
    assert ring.weights(6) is ring.weights(6, 17)
    assert ring.weights(6) is not ring.weights(7)


def test_uniform_equals_metropolis_on_regular_graphs():
    np.testing.assert_allclose(Ring(mixing="uniform").weights(6), Ring().weights(6))


class Alternating(Topology):
    """Pairs (0, 1), (2, 3) in even rounds; (1, 2), (3, 0) in odd ones: connected only over the period."""

    def period(self, num_clients: int) -> int | None:
        return 2

    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        graph = nx.empty_graph(4)
        graph.add_edges_from([(0, 1), (2, 3)] if round % 2 == 0 else [(1, 2), (3, 0)])
        return graph


class NeverRepeating(Alternating):
    def period(self, num_clients: int) -> int | None:
        return None


class OddRoundsOnly(Alternating):
    def graph(self, num_clients: int, round: int = 0) -> nx.Graph:
        return super().graph(num_clients, 1)


def test_only_the_union_over_a_period_must_be_connected():
    assert_mixes(Alternating(), 4, 0)
    assert_mixes(Alternating(), 4, 1)
    with pytest.raises(ValueError, match="OddRoundsOnly with num_clients=4 is not connected: it falls into 2 parts"):
        OddRoundsOnly().weights(4)


def test_topology_that_never_repeats_keeps_one_matrix():
    topology = NeverRepeating()
    for round in range(5):
        assert topology.weights(4, round) is topology.weights(4, round)
    assert len(topology._matrices) == 1
    with pytest.raises(ValueError, match="never repeats"):
        topology.spectral_gap(4)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_edge_list_file(tmp_path):
    path = write(tmp_path / "path.txt", "# a path\n0 1\n1, 2\n\n2 3 0.7 # weights are not used\n")
    topology = GraphFile(path)
    assert_mixes(topology, 4)
    np.testing.assert_allclose(topology.weights(4)[0], [2 / 3, 1 / 3, 0, 0])


@pytest.mark.parametrize("directed", [False, True])
def test_graphml_file(tmp_path, directed):
    graph = Exponential().graph(5) if directed else Ring().graph(5)
    nx.write_graphml(graph, tmp_path / "graph.graphml")
    topology = GraphFile(str(tmp_path / "graph.graphml"), mixing="uniform")
    expected = Exponential() if directed else Ring()
    np.testing.assert_allclose(topology.weights(5), expected.weights(5))


def test_weights_from_file(tmp_path):
    path = write(tmp_path / "triangle.edges", "0 1 0.2\n1 2 0.3\n0 2 0.1\n")
    weights = GraphFile(path, mixing="file").weights(3)
    np.testing.assert_allclose(weights, [[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]])


def test_weights_from_a_directed_file(tmp_path):
    graph = nx.DiGraph()
    graph.add_weighted_edges_from([(0, 1, 0.25), (1, 2, 0.25), (2, 0, 0.25)])
    nx.write_graphml(graph, tmp_path / "cycle.graphml")
    weights = GraphFile(tmp_path / "cycle.graphml", mixing="file").weights(3)
    np.testing.assert_allclose(weights, [[0.75, 0, 0.25], [0.25, 0.75, 0], [0, 0.25, 0.75]])


@pytest.mark.parametrize(
    ("name", "text", "mixing", "message"),
    [
        ("a.txt", "0 1 0.9\n1 2 0.9\n", "file", r"W\[1, 1\] = -0.8.*negative"),
        ("a.txt", "0 1\n1 2\n", "file", "edge 0-1 .* has weight=None, but mixing='file' needs a number"),
        ("a.txt", "0 1 0\n1 2 0.1\n", "file", "edge 0-1 .* has weight=0.0"),
        ("a.txt", "0 1\n1 x\n", "metropolis", "line 2 of .* is '1 x'"),
        ("a.txt", "0 1\n1\n", "metropolis", "line 2 of .* is '1'"),
        ("a.txt", "0 1 .2\n1 0 .3\n", "file", "line 2 .* repeats edge 1-0"),
        ("a.txt", "0 1\n", "metropolis", "has 2 nodes, but num_clients=3"),
        ("a.txt", "1 2\n2 3\n", "metropolis", r"must be labelled 0 \.\. 2"),
        ("a.txt", "0 1\n1 2\n2 2\n", "metropolis", "self loop at node 2"),
        ("a.txt", "0 1\n1 2\n", "uniform", "degrees range from 1 to 2: use mixing='metropolis'"),
        ("a.graphml", "no xml", "metropolis", "cannot be read as GraphML"),
    ],
)
def test_bad_graph_file(tmp_path, name, text, mixing, message):
    topology = GraphFile(write(tmp_path / name, text), mixing=mixing)
    with pytest.raises(ValueError, match=message):
        topology.weights(3)


@pytest.mark.parametrize(
    ("edges", "mixing", "message"),
    [
        ([(0, 1, 0.4), (1, 2, 0.2), (2, 0, 0.1)], "file", "not doubly stochastic: column 0 sums to 1.3"),
        ([(0, 1, 1), (1, 2, 1), (2, 0, 1)], "metropolis", "is directed, where mixing='metropolis'"),
        ([(0, 1, 1), (1, 2, 1), (2, 0, 1), (0, 2, 1)], "uniform", "range from 1 to 2: make them equal"),
        ([(0, 1, 1), (0, 1, 1), (1, 2, 1)], "metropolis", "parallel edges"),
    ],
)
def test_bad_directed_graph_file(tmp_path, edges, mixing, message):
    graph = nx.MultiDiGraph()
    graph.add_weighted_edges_from(edges)
    nx.write_graphml(graph if "parallel" in message else nx.DiGraph(graph), tmp_path / "graph.graphml")
    with pytest.raises(ValueError, match=message):
        GraphFile(tmp_path / "graph.graphml", mixing=mixing).weights(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Ring().weights(0), "num_clients=0 must be at least 1"),
        (lambda: GraphFile("absent.txt").weights(2), "path='absent.txt' does not exist"),
        (lambda: Star(mixing="uniform").weights(5), "Star with num_clients=5 .* range from 1 to 4: use mixing='metrop"),
        (lambda: Torus(rows=4).weights(10), "rows=4 does not fit num_clients=10: choose a divisor of 10"),
        (lambda: RandomRegular(4).weights(4), "degree=4 needs more than 4 clients, but num_clients=4"),
        (lambda: RandomRegular(3).weights(5), "product is odd"),
        (lambda: RandomRegular(1).weights(6), "none of 100 random graphs of degree=1"),
        (lambda: ErdosRenyi(0.0), "probability=0.0"),
        (lambda: ErdosRenyi(0.05, seed=1).weights(20), r"probability=0.05, seed=1 is not connected: .* = 0.15"),
        (lambda: by_name("mesh"), "topology='mesh' is unknown: choose one of ring, torus, .*complete"),
    ],
)
def test_bad_setting(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(["ring", "torus", "star", "complete"]), num_clients=st.integers(1, 20))
def test_absent_clients_neither_send_nor_receive(data, name, num_clients):
    present = np.array(data.draw(st.lists(st.booleans(), min_size=num_clients, max_size=num_clients)))
    weights = by_name(name).weights(num_clients)
    restricted = restrict(weights, present)
    np.testing.assert_allclose(restricted.sum(axis=0), 1)
    np.testing.assert_allclose(restricted.sum(axis=1), 1)
    np.testing.assert_array_equal(restricted[~present], np.eye(num_clients)[~present])
    between = np.logical_and.outer(present, present) & ~np.eye(num_clients, dtype=bool)
    np.testing.assert_array_equal(restricted[between], weights[between])


def test_restrict_shares_the_matrix_if_nobody_is_absent():
    weights = Ring().weights(4)
    assert restrict(weights, np.ones(4, dtype=bool)) is weights


def test_restrict_refuses_directed_weights_and_wrong_shapes():
    with pytest.raises(ValueError, match=r"use full participation .* or an undirected topology"):
        restrict(Exponential().weights(5), np.array([True, True, True, True, False]))
    with pytest.raises(ValueError, match="present has shape"):
        restrict(Ring().weights(5), np.ones(4, dtype=bool))


@pytest.mark.parametrize("topology", [Ring(), OnePeerExponential(), NeverRepeating()])
def test_plot_needs_no_global_figure(topology):
    pyplot = importlib.import_module("matplotlib.pyplot")
    figures = pyplot.get_fignums()
    axes = topology.plot(4)
    assert f"{type(topology).__name__}, 4 clients, spectral gap" in axes.get_title()
    assert topology.plot(4, axes) is axes
    assert pyplot.get_fignums() == figures
