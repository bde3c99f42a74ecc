"""Waves: several clients of a rank that the module embodies at once.

Shapes: M = clients of a wave.

While a wave is bound, every trainable parameter has the shape ``[M, *shape]``, and so have its gradient and what the
optimizer keeps for it. An optimizer whose arithmetic is elementwise then steps all clients of the wave, each as if
alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fed.federation.clients import ClientBank

OptimizerState = defaultdict[Any, dict[Any, Any]]
# In a client's optimizer state: for each parameter group, what the optimizer has added to its hyperparameters.
ADDED = "added to param_groups"
# What torch's optimizers keep once for a parameter, in a tensor of shape (): that of a parameter that is one number.
COUNTS = {"step", "mu_product", "eta", "mu"}


@dataclass
class WaveState:
    """What the clients of a wave keep beside their rows, stacked.

    Attributes:
        optimizers: a ``state`` for each optimizer, in which tensors of a parameter's shape have become ``[M, *shape]``;
            none if the clients' gradients meet before any optimizer steps.
        added: what each optimizer has added to its parameter groups; the same for all clients of a wave.
        gradients: between the minibatches of one accumulated step.
    """

    optimizers: list[OptimizerState]
    added: list[dict[Any, dict[str, Any]]]
    gradients: list[Tensor | None] | None


class Waves:
    """Makes the module a wave of clients, and keeps what waves have stacked for as long as they stay the same.

    Args:
        bank: the clients of this rank.
    """

    def __init__(self, bank: ClientBank) -> None:
        self.bank = bank
        self._states: dict[tuple[int, ...], WaveState] = {}
        self._wave_of: dict[int, tuple[int, ...]] = {}

    # ------------------------------------------------------------------------------------------- who goes together

    def split(self, clients: Sequence[int]) -> list[list[int]]:
        """Cut a list of clients into waves: neighbours whose optimizers have taken equally many steps."""
        self.bank.put_away()  # what the bound client's optimizers count is with them until then
        if tuple(clients) in self._states or len(clients) == 1:
            return [list(clients)]
        waves: list[list[int]] = []
        last = None
        for client in clients:
            marks = self._marks(client)
            if waves and marks == last:
                waves[-1].append(client)
            else:
                waves.append([client])
            last = marks
        return waves

    def _marks(self, client: int) -> Any:
        """What must be equal in a wave: what is kept for which parameter, and each count that is kept."""
        if not self.bank.has_optimizer_state(client):
            return None
        return [
            [
                (number, key, None if is_like(key, value, template) else comparable(value))
                for number, (parameter, template) in enumerate(zip(self.bank.parameters, self.bank.rows.templates))
                for key, value in state.get(parameter, {}).items()
            ]
            + [comparable(state.get(ADDED, {}))]
            for state in self.bank.optimizer_states(client)
        ]

    # ------------------------------------------------------------------------------------------------------ binding

    def bind(self, clients: Sequence[int], steps_optimizers: bool = True) -> None:
        """Make the module several clients at once.

        Args:
            clients: a list that :meth:`split` has made.
            steps_optimizers: also make the optimizers theirs.
        """
        bank = self.bank
        for rows, matrix in zip(bank.matrices, bank.working_rows(clients)):
            rows.bind_stack(matrix)
        bank.clear_gradients()
        self._bound = state = self._state_of(clients, steps_optimizers)
        bank.move_aside(state.optimizers, bank.rows.bound.device)
        for optimizer, stacked in zip(bank.optimizers, state.optimizers):
            optimizer.state = stacked
        bank.bind_added(state.added)
        if state.gradients is not None:
            for parameter, gradient in zip(bank.parameters, state.gradients):
                parameter.grad = gradient

    def leave(self, keeps_gradients: bool) -> None:
        """Put the wave away. The module still looks like it, until a client is bound or shown.

        Args:
            keeps_gradients: they are being accumulated.
        """
        bank, state = self.bank, self._bound
        state.gradients = [parameter.grad for parameter in bank.parameters] if keeps_gradients else None
        if state.optimizers:
            state.added = bank.take_added()
            for optimizer in bank.optimizers:
                optimizer.state = defaultdict(dict)
            bank.move_aside(state.optimizers, torch.device("cpu"))
        bank.clear_gradients()
        bank.store_rows()

    # ------------------------------------------------------------------------------------ what waves have stacked

    def forget(self) -> None:
        """Drop what waves have stacked, as when all optimizers are reset."""
        self._states.clear()
        self._wave_of.clear()

    def dissolve(self, client: int) -> None:
        """Give every client of this client's wave its own state again: views, nothing is copied."""
        clients = self._wave_of.get(client)
        if clients is None:
            return
        state = self._states.pop(clients)
        for number, member in enumerate(clients):
            del self._wave_of[member]
            own = [self._of_one(stacked, number) for stacked in state.optimizers]
            for mine, added in zip(own, state.added):
                if added:
                    mine[ADDED] = {index: dict(entries) for index, entries in added.items()}
            gradients = state.gradients and [None if g is None else g[number] for g in state.gradients]
            self.bank.put_back(member, own, gradients)

    def _state_of(self, clients: Sequence[int], steps_optimizers: bool) -> WaveState:
        key = tuple(clients)
        if key not in self._states:
            gradients = [self.bank.take_gradients(client) for client in clients]
            states = [self.bank.take_optimizer_states(client) if steps_optimizers else [] for client in clients]
            added = [state.pop(ADDED, {}) for state in states[0]]
            for client in clients:
                self._wave_of[client] = key
            self._states[key] = WaveState(
                [self._of_all(own) for own in zip(*states)], added, stack_gradients(gradients)
            )
        return self._states[key]

    def _of_all(self, states: Sequence[OptimizerState]) -> OptimizerState:
        """The ``state`` of an optimizer that steps several clients, from theirs."""
        stacked: OptimizerState = defaultdict(dict)
        for parameter, template in zip(self.bank.parameters, self.bank.rows.templates):
            for key, value in states[0].get(parameter, {}).items():
                own = [state[parameter][key] for state in states]
                stacked[parameter][key] = torch.stack(own) if is_like(key, value, template) else copy_of(value)
        return stacked

    def _of_one(self, stacked: OptimizerState, number: int) -> OptimizerState:
        own: OptimizerState = defaultdict(dict)
        for parameter, template in zip(self.bank.parameters, self.bank.rows.templates):
            for key, value in stacked.get(parameter, {}).items():
                is_stacked = isinstance(value, Tensor) and value.dim() == template.dim() + 1
                own[parameter][key] = value[number] if is_stacked else copy_of(value)
        return own


def stack_gradients(gradients: Sequence[list[Tensor | None] | None]) -> list[Tensor | None] | None:
    """The gradients of a wave, from those that its clients have accumulated."""
    own = [each for each in gradients if each is not None]
    if not own or len(own) < len(gradients):  # the clients of a wave begin to accumulate together
        return None
    return [None if of_one[0] is None else torch.stack(of_one) for of_one in zip(*own)]


def is_like(key: Any, value: Any, parameter: Tensor) -> bool:
    """Whether something that an optimizer keeps has a number for each of a parameter's."""
    return isinstance(value, Tensor) and value.shape == parameter.shape and key not in COUNTS


def comparable(value: Any) -> Any:
    """A value that ``==`` can compare."""
    if isinstance(value, dict):
        return [(key, comparable(inner)) for key, inner in value.items()]
    return value.tolist() if isinstance(value, Tensor) else value


def copy_of(value: Any) -> Any:
    """What an optimizer may change in place without changing the original."""
    return value.clone() if isinstance(value, Tensor) else value
