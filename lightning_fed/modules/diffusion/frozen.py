"""Networks that a module uses but does not train: they follow it to a device, and stay out of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class HoldsFrozen(nn.Module):
    """A module that holds others outside its tree; derive from it first: ``class M(HoldsFrozen, LightningModule)``.

    What is held is no parameter of this module: it is not in its ``state_dict``, no optimizer gets it, DDP does not
    look for its gradients and a federation does not send it. It moves and changes its type together with this module,
    and is copied and pickled with it. ``train()`` leaves it in evaluation mode.
    """

    def hold_frozen(self, name: str, module: nn.Module) -> None:
        """Make ``module`` the attribute ``name``, in evaluation mode and without gradients of its parameters.

        Gradients still flow through it to its input.
        """
        # Past nn.Module.__setattr__, which would register it.
        self.__dict__[name] = module.eval().requires_grad_(False)
        self.__dict__["_held"] = {*self.__dict__.get("_held", ()), name}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        for name in self.__dict__.get("_held", ()):
            self.__dict__[name]._apply(fn)
        return super()._apply(fn, recurse)
