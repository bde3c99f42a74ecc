"""The clients of one rank: their rows, buffers, optimizer states, and which of them the module embodies at present.

Shapes: C = clients on this rank, P = trainable parameters, B = float buffer numbers.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed.compression import Layer
from lightning_fed.federation.rows import ModuleBuffers, Rows, trainable_parameters

OptimizerState = defaultdict[Any, dict[Any, Any]]
# In a client's optimizer state: for each parameter group, what the optimizer has added to its hyperparameters.
ADDED = "added to param_groups"


class ClientBank:
    """Everything that differs between the clients of one rank, and the pointer swap that makes the module one of them.

    Args:
        module: the module that all clients share; its present state is every client's initial state.
        clients: the numbers of the clients on this rank.
        one_model: they are replicas of one model: parameters and optimizer state exist once.

    Attributes:
        rows: parameters ``[C, P]``.
        buffers: float buffers ``[C, B]`` (BatchNorm statistics).
        counters: integer buffers ``[C, ...]``, which stay with their client.
        bound: the client that the module's tensors are views of, or None for the consensus model.
    """

    def __init__(self, module: nn.Module, clients: range, one_model: bool = False) -> None:
        self.module = module
        self.clients = clients
        self.one_model = one_model
        self._float_buffers, self._integer_buffers = ModuleBuffers(module, True), ModuleBuffers(module, False)
        self.rows = Rows(trainable_parameters(module), len(clients), one_for_all=one_model)
        self.buffers = Rows(self._float_buffers.tensors, len(clients))
        self.counters = Rows(self._integer_buffers.tensors, len(clients))
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
        self._hyperparameters = [[set(group) for group in optimizer.param_groups] for optimizer in optimizers]

    def slot(self, client: int) -> int:
        """The row number of a client on this rank."""
        return client - self.clients.start

    def _stepper(self, client: int) -> int:
        """Whose optimizer state and loss scale are a client's: its own, or those of the one model."""
        return self.clients.start if self.one_model else client

    def bind_client(self, client: int) -> None:
        """Make the module, the optimizers and the loss scaler those of one client; nothing is copied."""
        if client == self.bound:
            return
        self._leave()
        slot = self.slot(client)
        with self._outside_inference_mode():
            for rows in self._bindable:
                rows.bind_row(slot)
        self.bound = client
        for optimizer, state in zip(self.optimizers, self.optimizer_states(client)):
            optimizer.state = state
        self._bind_added(client)
        if self.keep_gradients:
            for parameter, gradient in zip(self.parameters, self._gradients.pop(client, [None] * len(self.parameters))):
                parameter.grad = gradient
        self._bind_scaler(client)

    def bind_consensus(self) -> None:
        """Make the module the consensus model, as last computed."""
        self._leave()
        with self._outside_inference_mode():
            for rows, vector in zip(self.matrices, self.consensus):
                rows.bind(vector)

    def bind_nothing(self) -> None:
        """Put the bound client away, so that its row may be changed by others."""
        self._leave()
        for rows in self.matrices:
            rows.forget_views()

    def forget(self, client: int) -> None:
        """Drop what a client keeps beside its row: a restarted client begins with fresh optimizers."""
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

    def _leave(self) -> None:
        """Put away what the bound client keeps outside the matrices."""
        self.absorb_buffers()
        client, self.bound = self.bound, None
        if client is None:
            return
        if self.keep_gradients:
            self._gradients[client] = [parameter.grad for parameter in self.parameters]
            self.clear_gradients()
        self._save_scaler(client)
        self._save_added(client)

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
        client = self._stepper(client)
        if client not in self._optimizer_states:
            self._optimizer_states[client] = [defaultdict(dict) for _ in self.optimizers]
        return self._optimizer_states[client]

    def _bind_added(self, client: int) -> None:
        for optimizer, state in zip(self.optimizers, self.optimizer_states(client)):
            for index, added in state.pop(ADDED, {}).items():
                optimizer.param_groups[index].update(added)

    def _save_added(self, client: int) -> None:
        for added, state in zip(self._take_added(), self.optimizer_states(client)):
            if added:
                state[ADDED] = added

    def _take_added(self) -> list[dict[Any, dict[str, Any]]]:
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
        self.detach_optimizers()

    def detach_optimizers(self) -> None:
        """Leave no client's state in the optimizers."""
        self._take_added()
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
        return {"optimizers": states, "scaler": self._scalers.get(self._stepper(client))}

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
