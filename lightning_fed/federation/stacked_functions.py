"""What some torch functions do while ``torch.func.vmap`` runs a training step for many clients at once.

Shapes: M = clients of a wave, B = samples of a minibatch.

``vmap`` is correct for most functions and fast for many. Some are treated here, below it, on the tensors that hold all
clients: linear layers, BatchNorm and cross-entropies, whose general rules cost more, or know no mixed precision;
embeddings with padding, of which its rule is wrong; and random functions, which must draw for each client what that
client alone would draw, on whichever rank and beside whomever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch._functorch.vmap import lazy_load_decompositions, vmap_increment_nesting
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_functorch: Any = torch._C._functorch

RANDOM_NAMES = {
    torch: "alpha_dropout bernoulli binomial dropout feature_alpha_dropout feature_dropout multinomial normal poisson "
    "rand rand_like randint randint_like randn randn_like randperm rrelu",
    F: "alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout gumbel_softmax rrelu",
    Tensor: "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal_ random_ uniform_",
}
RANDOM_FUNCTIONS = {getattr(owner, name) for owner, names in RANDOM_NAMES.items() for name in names.split()}
# These are random only if they are told to drop something.
ATTENTION_FUNCTIONS = {F.scaled_dot_product_attention, F.multi_head_attention_forward}


class ClientGenerators:
    """The random streams of a wave's clients, each as if that client ran alone.

    Args:
        seeds: one a client, asked for when the first number is drawn.
        device: which numbers are drawn there as well as on the CPU.
    """

    def __init__(self, seeds: Callable[[], Sequence[int]], device: torch.device) -> None:
        self._seeds = seeds
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._states: list[list[Tensor]] | None = None

    @contextmanager
    def of_client(self, number: int) -> Iterator[None]:
        """Inside, torch draws from the streams of the wave's client ``number``."""
        if self._states is None:
            self._states = [self._initial_states(seed) for seed in self._seeds()]
        before = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._states[number]):
            generator.set_state(state)
        try:
            yield
        finally:
            self._states[number] = [generator.get_state() for generator in self._generators]
            for generator, state in zip(self._generators, before):
                generator.set_state(state)

    def _initial_states(self, seed: int) -> list[Tensor]:
        return [torch.Generator(generator.device).manual_seed(seed).get_state() for generator in self._generators]


class StackedFunctions(TorchFunctionMode):
    """A context around ``torch.func.vmap``, inside which functions know that they serve a wave of clients.

    Args:
        num_clients: M.
        generators: the clients' random streams.
    """

    def __init__(self, num_clients: int, generators: ClientGenerators) -> None:
        super().__init__()
        self.num_clients = num_clients
        self.generators = generators
        self._vmap: VmapInterpreter | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # In transforms that the user has added inside, functions are left alone.
        if func in SPECIAL_FUNCTIONS and _functorch.maybe_current_level() == 1:
            vmap = self._vmap = self._vmap or current_vmap()
            if func in STACKED_FUNCTIONS:
                result = STACKED_FUNCTIONS[func](vmap, *args, **kwargs)
            else:
                result = self._draw(vmap, func, args, kwargs) if is_random(func, args, kwargs) else NotImplemented
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def _draw(
        self, vmap: VmapInterpreter, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a random function client by client.

        Raises:
            RuntimeError: if it should fill a tensor that clients share.
        """
        in_place = getattr(func, "__name__", "").endswith("_")
        if in_place and not _functorch.is_batchedtensor(args[0]):
            raise RuntimeError(
                f"{func.__name__} fills a tensor that was made inside the step with one value for all clients: draw a "
                "new tensor (torch.randn, torch.rand_like, ...) instead of filling an empty one."
            )
        raw_args, raw_kwargs = tree_map(partial(raw, vmap), (args, kwargs))
        outputs = []
        with Below():
            for number in range(self.num_clients):
                own_args, own_kwargs = tree_map(partial(Raw.of, number=number), (raw_args, raw_kwargs))
                with self.generators.of_client(number):
                    outputs.append(func(*own_args, **own_kwargs))
            stacked = None if in_place else tree_map(lambda *values: stack(values), *outputs)
        return args[0] if in_place else tree_map(partial(batched, vmap), stacked)


class Below:
    """A context below vmap, where tensors are those of all clients. ``lower()`` of the interpreter does more."""

    def __enter__(self) -> None:
        self._layer = _functorch.pop_dynamic_layer_stack()

    def __exit__(self, *error: object) -> None:
        _functorch.push_dynamic_layer_stack(self._layer)


def for_each_client(function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> list[Tensor]:
    """``torch.func.vmap(function, randomness="error")(*tensors)``, without finding out at every step what it is given.

    Args:
        function: of one client's tensors; returns tensors.
        tensors: each ``[M, ...]``.
    """
    lazy_load_decompositions()
    num_clients = len(tensors[0])
    with vmap_increment_nesting(num_clients, "error") as level:
        outputs = function(*(_functorch._add_batch_dim(tensor, 0, level) for tensor in tensors))
        return [_functorch._remove_batch_dim(output, level, num_clients, 0) for output in outputs]


class Raw:
    """An argument as it is below vmap: a tensor of all clients, or a value that they share."""

    def __init__(self, value: Any, is_stacked: bool) -> None:
        self.value, self.is_stacked = value, is_stacked

    def of(self, number: int) -> Any:
        """One client's."""
        return self.value[number] if self.is_stacked else self.value


def raw(vmap: VmapInterpreter, value: Any) -> Raw:
    """Take an argument out of vmap; clients come first."""
    if not isinstance(value, Tensor) or not _functorch.is_batchedtensor(value):
        return Raw(value, False)
    tensor, dimension = _functorch._unwrap_batched(value, vmap.level())
    return Raw(tensor.movedim(dimension, 0) if dimension else tensor, dimension is not None)


def batched(vmap: VmapInterpreter, value: Any) -> Any:
    """Inverse of :func:`raw` for a stacked tensor."""
    return _functorch._add_batch_dim(value, 0, vmap.level()) if isinstance(value, Tensor) else value


def stack(values: Sequence[Any]) -> Any:
    """Clients' results as one; what is no tensor is the first client's."""
    return torch.stack(tuple(values)) if isinstance(values[0], Tensor) else values[0]


def current_vmap() -> VmapInterpreter:
    """The vmap in which a function runs."""
    interpreter = retrieve_current_functorch_interpreter()
    assert isinstance(interpreter, VmapInterpreter)
    return interpreter


def is_random(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call draws random numbers."""
    if func in ATTENTION_FUNCTIONS:
        position = 4 if func is F.scaled_dot_product_attention else 10
        probability = kwargs.get("dropout_p", args[position] if len(args) > position else 0.0)
        trains = func is F.scaled_dot_product_attention or kwargs.get("training", True)
        return bool(probability) and bool(trains)
    return func in RANDOM_FUNCTIONS and kwargs.get("training", True) is not False


class _StackedLinear(torch.autograd.Function):
    """``y_m = x_m w_m^T (+ b_m)`` for x ``[M, T, in]``, w ``[M, out, in]``, b ``[M, out]``.

    The gradient of w comes out in the layout of w: autograd's own would be transposed, and copied when it lands.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        if b is None:
            return torch.bmm(x, w.transpose(1, 2))
        return torch.baddbmm(b.unsqueeze(1), x, w.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad
        dx = torch.bmm(dy, w) if needs_x else None
        dw = torch.bmm(dy.transpose(1, 2), x) if needs_w else None
        return dx, dw, dy.sum(1) if needs_b else None


def stacked_linear(vmap: VmapInterpreter, input: Any, weight: Any, bias: Any = None) -> Any:
    """``F.linear`` with a weight of each client's own; NotImplemented for anything else."""
    arguments = [raw(vmap, argument) for argument in (input, weight, bias)]
    if not all(argument.is_stacked or argument.value is None for argument in arguments):
        return NotImplemented
    x, w, b = (argument.value for argument in arguments)
    if w.dim() != 3 or (b is not None and b.shape != w.shape[:2]):
        return NotImplemented
    device = x.device.type
    is_mixed = torch.is_autocast_enabled(device)
    with Below(), torch.autocast(device, enabled=False) if is_mixed else nullcontext():
        if is_mixed:
            dtype = torch.get_autocast_dtype(device)
            x, w, b = x.to(dtype), w.to(dtype), b if b is None else b.to(dtype)
        y = _StackedLinear.apply(x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1]), w, b)
        if x.dim() != 3:
            y = y.reshape(*x.shape[:-1], w.shape[1])
    return batched(vmap, y)


def stacked_batch_norm(
    vmap: VmapInterpreter,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """``F.batch_norm`` with the channels of all clients side by side; NotImplemented if clients share something."""
    arguments = [raw(vmap, argument) for argument in (input, running_mean, running_var, weight, bias)]
    if not all(argument.is_stacked or argument.value is None for argument in arguments):
        return NotImplemented
    x, *of_channels = (argument.value for argument in arguments)
    if any(tensor is not None and not tensor.is_contiguous() for tensor in of_channels[:2]):
        return NotImplemented  # whose update in place would be lost
    num_clients = len(x)
    with Below():
        mean, variance, w, b = (tensor if tensor is None else tensor.flatten() for tensor in of_channels)
        y = F.batch_norm(x.transpose(0, 1).flatten(1, 2), mean, variance, w, b, training, momentum, eps)
        y = y.unflatten(1, (num_clients, -1)).transpose(0, 1)
    return batched(vmap, y)


def stacked_cross_entropy(
    vmap: VmapInterpreter,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``F.cross_entropy`` of each client's logits ``[B, classes]`` and labels ``[B]``; NotImplemented for others."""
    logits, labels = raw(vmap, input), raw(vmap, target)
    plain = weight is None and size_average is None and reduce is None and reduction == "mean"
    if not plain or not logits.is_stacked or not labels.is_stacked:
        return NotImplemented
    x, y = logits.value, labels.value
    if x.dim() != 3 or y.dim() != 2 or y.is_floating_point():
        return NotImplemented
    with Below():
        losses = F.cross_entropy(
            x.flatten(0, 1),
            y.flatten(),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        ).view(y.shape)
        mean = losses.sum(1) / (y != ignore_index).sum(1)
    return batched(vmap, mean)


def stacked_embedding(
    vmap: VmapInterpreter,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    *args: Any,
    **settings: Any,
) -> Any:
    """``F.embedding`` with padding, which vmap's rule knows of the first client alone; NotImplemented without."""
    if padding_idx is None:
        return NotImplemented
    found = F.embedding(input, weight, None, *args, **settings)
    is_padding = input == padding_idx % len(weight)
    return torch.where(is_padding.unsqueeze(-1), found.detach(), found)


STACKED_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: stacked_linear,
    F.batch_norm: stacked_batch_norm,
    F.cross_entropy: stacked_cross_entropy,
    F.embedding: stacked_embedding,
}
SPECIAL_FUNCTIONS = STACKED_FUNCTIONS.keys() | RANDOM_FUNCTIONS | ATTENTION_FUNCTIONS


def leaked(value: Any) -> bool:
    """Whether something that outlives a vmap holds a tensor from inside of it."""
    return any(isinstance(leaf, Tensor) and _functorch.is_functorch_wrapped_tensor(leaf) for leaf in tree_leaves(value))
