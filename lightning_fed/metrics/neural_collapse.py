"""How far a classifier's features have collapsed onto a simplex: NC1 to NC4 (Papyan, Han, Donoho, PNAS 2020).

Shapes: B = samples of a batch, C = classes, K = classes that have samples, d = numbers of a feature.

With class means mu_c, their unweighted mean mu_G, M the rows mu_c - mu_G, N samples, within-class covariance
``Sigma_W = sum (h - mu_y)(h - mu_y)^T / N`` and between-class covariance ``Sigma_B = M^T M / K``:

* NC1, features of a class become equal: ``tr(Sigma_W Sigma_B^+) / K``;
* NC2, class means become a simplex equiangular tight frame (ETF): ``M M^T`` becomes a multiple of ``I - 11^T / K``;
* NC3, the classifier's rows become the class means: ``||W / ||W||_F - M / ||M||_F||_F``;
* NC4, the classifier chooses the nearest class mean.

Each is zero at collapse. All arithmetic is float64: in float32 a pseudo-inverse of Sigma_B may be wrong by any factor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fed.checks import check_kinds, check_pairs, given
from lightning_fed.metrics.class_moments import ClassMoments, Float64Sums, Moments, check_features


class NeuralCollapse(ClassMoments):
    """NC1, NC2 and NC3 from a stream of features, without storing them.

    Classes that have had no sample are left out, of the classifier too; :attr:`missing` names them.

    Args:
        num_classes: C.
        num_features: d.
        decays: the weight decays ``(lambda_W, lambda_H)`` of classifier and features in the unconstrained features
            model with mean squared error, ``|W H - Y|^2 / 2N + lambda_W |W|^2 / 2 + lambda_H |H|^2 / 2``, for
            ``nc2_gof``; None to leave that out.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if a size or a decay is not positive.
    """

    def __init__(
        self, num_classes: int, num_features: int, decays: tuple[float, float] | None = None, **settings: Any
    ) -> None:
        # A cached result would be returned for another classifier.
        super().__init__(num_classes, num_features, **{"compute_with_cache": False, **settings})
        check_pairs("(0, inf)", **given(decays=decays))
        self.decays = decays

    @property
    def missing(self) -> list[int]:
        """Classes without a sample on this rank so far."""
        missing: list[int] = (self.counts == 0).nonzero()[:, 0].tolist()
        return missing

    def compute(self, weight: Tensor | None = None, bias: Tensor | None = None) -> dict[str, Tensor]:
        """Measure what has been seen; a collective call if ``torch.distributed`` is initialized.

        Args:
            weight: of the classifier, ``[C, d]``; without it what needs it is left out.
            bias: of the classifier, ``[C]``.

        Returns:
            float64 scalars:

            * ``nc1``; ``nc1_trace``, ``tr Sigma_W / tr Sigma_B`` (Tirer et al. 2023), which keeps calm when means lose
              rank; ``cdnv``, the mean over pairs of ``(v_i / n_i + v_j / n_j) / (2 ||mu_i - mu_j||^2)`` (Galanti et
              al. 2022), v_c the scatter of a class;
            * ``nc2_etf``, ``||M M^T / ||.||_F - (I - 11^T / K) / sqrt(K - 1)||_F``; ``nc2_equinorm``, standard
              deviation of the norms of M's rows over their mean; ``nc2_equiangle``, mean of ``|cos + 1 / (K - 1)|``;
            * ``nc2_of``, the same distance of the means themselves from an orthogonal frame, ``I / sqrt(K)``, to which
              mean squared error without bias leads; with ``decays`` also ``nc2_gof``, from the frame with unequal norms
              that is optimal for classes of unequal size (Dang et al. 2023);
            * ``effective_rank``, ``exp`` of the entropy of Sigma_B's spectrum: at most K - 1, and there at collapse;
            * with ``weight``: ``nc3``; ``nc3_etf``, distance of ``W M^T`` from the ETF; ``nc2_weight_etf``,
              ``nc2_weight_equinorm``, ``nc2_weight_equiangle`` of the rows of W, centred (a common shift changes no
              probability); with ``decays`` also ``nc2_weight_gof``;
            * with ``bias`` too: ``bias_residual``, ``||W mu_G + b||``, zero where the bias only undoes the mean.

            All are NaN if a feature was not finite.

        Raises:
            ValueError: if fewer than two classes have samples, or the classifier has another shape.
        """
        return collapse_measures(self.moments(), *self._checked(weight, bias), self.decays)

    def _checked(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if weight is not None and weight.shape != (self.num_classes, self.num_features):
            raise ValueError(
                f"weight has shape {list(weight.shape)}, but must be [{self.num_classes}, {self.num_features}], "
                "classes by features: pass the classifier that reads these features."
            )
        if bias is not None and bias.shape != (self.num_classes,):
            raise ValueError(f"bias has shape {list(bias.shape)}, but must be [{self.num_classes}], one a class.")
        return weight, bias


class NearestCentreAgreement(Float64Sums):
    """NC4: the share of samples for which the classifier does not choose the class with the nearest mean.

    Needs the class means, so features are seen a second time (or the means of an earlier pass are taken).

    Args:
        means: of the classes, ``[K, d]``.
        classes: the numbers of these classes, integer ``[K]``; by default ``0 .. K-1``. Others are never chosen.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the shapes do not match.
    """

    differing: Tensor
    total: Tensor
    means: Tensor
    classes: Tensor

    def __init__(self, means: Tensor, classes: Tensor | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        check_kinds(Tensor, means=means, **given(classes=classes))
        classes = torch.arange(len(means)) if classes is None else classes
        if means.ndim != 2 or classes.shape != (len(means),):
            raise ValueError(
                f"means have shape {list(means.shape)} and classes {list(classes.shape)}, but must be [classes, "
                "features] and [classes]."
            )
        self.register_buffer("means", means.detach().double(), persistent=False)
        self.register_buffer("classes", classes.to(means.device), persistent=False)
        for name in ("differing", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64, device=means.device), dist_reduce_fx="sum")

    def update(self, features: Tensor, logits: Tensor) -> None:
        """Add a batch.

        Args:
            features: ``[B, d]``.
            logits: of the classifier, or any scores of the classes, ``[B, C]``.

        Raises:
            ValueError: if a shape is another one.
        """
        check_features(features, self.means.shape[1])
        last = int(self.classes.max())
        if logits.ndim != 2 or len(logits) != len(features) or logits.shape[1] <= last:
            raise ValueError(
                f"logits have shape {list(logits.shape)}, but {len(features)} features and class {last} need "
                f"[{len(features)}, {last + 1} or more]."
            )
        # Around the common mean, so that a large offset of all features costs no digits.
        origin = self.means.mean(dim=0)
        centred, means = features.detach().to(origin.device).double() - origin, self.means - origin
        nearest = (centred @ means.T - means.square().sum(dim=1) / 2).argmax(dim=1)
        chosen = logits.detach().to(origin.device)[:, self.classes].argmax(dim=1)
        self.differing += (nearest != chosen).sum()
        self.total += len(features)

    def compute(self) -> Tensor:
        """The share in [0, 1], float64.

        Raises:
            ValueError: if there was no sample.
        """
        if not self.total:
            raise ValueError("no sample has been seen: call `update` before `compute`.")
        return self.differing.double() / self.total


def collapse_measures(
    moments: Moments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    decays: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    """What :meth:`NeuralCollapse.compute` returns, of moments."""
    measures = within_class(moments)
    measures |= {f"nc2_{name}": value for name, value in simplex_distances(moments.centred).items()}
    gram = moments.means @ moments.means.T
    measures["nc2_of"] = frame_distance(gram, torch.eye(len(gram)).to(gram))
    norms = None if decays is None else orthogonal_frame_norms(moments.counts, *decays)
    if norms is not None:
        measures["nc2_gof"] = frame_distance(gram, norms[1].diag())
    if weight is not None:
        rows = weight.detach().to(gram)[moments.classes]
        measures |= duality(moments, rows, None if bias is None else bias.detach().to(gram)[moments.classes])
        if norms is not None:
            measures["nc2_weight_gof"] = frame_distance(rows @ rows.T, norms[0].diag())
    return measures


def within_class(moments: Moments) -> dict[str, Tensor]:
    """``nc1``, ``nc1_trace``, ``cdnv`` and ``effective_rank``."""
    centred, num_samples = moments.centred, moments.counts.sum()
    gram = centred @ centred.T
    squares = gram.diagonal()
    distances = squares[:, None] + squares - 2 * gram
    widths = moments.class_scatter / moments.counts
    pairs = ~torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    spectrum, within = between_class_spectrum(moments.scatter, centred, gram)
    shares = spectrum / spectrum.sum()
    return {
        "nc1": (within / spectrum.square()).sum() / num_samples / len(gram),
        "nc1_trace": moments.class_scatter.sum() / num_samples / (squares.sum() / len(gram)),
        "cdnv": ((widths[:, None] + widths) / (2 * distances))[pairs].mean(),
        "effective_rank": torch.special.entr(shares).sum().exp(),
    }


def between_class_spectrum(scatter: Tensor, centred: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of Sigma_B that are not zero, and the scatter along their directions.

    ``tr(S Sigma_B^+)`` is the sum of ``a^T S a / l^2`` over eigenvalues l with ``a = sqrt(l) u``, u the eigenvector.
    The smaller one of the K x K and the d x d side is decomposed: ``M M^T v = K l v`` gives ``a = M^T v / sqrt(K)``.

    Args:
        scatter: S, ``[d, d]``.
        centred: M, ``[K, d]``.
        gram: ``M M^T``, ``[K, K]``.

    Returns:
        l ``[r]`` and ``a^T S a`` ``[r]``, r < K; NaN of features that are not finite, l = 0 if all means are equal.
    """
    num_classes, num_features = centred.shape
    if not (torch.isfinite(gram).all() and torch.isfinite(scatter).all()):
        return gram.new_full((1,), torch.nan), gram.new_full((1,), torch.nan)
    if not gram.any():  # all means are the same
        return gram.new_zeros(1), gram.new_ones(1)
    wide = num_classes <= num_features
    eigenvalues, vectors = torch.linalg.eigh((gram if wide else centred.T @ centred) / num_classes)
    # What pinv cuts off too, among it the direction that centring has taken away.
    kept = eigenvalues > max(centred.shape) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.max()
    spectrum, vectors = eigenvalues[kept], vectors[:, kept]
    directions = centred.T @ vectors / num_classes**0.5 if wide else vectors * spectrum.sqrt()
    return spectrum, (scatter @ directions * directions).sum(dim=0)


def simplex_distances(rows: Tensor) -> dict[str, Tensor]:
    """How far centred rows ``[K, d]`` are from a simplex ETF: as a whole, in their norms, in their angles."""
    gram = rows @ rows.T
    norms = gram.diagonal().sqrt()
    off_diagonal = ~torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    cosines = (gram / norms / norms[:, None])[off_diagonal]
    return {
        "etf": frame_distance(gram, simplex(rows)),
        "equinorm": norms.std(correction=0) / norms.mean(),
        "equiangle": (cosines + 1 / (len(gram) - 1)).abs().mean(),
    }


def duality(moments: Moments, rows: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """What compares class means with a classifier of the same classes, rows ``[K, d]`` and bias ``[K]``."""
    centred = moments.centred
    measures = {
        "nc3": torch.linalg.vector_norm(rows / rows.norm() - centred / centred.norm()),
        "nc3_etf": frame_distance(rows @ centred.T, simplex(rows)),
    }
    of_weight = simplex_distances(rows - rows.mean(dim=0))
    measures |= {f"nc2_weight_{name}": value for name, value in of_weight.items()}
    if bias is not None:
        measures["bias_residual"] = torch.linalg.vector_norm(rows @ moments.means.mean(dim=0) + bias)
    return measures


def simplex(rows: Tensor) -> Tensor:
    """``I - 11^T / K``, the Gram matrix of a simplex ETF up to scale, like ``rows`` ``[K, d]``."""
    return torch.eye(len(rows)).to(rows) - 1 / len(rows)


def frame_distance(gram: Tensor, target: Tensor) -> Tensor:
    """``||G / ||G||_F - T / ||T||_F||_F`` of two ``[K, K]`` matrices."""
    return torch.linalg.vector_norm(gram / gram.norm() - target / target.norm())


def orthogonal_frame_norms(counts: Tensor, weight_decay: float, feature_decay: float) -> tuple[Tensor, Tensor]:
    """The general orthogonal frame of imbalanced classes: optimal ``diag(W W^T)`` and ``diag(mu mu^T)``.

    Of ``|W H - Y|^2 / 2N + lambda_W |W|^2 / 2 + lambda_H |H|^2 / 2`` (Dang et al., ICML 2023, one layer): ``s_k^2 =
    max(0, sqrt(n_k lambda_H / lambda_W) - N lambda_H)`` and ``s_k^2 / (s_k^2 + N lambda_H)^2``. A class with ``n_k <=
    N^2 lambda_W lambda_H`` vanishes.

    Args:
        counts: samples of each class, ``[K]``.
        weight_decay: lambda_W.
        feature_decay: lambda_H.

    Returns:
        two tensors ``[K]``.
    """
    threshold = counts.sum() * feature_decay
    squares = ((counts * feature_decay / weight_decay).sqrt() - threshold).clamp(min=0)
    return squares, squares / (squares + threshold).square()
