"""A classifier that neural collapse would end in, fixed from the start.

Shapes: B = samples of a batch, C = classes, d = numbers of a feature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fed.checks import check_counts, check_numbers


class EquiangularHead(nn.Module):
    """Logits from the angles between a projected feature and fixed, maximally separate class directions.

    ``z = scale * E p / ||p||`` with ``p = P h``: P is a trained linear projection to as many dimensions as there are
    classes, E the rows of a simplex equiangular tight frame, scale a trained scalar (FedETF: Li et al., ICCV 2023, "No
    Fear of Classifier Biases"). Clients with other classes have no classifier of their own that could drift apart.

    It stands where a timm model has its classifier: ``model.fc = EquiangularHead(model.num_features, 10)``, and in
    ``ImageClassifier(model)``. ``NeuralCollapseMonitor`` measures it as ``head="....prototypes"``.

    Args:
        num_features: d.
        num_classes: C.
        scale: where the scale of the logits starts. FedETF's code starts at 1.
        seed: of E. All clients must have the same one.

    Shapes:
        features ``[..., d]``, logits ``[..., C]`` in ``[-scale, scale]``.

    Raises:
        ValueError: if a size or the scale is out of range.
    """

    def __init__(self, num_features: int, num_classes: int, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        check_counts(num_features=num_features)
        check_counts(2, num_classes=num_classes)
        self.in_features, self.out_features = num_features, num_classes
        self.projection = nn.Linear(num_features, num_classes, bias=False)
        self.prototypes = EquiangularPrototypes(num_classes, scale, seed)

    def forward(self, features: Tensor) -> Tensor:
        return self.prototypes(F.normalize(self.projection(features), dim=-1))


class EquiangularPrototypes(nn.Module):
    """``z = scale * E h``: the fixed directions E ``[C, C]`` of the classes, and the scale of the logits.

    E is a buffer that follows the module's device and dtype and is saved in checkpoints, but it is not persistent in
    PyTorch's sense: federated strategies send and average persistent float buffers, which would cost bytes, and round
    a little in every round, for what all clients have made from the same seed.

    Args:
        num_classes: C.
        scale: where the trained scale starts.
        seed: of E.

    Raises:
        ValueError: if ``num_classes`` is below 2, or ``scale`` is not positive.
    """

    weight: Tensor

    def __init__(self, num_classes: int, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        check_counts(2, num_classes=num_classes)
        check_numbers("(0, inf)", scale=scale)
        check_counts(0, seed=seed)
        self.register_buffer("weight", simplex_etf(num_classes, seed).to(torch.get_default_dtype()), persistent=False)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(features, self.weight)

    def get_extra_state(self) -> Tensor:
        return self.weight

    def set_extra_state(self, state: Tensor) -> None:
        if state.shape != self.weight.shape:
            raise ValueError(
                f"the saved prototypes have shape {list(state.shape)}, but num_classes={len(self.weight)} needs "
                f"{list(self.weight.shape)}: load into a head with num_classes={len(state)}."
            )
        self.weight.copy_(state)


def simplex_etf(num_classes: int, seed: int = 0) -> Tensor:
    """C unit vectors, each two of them at the cosine ``-1 / (C - 1)``: ``sqrt(C / (C - 1)) (I - 11^T / C) U^T``.

    Args:
        num_classes: C.
        seed: of the rotation U, uniform among all orthogonal matrices.

    Returns:
        float64 ``[C, C]``, a class a row.

    Raises:
        ValueError: if ``num_classes`` is below 2.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2.")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(num_classes, num_classes, generator=generator, dtype=torch.float64, device="cpu")
    rotation, triangle = torch.linalg.qr(gaussian)
    rotation = rotation * triangle.diagonal().sign()  # QR is unique, and U uniform, with a positive diagonal only
    simplex = torch.eye(num_classes, dtype=torch.float64, device="cpu") - 1 / num_classes
    return (num_classes / (num_classes - 1)) ** 0.5 * simplex @ rotation.T
