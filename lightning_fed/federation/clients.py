"""The clients of one rank: their rows, buffers, optimizer states, and which of them the module embodies at present.

Shapes: C = clients on this rank that have rows at present, P = trainable parameters, B = float buffer numbers, I =
integers in buffers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed.compression import Layer
from lightning_fed.federation.rows import ModuleBuffers, Rows, trainable_parameters
from lightning_fed.federation.waves import ADDED, OptimizerState, Waves


class ClientBank:
    """Everything that differs between the clients of one rank, and the pointer swap that makes the module one of them.

    Args:
        module: the module that all clients share; its present state is every client's initial state.
        clients: the numbers of the clients on this rank.
        one_model: they are replicas of one model: parameters and optimizer state exist once.
        keeps_rows: every client has a row all the time. Else none has one before :meth:`hold`.
        in_host_memory: rows, and what else a client keeps while others train, are in host memory.

    Attributes:
        rows: parameters ``[C, P]``.
        buffers: float buffers ``[C, B]`` (BatchNorm statistics).
        counters: integer buffers ``[C, I]``, which stay with their client.
        present: the clients that have rows, sorted: the row numbered ``slot(client)`` of each of the three matrices.
        bound: the client that the module's tensors are views of, or None for the consensus model.
    """

    def __init__(
        self,
        module: nn.Module,
        clients: range,
        one_model: bool = False,
        keeps_rows: bool = True,
        in_host_memory: bool = False,
    ) -> None:
        self.module = module
        self.clients = clients
        self.one_model = one_model
        self.keeps_rows = keeps_rows
        self.in_host_memory = in_host_memory
        self.present: Sequence[int] = clients if keeps_rows else []
        self._slots: dict[int, int] = {}
        self._float_buffers, self._integer_buffers = ModuleBuffers(module, True), ModuleBuffers(module, False)
        num_rows = len(self.present)
        self.rows = Rows(trainable_parameters(module), num_rows, one_model, in_host_memory)
        self.buffers = Rows(self._float_buffers.tensors, num_rows, in_host_memory=in_host_memory)
        self.counters = Rows(self._integer_buffers.tensors, num_rows, in_host_memory=in_host_memory)
        # Of clients without rows: a few numbers each, of those that have trained.
        self._idle_counters: dict[int, Tensor] = {}
        self._initial_counters = self.counters.gather()
        self.consensus = [rows.gather() for rows in self.matrices]
        self.bound: int | None = None
        self.optimizers: list[Optimizer] = []
        self._hyperparameters: list[list[set[str]]] = []
        self._optimizer_states: dict[int, list[OptimizerState]] = {}
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._scalers: dict[int, tuple[Tensor, Tensor]] = {}
        self.keep_gradients = False
        self.scaler: torch.amp.GradScaler | None = None
        self._initial_scale = 1.0
        self.waves = Waves(self)
        self._bindable = [rows for rows in self.matrices if rows.width]
        self.bind_consensus()

    @property
    def matrices(self) -> tuple[Rows, Rows, Rows]:
        return self.rows, self.buffers, self.counters

    @property
    def row_bytes(self) -> int:
        """What one transfer of one client's model costs: parameters and float buffers."""
        return self.rows.row_bytes + self.buffers.row_bytes

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.rows.tensors  # type: ignore[return-value]

    @property
    def layers(self) -> list[Layer]:
        """The tensors that a row consists of, in order."""
        trainable = [(name, value) for name, value in self.module.named_parameters() if value.requires_grad]
        return [Layer(name, value.shape) for name, value in trainable]

    def use_optimizers(
        self, optimizers: list[Optimizer], scaler: torch.amp.GradScaler | None, keep_gradients: bool
    ) -> None:
        """Give every client its own state in these optimizers and this loss scaler.

        What an optimizer later adds to its parameter groups (some count their steps there) is a client's too.

        Args:
            optimizers: those of the Trainer.
            scaler: of 16-bit mixed precision, if any.
            keep_gradients: whether gradients outlive a local step (accumulation, manual optimization).
        """
        self.optimizers, self.scaler, self.keep_gradients = optimizers, scaler, keep_gradients
        self._initial_scale = scaler._init_scale if scaler is not None else 1.0
        self._optimizer_states, self._gradients, self._scalers = {}, {}, {}
        self.waves.forget()
        self._hyperparameters = [[set(group) for group in optimizer.param_groups] for optimizer in optimizers]

    def slot(self, client: int) -> int:
        """Which row is a client's at present."""
        return client - self.clients.start if self.keeps_rows else self._slots[client]

    def has_row(self, client: int) -> bool:
        """Whether a client of this rank has a row at present."""
        return self.keeps_rows or client in self._slots

    def hold(self, clients: Sequence[int]) -> None:
        """Give rows to these clients of this rank alone, if not all keep theirs.

        What the rows of parameters and float buffers hold is undefined. The clients that lose theirs keep their integer
        buffers, optimizer states and loss scales.

        Args:
            clients: sorted.
        """
        self.bind_nothing()
        if self.keeps_rows:
            return
        if self.counters.width:
            self._idle_counters.update((client, self.counters_of(client).clone()) for client in self.present)
        self.present, self._slots = clients, {client: slot for slot, client in enumerate(clients)}
        self._gradients = {client: kept for client, kept in self._gradients.items() if client in self._slots}
        for rows in self.matrices:
            rows.resize(len(clients))
        for client, row in zip(clients if self.counters.width else (), self.counters.matrix):
            row.copy_(self._idle_counters.pop(client, self._initial_counters))

    def set_counters(self, client: int, values: Tensor) -> None:
        """Give a client its integer buffers ``[I]``, whether it has a row or not."""
        if self.has_row(client):
            self.counters.matrix[self.slot(client)] = values.to(self.counters.matrix)
        elif len(values):
            self._idle_counters[client] = values.clone()

    def counters_of(self, client: int) -> Tensor:
        """A client's integer buffers ``[I]``, whether it has a row or not."""
        if self.has_row(client):
            return self.counters.matrix[self.slot(client)]
        return self._idle_counters.get(client, self._initial_counters)

    def working_rows(self, clients: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What clients train on together: ``[M, P]`` parameters, ``[M, B]`` float buffers, ``[M, I]`` integer buffers.

        They are on the device of the module: views of the matrices where these are there too and the clients are
        neighbours in them, else copies. :meth:`store_rows`, binding a client or taking other rows ends their use.
        """
        self.put_away()
        slots = [self.slot(client) for client in clients]
        return self.rows.take(slots), self.buffers.take(slots), self.counters.take(slots)

    def store_rows(self) -> None:
        """Write back the rows that were taken, where they are copies."""
        for rows in self.matrices:
            rows.give_back()

    def _stepper(self, client: int) -> int:
        """Whose optimizer state and loss scale are a client's: its own, or those of the one model."""
        return self.clients.start if self.one_model else client

    def bind_client(self, client: int) -> None:
        """Make the module, the optimizers and the loss scaler those of one client; nothing is copied."""
        if client == self.bound:
            return
        self.put_away()
        slot = self.slot(client)
        with self._outside_inference_mode():
            for rows in self._bindable:
                rows.bind_row(slot)
        self.bound = client
        states = self.optimizer_states(client)
        self.move_aside(states, self.rows.bound.device)
        for optimizer, state in zip(self.optimizers, states):
            optimizer.state = state
        self._bind_added(client)
        if self.keep_gradients:
            for parameter, gradient in zip(self.parameters, self._gradients.pop(client, [None] * len(self.parameters))):
                parameter.grad = gradient if gradient is None else gradient.to(parameter.device)
        self._bind_scaler(client)

    def show(self, client: int) -> None:
        """Let the module look like one client. It may be looked at, not trained."""
        for rows in self._bindable:
            rows.bind_row(self.slot(client))

    def bind_consensus(self) -> None:
        """Make the module the consensus model, as last computed."""
        self.put_away()
        with self._outside_inference_mode():
            for rows, vector in zip(self.matrices, self.consensus):
                rows.bind(vector)

    def bind_nothing(self) -> None:
        """Put the bound client away, and drop the views of all rows."""
        self.put_away()
        for rows in self.matrices:
            rows.forget_views()

    def forget(self, client: int) -> None:
        """Drop what a client keeps beside its row: a restarted client begins with fresh optimizers."""
        self.waves.dissolve(client)
        for states in (self._optimizer_states, self._gradients, self._scalers):
            states.pop(client, None)

    def clear_gradients(self) -> None:
        """Forget the gradients of the bound client."""
        for parameter in self.parameters:
            parameter.grad = None

    @staticmethod
    def _outside_inference_mode() -> AbstractContextManager[Any]:
        """Views made in inference mode could not be trained later."""
        return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()

    def put_away(self) -> None:
        """Bind nobody, and keep what the bound client has outside the matrices: its row may be changed by others."""
        self.absorb_buffers()
        self.store_rows()
        client, self.bound = self.bound, None
        if client is None:
            return
        if self.keep_gradients:
            self._gradients[client] = [self._aside(parameter.grad) for parameter in self.parameters]
            self.clear_gradients()
        self._save_scaler(client)
        self._save_added(client)
        if self.in_host_memory:
            self.move_aside(self.optimizer_states(client), torch.device("cpu"))

    def _aside(self, gradient: Tensor | None) -> Tensor | None:
        return gradient.cpu() if gradient is not None and self.in_host_memory else gradient

    def move_aside(self, states: list[OptimizerState], device: torch.device) -> None:
        """Let optimizer states be where their client's row is; counts of steps stay where the optimizer has them."""
        if not self.in_host_memory or self.rows.bound.device.type == "cpu":
            return
        for state in states:
            for of_parameter in state.values():
                for name, value in of_parameter.items():
                    if isinstance(value, Tensor) and value.dim():
                        of_parameter[name] = value.to(device)

    def absorb_buffers(self) -> None:
        """Take over buffers that the module has replaced by new tensors."""
        self._float_buffers.absorb()
        self._integer_buffers.absorb()

    def _bind_scaler(self, client: int) -> None:
        scaler = self.scaler
        if scaler is None or scaler._scale is None or scaler._growth_tracker is None:
            return
        if (stepper := self._stepper(client)) in self._scalers:
            scaler._scale, scaler._growth_tracker = (value.clone() for value in self._scalers[stepper])
        else:  # a client's first step: the initial scale, not what its predecessor on this rank has reached
            scaler._scale = torch.full_like(scaler._scale, self._initial_scale)
            scaler._growth_tracker = torch.zeros_like(scaler._growth_tracker)

    def _save_scaler(self, client: int) -> None:
        if self.scaler is not None and self.scaler._scale is not None and self.scaler._growth_tracker is not None:
            self._scalers[self._stepper(client)] = self.scaler._scale.clone(), self.scaler._growth_tracker.clone()

    def optimizer_states(self, client: int) -> list[OptimizerState]:
        """The ``state`` dictionaries of one client, one an optimizer; empty at first."""
        self.waves.dissolve(client)
        client = self._stepper(client)
        if client not in self._optimizer_states:
            self._optimizer_states[client] = [defaultdict(dict) for _ in self.optimizers]
        return self._optimizer_states[client]

    def take_optimizer_states(self, client: int) -> list[OptimizerState]:
        """Hand over a client's optimizer states."""
        states = self.optimizer_states(client)
        del self._optimizer_states[client]
        return states

    def take_gradients(self, client: int) -> list[Tensor | None] | None:
        """Hand over the gradients that a client is accumulating, if it is."""
        self.waves.dissolve(client)
        return self._gradients.pop(client, None)

    def put_back(self, client: int, states: list[OptimizerState], gradients: list[Tensor | None] | None) -> None:
        """Inverse of :meth:`take_optimizer_states`, if there are any, and of :meth:`take_gradients`."""
        if states:
            self._optimizer_states[client] = states
        if gradients is not None:
            self._gradients[client] = gradients

    def has_optimizer_state(self, client: int) -> bool:
        """Whether a client's optimizers have stepped since they were last reset."""
        self.waves.dissolve(client)
        return any(self._optimizer_states.get(self._stepper(client), ()))

    def bind_added(self, added: list[dict[Any, dict[str, Any]]]) -> None:
        """Inverse of :meth:`take_added`."""
        for optimizer, groups in zip(self.optimizers, added):
            for index, entries in groups.items():
                optimizer.param_groups[index].update(entries)

    def _bind_added(self, client: int) -> None:
        self.bind_added([state.pop(ADDED, {}) for state in self.optimizer_states(client)])

    def _save_added(self, client: int) -> None:
        for added, state in zip(self.take_added(), self.optimizer_states(client)):
            if added:
                state[ADDED] = added

    def take_added(self) -> list[dict[Any, dict[str, Any]]]:
        """Of each optimizer, what it has added to each of its parameter groups; they are afterwards without it."""
        return [
            {
                index: {key: group.pop(key) for key in group.keys() - names}
                for index, (group, names) in enumerate(zip(optimizer.param_groups, hyperparameters))
                if len(group) > len(names)
            }
            for optimizer, hyperparameters in zip(self.optimizers, self._hyperparameters)
        ]

    def reset_optimizers(self) -> None:
        """Forget every client's optimizer state, as most federated algorithms do between rounds."""
        self._optimizer_states.clear()
        self.waves.forget()
        self.detach_optimizers()

    def detach_optimizers(self) -> None:
        """Leave no client's state in the optimizers."""
        self.take_added()
        for optimizer in self.optimizers:
            optimizer.state = defaultdict(dict)

    def to(self, device: torch.device) -> None:
        """Move the rows of all clients."""
        for rows in self.matrices:
            rows.to(device)
        self.consensus = [vector.to(device) for vector in self.consensus]

    @torch.no_grad()
    def export(self) -> None:
        """Turn the module back into an ordinary one, holding the consensus model in storage of its own."""
        self.bind_consensus()
        for rows in self.matrices:
            rows.release()
        self.detach_optimizers()

    def is_exported_unchanged(self) -> bool:
        """Whether the module still holds what :meth:`export` left in it."""
        return all(
            torch.equal(rows.gather().to(vector.device), vector) for rows, vector in zip(self.matrices, self.consensus)
        )

    def has_state(self, client: int) -> bool:
        """Whether a client keeps anything between steps beside its rows."""
        if client == self.bound or self._stepper(client) in self._scalers or self.has_optimizer_state(client):
            return True
        return client in self._gradients

    def state_of(self, client: int) -> dict[str, Any]:
        """What one client keeps between steps, as tensors and plain values."""
        if client == self.bound:
            self._save_scaler(client)
            self._save_added(client)
        states = []
        for optimizer, state in zip(self.optimizers, self.optimizer_states(client)):
            optimizer_before, optimizer.state = optimizer.state, state
            states.append(optimizer.state_dict()["state"])
            optimizer.state = optimizer_before
        if client == self.bound:
            self._bind_added(client)
        gradients = self._gradients.get(client)
        if client == self.bound and self.keep_gradients:
            gradients = [parameter.grad for parameter in self.parameters]
        return {
            "optimizers": states,
            "scaler": self._scalers.get(self._stepper(client)),
            "gradients": gradients and [None if gradient is None else gradient.clone() for gradient in gradients],
        }

    def load_state_of(self, client: int, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_of`; the optimizers' hyperparameters stay as they are."""
        for index, (optimizer, saved) in enumerate(zip(self.optimizers, state["optimizers"])):
            optimizer_before = optimizer.state
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved, "param_groups": groups})
            self.optimizer_states(client)[index] = optimizer.state
            optimizer.state = optimizer_before
        if state["scaler"] is not None:
            scale, growth = state["scaler"]
            device = self.rows.matrix.device
            self._scalers[self._stepper(client)] = scale.to(device), growth.to(device)
        if state["gradients"] is not None and self.keep_gradients:
            self._gradients[client] = [
                None if gradient is None else gradient.to(self.rows.matrix) for gradient in state["gradients"]
            ]
