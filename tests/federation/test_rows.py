"""Rows are the state: a module's tensors are views into them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_fed.federation.rows import ALIGNMENT_BYTES, ModuleBuffers, Rows, trainable_parameters


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def rows_of(module: nn.Module, num_rows: int = 4) -> Rows:
    return Rows(trainable_parameters(module), num_rows)


def vector(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def train_step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(torch.randn(8, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_every_row_begins_as_the_module() -> None:
    module = network()
    before = vector(module)
    rows = rows_of(module)
    assert rows.width == before.numel() == 5 * 3 + 3 + 3 + 3 + 3 * 2 + 2
    assert rows.row_bytes == rows.width * 4
    for row in rows.matrix:
        assert torch.equal(row, before)


def test_training_the_module_trains_the_bound_row_and_no_other() -> None:
    module = network()
    rows = rows_of(module)
    before = rows.matrix.clone()
    rows.bind(rows.matrix[2])
    train_step(module)
    assert not torch.equal(rows.matrix[2], before[2])
    assert torch.equal(rows.matrix[2], vector(module))
    assert torch.equal(rows.matrix[[0, 1, 3]], before[[0, 1, 3]])


def test_changing_the_bound_row_changes_the_module() -> None:
    module = network()
    rows = rows_of(module)
    rows.bind(rows.matrix[1])
    rows.matrix[1] = torch.arange(float(rows.width))
    assert torch.equal(module[0].weight, torch.arange(15.0).view(3, 5))
    assert torch.equal(rows.gather(), torch.arange(float(rows.width)))
    rows.bind(rows.matrix[0])
    assert not torch.equal(rows.gather(), torch.arange(float(rows.width)))


def test_binding_copies_nothing() -> None:
    module = network()
    rows = rows_of(module)
    parameters = list(module.parameters())
    for row in rows.matrix:
        rows.bind(row)
        assert parameters[0].data_ptr() == row.data_ptr()
        assert parameters[1].data_ptr() == row.data_ptr() + 15 * 4
    assert list(module.parameters()) == parameters  # the objects that optimizers know


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 16, 17, 100])
def test_rows_are_aligned_alike(width: int, dtype: torch.dtype) -> None:
    matrix = Rows([torch.ones(width, dtype=dtype)], 5).matrix
    assert matrix.shape == (5, width)
    assert matrix.stride(1) == 1
    assert matrix.stride(0) * matrix.element_size() % ALIGNMENT_BYTES == 0
    assert matrix.stride(0) * matrix.element_size() < width * matrix.element_size() + ALIGNMENT_BYTES
    assert len({row.data_ptr() % ALIGNMENT_BYTES for row in matrix}) == 1


def test_one_row_wastes_nothing() -> None:
    assert Rows([torch.ones(17)], 1).matrix.is_contiguous()
    assert Rows([torch.ones(17)], 1).matrix.untyped_storage().nbytes() == 17 * 4


def test_released_tensors_keep_their_values_in_storage_of_their_own() -> None:
    module = network()
    rows = rows_of(module)
    rows.bind(rows.matrix[3])
    train_step(module)
    trained = vector(module)
    rows.release()
    assert torch.equal(vector(module), trained)
    rows.matrix.zero_()
    assert torch.equal(vector(module), trained)
    for parameter in module.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4


def test_no_tensors_make_empty_rows() -> None:
    rows = Rows([], 3)
    assert rows.matrix.shape == (3, 0)
    assert rows.row_bytes == 0
    rows.bind(rows.matrix[0])
    rows.release()


def test_frozen_parameters_are_not_in_the_row_and_tied_ones_once() -> None:
    module = network()
    module[0].requires_grad_(False)
    assert rows_of(module).width == 3 + 3 + 3 * 2 + 2
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert rows_of(tied).width == 16


def test_a_module_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no parameter with requires_grad=True.*unfreeze"):
        trainable_parameters(network().requires_grad_(False))


def test_parameters_of_several_dtypes_are_refused() -> None:
    module = network()
    module[2].double()
    with pytest.raises(ValueError, match=r"several dtypes \(\['torch.float32', 'torch.float64'\]\).*module.float\(\)"):
        trainable_parameters(module)


class Centre(nn.Module):
    """A module that re-assigns its buffer, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(9), persistent=False)
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))

    def forward(self, x: Tensor) -> None:
        self.centre = 0.5 * self.centre + 0.5 * x


def test_buffers_are_found_by_kind_without_those_that_are_not_saved() -> None:
    module = nn.Sequential(network(), Centre())
    assert [tuple(buffer.shape) for buffer in ModuleBuffers(module, floating=True).tensors] == [(3,), (3,), (3,)]
    assert [buffer.dtype for buffer in ModuleBuffers(module, floating=False).tensors] == [torch.int64]


def test_a_reassigned_buffer_is_absorbed_into_the_bound_row() -> None:
    module = Centre()
    buffers = ModuleBuffers(module, floating=True)
    rows = Rows(buffers.tensors, 2)
    rows.bind(rows.matrix[1])
    module(torch.ones(3))
    assert torch.equal(rows.matrix, torch.zeros(2, 3))
    buffers.absorb()
    assert torch.equal(rows.matrix, torch.tensor([[0.0] * 3, [0.5] * 3]))
    rows.bind(rows.matrix[0])
    assert torch.equal(module.centre, torch.zeros(3))
    module(torch.ones(3))
    buffers.absorb()
    assert torch.equal(rows.matrix, torch.full((2, 3), 0.5))


def test_float_buffers_of_several_dtypes_are_refused() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).double())
    with pytest.raises(ValueError, match=r"float buffers of Sequential have several dtypes.*persistent=False"):
        ModuleBuffers(module, floating=True)
