"""The figures of neural collapse: how fast, how far, and what the class means look like.

Shapes: C = classes, K = classes that have samples, d = numbers of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_fed.callbacks.figures import new_figure, plot_line
from lightning_fed.metrics import Moments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond this, the numbers of the classes would cover each other.
LABELLED_CLASSES = 30
# Beyond this, so would the ellipses.
DRAWN_CLASSES = 200
STANDARD_DEVIATIONS = 2

# For each measure, (epochs done, value).
Curves = dict[str, list[tuple[int, float]]]

PANELS = (
    ("NC1: variability within classes", ("nc1", "nc1_trace", "cdnv"), True),
    ("NC2: class means against a simplex", ("nc2", "nc2_equinorm", "nc2_equiangle"), False),
    ("NC3: classifier against class means", ("nc3", "nc3_etf", "nc2_weight_etf"), False),
    ("NC4: not the nearest class mean", ("nc4",), False),
)


class Snapshot(NamedTuple):
    """The class means of one measurement.

    Attributes:
        classes: their numbers, ``[K]``.
        cosines: between the centred class means, ``[K, K]``.
        points: the centred class means in a plane, ``[K, 2]``.
        spread: the within-class covariance in that plane, ``[2, 2]``.
        rows: the classifier's centred rows in that plane, scaled to the norm of the class means, ``[K, 2]``, or None.
    """

    classes: np.ndarray
    cosines: np.ndarray
    points: np.ndarray
    spread: np.ndarray
    rows: np.ndarray | None


def snapshot_of(moments: Moments, weight: Tensor | None) -> Snapshot:
    """What is drawn of class means, and of a classifier ``[C, d]``.

    The plane is spanned by ``sum_k cos(2 pi k / K) M_k`` and ``sum_k sin(2 pi k / K) M_k``, in which the vertices of a
    simplex are those of a regular polygon. (Principal components of a simplex are all equal, so they show any view.)
    """
    centred = moments.centred
    angles = 2 * math.pi * torch.arange(len(centred)).to(centred) / len(centred)
    polygon = torch.stack([angles.cos(), angles.sin()], dim=1)
    plane = torch.linalg.qr(centred.T @ polygon)[0]
    # QR may turn either axis around.
    plane = plane * (centred @ plane * polygon[:, : plane.shape[1]]).sum(dim=0).sign()
    rows = None
    if weight is not None:
        rows = weight.detach().to(centred)[moments.classes]
        rows = rows - rows.mean(dim=0)
        rows = rows / rows.norm() * centred.norm()
    norms = centred.norm(dim=1)

    def numbers(values: Tensor) -> np.ndarray:
        array: np.ndarray = values.cpu().numpy()
        return array

    return Snapshot(
        classes=numbers(moments.classes),
        cosines=numbers(centred @ centred.T / norms / norms[:, None]),
        points=numbers(in_plane(centred, plane)),
        spread=numbers(in_plane(in_plane(moments.scatter / moments.counts.sum(), plane).T, plane)),
        rows=None if rows is None else numbers(in_plane(rows, plane)),
    )


def in_plane(values: Tensor, plane: Tensor) -> Tensor:
    """Coordinates ``[..., 2]`` of ``[..., d]``; features of one number have a second coordinate of zero."""
    coordinates = values @ plane
    return torch.nn.functional.pad(coordinates, (0, 2 - plane.shape[1]))


def draw_curves(curves: Curves) -> Figure:
    """Four panels over epochs; a logarithmic scale for NC1."""
    figure = new_figure(10, 6)
    for axes, (title, names, logarithmic) in zip(figure.subplots(2, 2).flat, PANELS):
        plot_measures(axes, curves, names, logarithmic)
        axes.set_title(title)
    return figure


def plot_measures(axes: Axes, curves: Curves, names: Sequence[str], logarithmic: bool) -> None:
    """Those of the measures that there are, over epochs."""
    from matplotlib.ticker import MaxNLocator

    shown = [name for name in names if name in curves]
    for name in shown:
        plot_line(axes, *zip(*curves[name]), label=name)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if logarithmic and any(value > 0 for name in shown for _, value in curves[name]):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if len(shown) > 1:
        axes.legend(frameon=False)


def draw_depth(curves: Curves, layers: Sequence[str]) -> Figure:
    """NC1 and NC4 through depth at the last measurement, and at the first one."""
    figure = new_figure(10, 3.6)
    for axes, name in zip(figure.subplots(1, 2), ("nc1", "nc4")):
        lines = [curves[key] for key in (*(f"{layer}/{name}" for layer in layers), name) if key in curves]
        for when, label in ((0, "first"), (-1, "last")):
            if lines:
                plot_line(axes, range(len(lines)), [points[when][1] for points in lines], label=f"{label} measurement")
        axes.set_xticks(range(len(layers) + 1), [*layers, "features"], rotation=30, ha="right")
        axes.set_title(name)
        if name == "nc1":
            axes.set_yscale("log")
            axes.legend(frameon=False)
    return figure


def draw_gram(snapshot: Snapshot) -> Figure:
    """Cosines between centred class means; of a simplex all are ``-1 / (K - 1)``."""
    number = len(snapshot.classes)
    figure = new_figure(6, 5)
    axes = figure.add_subplot()
    image = axes.imshow(snapshot.cosines, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    if number <= LABELLED_CLASSES:
        axes.set_xticks(range(number), snapshot.classes)
        axes.set_yticks(range(number), snapshot.classes)
    angle = f"-1/{number - 1}"
    axes.set(xlabel="class", ylabel="class", title=f"Cosines between class means (simplex: {angle})")
    axes.spines[:].set_visible(False)
    figure.colorbar(image).outline.set_visible(False)
    return figure


def draw_means(snapshot: Snapshot) -> Figure:
    """Class means in a plane."""
    figure = new_figure(6, 6)
    plot_means(figure.add_subplot(), snapshot)
    return figure


def plot_means(axes: Axes, snapshot: Snapshot) -> None:
    """Class means in a plane, with the pooled spread of samples around them, and the classifier's rows."""
    from matplotlib.patches import Ellipse

    variances, directions = np.linalg.eigh(np.nan_to_num(snapshot.spread))
    widths = 2 * STANDARD_DEVIATIONS * np.sqrt(np.maximum(variances, 0))
    angle = math.degrees(math.atan2(directions[1, 1], directions[0, 1]))
    colours = np.arange(len(snapshot.classes)) / len(snapshot.classes)
    if snapshot.rows is not None:
        x, y = snapshot.rows.T
        axes.scatter(x, y, marker="^", s=60, facecolor="none", edgecolor="0.4", label="classifier, scaled")
    x, y = snapshot.points.T
    axes.scatter(x, y, c=colours, cmap="hsv", vmin=0, vmax=1, s=18, zorder=3, label="class mean")
    for number, point in enumerate(snapshot.points[:DRAWN_CLASSES]):
        axes.add_patch(Ellipse(tuple(point), widths[1], widths[0], angle=angle, color="0.5", alpha=0.2, lw=0))
        if len(snapshot.classes) <= LABELLED_CLASSES:
            axes.annotate(str(snapshot.classes[number]), tuple(point), xytext=(5, 5), textcoords="offset points")
    axes.set_title(f"Class means; shaded: {STANDARD_DEVIATIONS} standard deviations within classes")
    axes.legend(frameon=False, loc="best")
    axes.grid(color="0.92")
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
