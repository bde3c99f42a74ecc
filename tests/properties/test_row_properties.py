"""Rows: whatever is bound in whatever order, what is written through the module's tensors is in that row alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_fed.federation.clients import ClientBank
from lightning_fed.federation.rows import Rows

CLIENTS = 5
# One client bound, some neighbours or any others taken together, or nobody.
singles = st.tuples(st.just("bind"), st.lists(st.integers(0, CLIENTS - 1), min_size=1, max_size=1))
waves = st.tuples(st.just("take"), st.lists(st.integers(0, CLIENTS - 1), min_size=1, unique=True))
nobody = st.tuples(st.just("give back"), st.just([]))
doings = st.lists(singles | waves | nobody, max_size=12)


def tensors(widths: list[int]) -> list[Tensor]:
    return [nn.Parameter(torch.full((width, 2), float(number))) for number, width in enumerate(widths)]


@pytest.mark.parametrize("in_host_memory", [False, True])
@given(widths=st.lists(st.integers(1, 9), min_size=1, max_size=4), doings=doings)
def test_what_is_written_to_the_bound_tensors_is_in_their_rows_and_in_no_other(
    in_host_memory: bool, widths: list[int], doings: list[tuple[str, list[int]]]
) -> None:
    rows = Rows(tensors(widths), CLIENTS, in_host_memory=in_host_memory)
    expected = rows.matrix.clone()
    for step, (doing, slots) in enumerate(doings):
        if doing == "bind":
            rows.bind_row(slots[0])
            assert torch.equal(rows.gather(), expected[slots[0]])
        elif doing == "take":
            rows.bind_stack(rows.take(slots))
            shown = torch.cat([tensor.detach().flatten(1) for tensor in rows.tensors], dim=1)
            assert torch.equal(shown, expected[slots])
        else:
            rows.give_back()
            assert torch.equal(rows.matrix, expected)
            continue
        with torch.no_grad():
            for number, tensor in enumerate(rows.tensors):
                tensor.add_(100.0 * step + number + 1)
        widths_of = torch.cat([torch.full((2 * width,), 100.0 * step + n + 1) for n, width in enumerate(widths)])
        expected[slots] += widths_of
        assert torch.equal(rows.matrix, expected)
    rows.give_back()
    assert torch.equal(rows.matrix, expected)


@given(slots=st.lists(st.integers(0, CLIENTS - 1), min_size=1, max_size=8), rows_now=st.integers(1, 9))
def test_rows_that_share_one_memory_are_one_model(slots: list[int], rows_now: int) -> None:
    rows = Rows(tensors([3, 2]), CLIENTS, one_for_all=True)
    for number, slot in enumerate(slots):
        rows.bind_row(slot)
        with torch.no_grad():
            rows.tensors[0].fill_(float(number))
        assert (rows.matrix[:, :6] == number).all() and (rows.snapshot() == rows.matrix).all()


@given(order=st.lists(st.integers(3, 7), min_size=1, max_size=10), consensus=st.booleans())
def test_a_bank_trains_the_bound_client_whatever_came_before(order: list[int], consensus: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    bank = ClientBank(module, range(3, 8))
    parameters, buffers, counters = (rows.matrix.clone() for rows in bank.matrices)
    for number, client in enumerate(order):
        bank.bind_client(client)
        with torch.no_grad():
            module[0].weight += number + 1.0
        module[1].running_mean = torch.full((2,), float(number))  # a new tensor, as modules may set one
        module[1].num_batches_tracked += 1
        slot = bank.slot(client)
        parameters[slot, :6] += number + 1.0
        buffers[slot, :2] = number
        counters[slot] += 1
        if consensus:
            bank.bind_consensus()
            with torch.no_grad():
                module[0].weight.zero_()  # nobody's row
    bank.bind_nothing()
    for rows, expected in zip(bank.matrices, (parameters, buffers, counters)):
        assert torch.equal(rows.matrix, expected)
