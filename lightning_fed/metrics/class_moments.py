"""First and second moments of features by class, from a stream of batches on any number of ranks.

Shapes: B = samples of a batch, C = classes, K = classes that have samples, d = numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_fed.checks import check_counts

# Half of a symmetric matrix is enough. Blocks of this width leave little of the other half to be computed, and are wide
# enough for a matrix product at full speed.
BLOCK = 256


class Float64Sums(Metric):
    """A metric whose states are sums over samples, kept in float64 (or int64) whatever the module's dtype becomes.

    ``module.to(torch.bfloat16)``, Lightning's ``precision="bf16-true"`` among others, converts the metrics inside a
    module, and would leave sums with three digits. Devices without float64 (MPS) leave the sums on the CPU.

    Ranks are reduced by one ``all_reduce`` a state. torchmetrics would gather and stack the states of all ranks: for a
    d x d state with d = 2,048 on 64 ranks, 2.1 GB.

    Args:
        **settings: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> nn.Module:
        def to_device(value: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=value.device)).device
            return value if device.type == "mps" else value.to(device)

        return super()._apply(to_device, exclude_state)

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        if dist_sync_fn is not gather_all_tensors:  # a transport of the caller's own
            super()._sync_dist(dist_sync_fn, process_group)
            return
        for name in self._defaults:  # torchmetrics has put copies aside, to which it returns after `compute`
            torch.distributed.all_reduce(getattr(self, name), group=process_group or self.process_group)


class Moments(NamedTuple):
    """What the classes that have samples look like.

    Attributes:
        classes: their numbers, ascending, int64 ``[K]``.
        counts: their samples, float64 ``[K]``.
        means: of their features, float64 ``[K, d]``.
        scatter: ``sum (h - mean_y)(h - mean_y)^T`` over all samples, float64 ``[d, d]``.
        class_scatter: ``sum ||h - mean_c||^2`` over each class, float64 ``[K]``.
    """

    classes: Tensor
    counts: Tensor
    means: Tensor
    scatter: Tensor
    class_scatter: Tensor

    @property
    def centred(self) -> Tensor:
        """Class means minus their unweighted mean, ``[K, d]``: weights would bend an ETF under imbalance."""
        return self.means - self.means.mean(dim=0)


class ClassMoments(Float64Sums):
    """Counts, means and scatters of features by class. No feature is stored: ``8 (C (d + 2) + d^2)`` bytes are.

    The states add up over batches, ranks and :meth:`merge_state`: ``n_c``, ``s_c = sum h``, ``Q = sum h h^T`` (of which
    only the upper triangle is kept up) and ``q_c = sum ||h||^2``. Then ``mean_c = s_c / n_c``, the within-class scatter
    is ``Q - sum_c s_c mean_c^T``, and that of one class ``q_c - s_c . mean_c``. The differences cancel, which costs
    float64 some 9 of its 16 digits when classes are a thousand times narrower than their distance from the origin, and
    float32 all it has: features are converted before they are summed.

    Args:
        num_classes: C.
        num_features: d.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if a size is not positive.
    """

    counts: Tensor
    sums: Tensor
    products: Tensor
    squares: Tensor

    def __init__(self, num_classes: int, num_features: int, **settings: Any) -> None:
        super().__init__(**settings)
        check_counts(2, num_classes=num_classes)
        check_counts(num_features=num_features)
        self.num_classes = num_classes
        self.num_features = num_features
        float64: dict[str, Any] = {"dtype": torch.float64}
        self.add_state("counts", torch.zeros(num_classes, **float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(num_classes, num_features, **float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(num_features, num_features, **float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(num_classes, **float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: ``[B, d]``, of any float type.
            labels: their classes, integer ``[B]`` in ``0 .. C-1``.

        Raises:
            ValueError: if a shape, a type or a label is another one.
        """
        check_features(features, self.num_features)
        check_labels(labels, len(features), self.num_classes)
        features, labels = features.detach().to(self.counts.device).double(), labels.to(self.counts.device).long()
        squares = features.square().sum(dim=1)
        self.counts.index_add_(0, labels, torch.ones_like(squares))
        self.sums.index_add_(0, labels, features)
        self.squares.index_add_(0, labels, squares)
        for start in range(0, self.num_features, BLOCK):
            block = self.products[start : start + BLOCK, start:]
            block.addmm_(features[:, start : start + BLOCK].T, features[:, start:])

    def compute(self) -> Any:
        """The :class:`Moments`."""
        return self.moments()

    def moments(self) -> Moments:
        """What has been seen by this rank (inside ``compute``: by all ranks).

        Raises:
            ValueError: if fewer than two classes have samples.
        """
        classes = self.counts.nonzero()[:, 0]
        if len(classes) < 2:
            raise ValueError(
                f"{int(self.counts.sum())} samples of {len(classes)} of {self.num_classes} classes have been seen, but "
                "how classes lie to each other takes two: update with samples of more classes."
            )
        counts, sums = self.counts[classes], self.sums[classes]
        means = sums / counts[:, None]
        products = self.products.triu() + self.products.triu(1).T
        # Rounding may leave a negative zero of a class that has collapsed.
        class_scatter = (self.squares[classes] - (sums * means).sum(dim=1)).clamp(min=0)
        return Moments(classes, counts, means, products.addmm_(sums.T, means, alpha=-1), class_scatter)


def check_features(features: Tensor, num_features: int) -> None:
    """Refuse what is not a batch of features.

    Raises:
        ValueError: naming the shape.
    """
    if features.ndim != 2 or features.shape[1] != num_features:
        raise ValueError(
            f"features have shape {list(features.shape)}, but must be [batch, {num_features}]: pool over positions, or "
            f"set num_features={features.shape[-1] if features.ndim else 1}."
        )
    if not features.is_floating_point():
        raise ValueError(f"features are {features.dtype}, but must be floating-point numbers.")


def check_labels(labels: Tensor, num_samples: int, num_classes: int) -> None:
    """Refuse what is not one class a sample.

    Raises:
        ValueError: naming the shape, the type or the numbers.
    """
    if labels.shape != (num_samples,):
        raise ValueError(
            f"labels have shape {list(labels.shape)}, but {num_samples} features need [{num_samples}]: one class each "
            "(take the argmax of one-hot labels; leave mixed ones out)."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}, but must be integers, the numbers of the classes.")
    if num_samples and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(
            f"labels lie in {int(labels.min())} .. {int(labels.max())}, but num_classes={num_classes} allows "
            f"0 .. {num_classes - 1}: leave out samples without a class (often labelled -1), or raise num_classes."
        )
