"""The hash order, to the digit, and views: what nodes know of each other, and how that knowledge grows.

Digests and orders were computed once with Python's hashlib. They are the format that all nodes must share: whoever
encodes a number in another way is in other samples.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fed.modest.membership import View, digest, hash_order

CLIENTS = 6
WINDOW = 50

pairs = st.tuples(st.integers(-1, 2**31 - 2), st.integers(0, 2**31 - 1))  # (last active, membership)
views = st.lists(pairs, min_size=CLIENTS, max_size=CLIENTS).map(
    lambda pairs: View.from_array(np.array(pairs, dtype=np.int32).T)
)


def merged(one: View, other: View) -> View:
    result = one.copy()
    result.merge(other)
    return result


def same(one: View, other: View) -> bool:
    return np.array_equal(one.to_array(), other.to_array())


def everybody(num_clients: int, last_active: int = 0) -> View:
    view = View(np.ones(num_clients, dtype=bool))
    view.last_active[:] = last_active
    return view


# -------------------------------------------------------------------------------------------------------- hash order


@pytest.mark.parametrize(
    ("client", "round", "expected"),
    [
        (7, 12, "b69c609364b1a7cba3e3568d8f357368"),  # md5 of "7-12"
        (12, 7, "628f64617c265b2358208f8e8c96c9dd"),
        (0, 1, "c2eb282156233b5d827219971c8b04c2"),
        (1, 11, "ed5a7fce390dc14465fa62793e41781b"),
        (11, 1, "421d13c7ecd67604cedbe44f88dd1f61"),
        (999, 100, "f97aaef457fe951dc1db0548b93818b1"),
    ],
)
def test_the_digest_is_md5_of_client_dash_round(client: int, round: int, expected: str) -> None:
    assert digest(client, round).hex() == expected


@pytest.mark.parametrize(
    ("num_clients", "round", "expected"),
    [
        (8, 1, [6, 5, 4, 2, 7, 0, 3, 1]),
        (8, 2, [6, 4, 2, 7, 1, 3, 5, 0]),
        (8, 3, [5, 1, 4, 0, 3, 2, 7, 6]),
        (8, 4, [1, 5, 2, 4, 6, 3, 0, 7]),
        (12, 10, [0, 7, 6, 8, 5, 10, 4, 9, 3, 11, 1, 2]),  # numbers of two digits
    ],
)
def test_the_order_of_a_round(num_clients: int, round: int, expected: list[int]) -> None:
    assert hash_order(num_clients, round).tolist() == expected
    assert everybody(num_clients, round).candidates(round, WINDOW, myself=0).tolist() == expected


def test_whoever_is_not_in_the_view_leaves_the_order_of_the_others_alone() -> None:
    view = everybody(8)
    view.change(4, counter=1, joins=False)
    view.change(3, counter=1, joins=False)
    assert view.candidates(2, WINDOW, myself=6).tolist() == [6, 2, 7, 1, 5, 0]


def test_nodes_with_equal_views_ask_the_same_nodes() -> None:
    view = everybody(8)
    view.change(6, counter=1, joins=False)
    view.last_active[2] = -60
    expected = view.candidates(3, WINDOW, myself=1).tolist()
    assert expected == [5, 1, 4, 0, 3, 7]
    for myself in expected:  # sample and committee are the first of this list that answer
        assert view.copy().candidates(3, WINDOW, myself).tolist() == expected


def test_the_cached_order_cannot_be_changed() -> None:
    with pytest.raises(ValueError):
        hash_order(8, 1)[0] = 0


# ----------------------------------------------------------------------------------------------------------- merging


@given(views, views, views)
def test_merging_is_commutative_associative_and_idempotent(a: View, b: View, c: View) -> None:
    assert same(merged(a, b), merged(b, a))
    assert same(merged(merged(a, b), c), merged(a, merged(b, c)))
    assert same(merged(a, a), a)
    assert same(merged(merged(a, b), b), merged(a, b))


@given(views, views)
def test_merging_forgets_nothing_and_invents_nothing(a: View, b: View) -> None:
    both = merged(a, b).to_array()
    assert (both >= a.to_array()).all() and (both >= b.to_array()).all()
    assert ((both == a.to_array()) | (both == b.to_array())).all()


@given(views, views)
def test_merging_takes_from_a_view_and_leaves_it_as_it_is(a: View, b: View) -> None:
    before, other = b.to_array(), b.copy()
    a.merge(b)
    a.saw(0, 2**31 - 1)
    a.change(0, 2**30 - 1, True)
    assert np.array_equal(b.to_array(), before) and same(b, other)


@given(views, views)
def test_of_two_memberships_the_one_with_the_larger_counter_wins(a: View, b: View) -> None:
    both = merged(a, b)
    for client in range(CLIENTS):
        newer = max(a, b, key=lambda view: view.counter(client))
        assert both.counter(client) == newer.counter(client)
        if a.counter(client) != b.counter(client):
            assert both.joined[client] == newer.joined[client]
        assert both.last_active[client] == max(a.last_active[client], b.last_active[client])


# ----------------------------------------------------------------------------------------------------- announcements


@settings(deadline=None)
@given(st.permutations([(1, False), (2, True), (3, False), (4, True), (5, False)]), st.integers(1, 5))
def test_announcements_may_arrive_in_any_order(announcements: list[tuple[int, bool]], last: int) -> None:
    view = everybody(2)
    for counter, joins in announcements:
        if counter <= last:
            view.change(1, counter, joins)
    assert (view.counter(1), bool(view.joined[1])) == (last, last % 2 == 0)
    assert view.counter(0) == 0 and view.joined[0]


def test_a_client_that_is_unknown_joins_with_its_first_announcement() -> None:
    view = View(np.array([True, False]))
    assert view.candidates(1, WINDOW, myself=0).tolist() == [0]
    view.change(1, counter=1, joins=True)
    assert sorted(view.candidates(1, WINDOW, myself=0)) == [0, 1]
    view.change(1, counter=2, joins=False)
    view.change(1, counter=1, joins=True)  # late
    assert view.candidates(1, WINDOW, myself=0).tolist() == [0]


def test_an_unknown_client_is_adopted_from_another_view() -> None:
    mine, others = View(np.array([True, False, False])), View(np.array([False, True, False]))
    mine.merge(others)
    assert mine.joined.tolist() == [True, True, False]


# --------------------------------------------------------------------------------------------------------- activity


def test_the_activity_window_includes_its_oldest_round() -> None:
    view = everybody(4, last_active=10)
    view.last_active[1] = 9
    assert sorted(view.candidates(15, 5, myself=0)) == [0, 2, 3]
    assert sorted(view.candidates(15, 6, myself=0)) == [0, 1, 2, 3]
    assert sorted(view.candidates(14, 5, myself=0)) == [0, 1, 2, 3]


def test_whoever_was_never_active_may_be_asked_while_the_window_reaches_before_the_start() -> None:
    view = View(np.ones(3, dtype=bool))
    assert sorted(view.candidates(4, 5, myself=0)) == [0, 1, 2]
    assert sorted(view.candidates(5, 5, myself=0)) == [0]


def test_a_sign_of_life_never_makes_a_client_older() -> None:
    view = everybody(2, last_active=7)
    view.saw(1, 5)
    assert view.last_active.tolist() == [7, 7] and view.newest_round == 7
    view.saw(1, 9)
    assert view.last_active.tolist() == [7, 9] and view.newest_round == 9


@given(views, st.integers(1, 2**31 - 1), st.integers(1, 1000), st.integers(0, CLIENTS - 1))
def test_candidates_are_who_joined_and_is_active_and_always_oneself(
    view: View, round: int, window: int, myself: int
) -> None:
    candidates = view.candidates(round, window, myself).tolist()
    expected = {c for c in range(CLIENTS) if view.membership[c] % 2 and view.last_active[c] >= round - window}
    assert len(candidates) == len(set(candidates)) and set(candidates) == expected | {myself}
    assert candidates == sorted(candidates, key=lambda client: digest(client, round))


# ------------------------------------------------------------------------------------------------------- on the wire


@given(views)
def test_an_array_and_back_is_the_same_view(view: View) -> None:
    array = view.to_array()
    back = View.from_array(array)
    assert same(back, view) and (array.dtype, array.shape) == (np.int32, (2, CLIENTS))
    assert view.num_bytes == array.nbytes == 8 * CLIENTS
    back.saw(0, 2**31 - 1)
    assert np.array_equal(array, view.to_array())  # neither shares memory with the other
