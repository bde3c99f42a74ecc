"""The figures of a federation: who holds what, who talks to whom, who trained when, and what came of it.

Shapes: N = clients, K = classes, R = rounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_fed.callbacks.figures import new_figure, plot_line
from lightning_fed.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_SCALE_FROM_RATIO = 30
# Beyond this, several rounds share one column of pixels.
PARTICIPATION_COLUMNS = 600
# Beyond this, gaps between the cells would leave little of them.
CLIENTS_OR_ROUNDS_WITH_GAPS = 100

# (round, bytes sent until then, value)
Points = list[tuple[int, int, float]]

# What a client did in a round: bits of one number, since it may have done several things.
TRAINED, AGGREGATED, JOINED, LEFT, OFFLINE = 1, 2, 4, 8, 16
# How that is drawn: bits that must all be set, colour, and name in the legend; a later line covers an earlier one.
COLOURS = (
    (OFFLINE, "0.88", "offline"),
    (TRAINED, "tab:blue", "trained"),
    (AGGREGATED, "tab:orange", "aggregated"),
    (TRAINED | AGGREGATED, "tab:purple", "trained and aggregated"),
    (JOINED, "tab:green", "came online"),
    (LEFT, "tab:red", "went offline"),
)


def draw_labels(counts_NK: np.ndarray) -> Figure:
    """A heat map: who holds which classes."""
    from matplotlib.ticker import MaxNLocator

    num_clients, num_classes = counts_NK.shape
    figure = new_figure(width=min(4 + num_clients / 16, 12), height=min(2 + num_classes / 6, 8))
    axes = figure.add_subplot()
    image = axes.imshow(counts_NK.T, aspect="auto", origin="lower", cmap="Blues", vmin=0, interpolation="nearest")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set(xlabel="client", ylabel="class", title=f"Training samples of {num_clients} clients")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="samples").outline.set_visible(False)
    return figure


def draw_topology(topology: Topology, num_clients: int) -> Figure:
    """The graph, large enough for every client to be told from its neighbours."""
    side = 4 + num_clients / 16
    figure = new_figure(side, side)
    axes = topology.plot(num_clients, figure.add_subplot(aspect="equal"))
    axes.title.set_fontsize(4 + 2 * side)
    return figure


def draw_progress(accuracies: dict[str, Points], consensus_distances: Points) -> Figure:
    """Two panels over the same rounds: validation accuracy, and consensus distance."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7, 6 if accuracies else 3.2)
    panels = figure.subplots(2 if accuracies else 1, 1, sharex=True, squeeze=False)[:, 0]
    if accuracies:
        plot_accuracies(panels[0], accuracies, x=0)
    rounds, _, distances = zip(*consensus_distances)
    bottom = panels[-1]
    plot_line(bottom, rounds, distances, color="C3")
    if min(distances) > 0 and max(distances) / min(distances) > LOG_SCALE_FROM_RATIO:
        bottom.set_yscale("log")
    else:
        bottom.set_ylim(bottom=0)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.set(xlabel="round", ylabel="consensus distance\n(norm of parameters)")
    return figure


def draw_bytes(accuracies: dict[str, Points]) -> Figure:
    """What an accuracy costs."""
    from matplotlib.ticker import EngFormatter

    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    plot_accuracies(axes, accuracies, x=1)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlim(left=0)
    axes.set_xlabel("bytes sent by clients and server")
    return figure


def draw_participation(rounds: list[int], deeds_NR: np.ndarray) -> Figure:
    """Who trained when: a raster of clients against rounds.

    Where a client did several things in a round, or several rounds share a column, the later of ``COLOURS`` is seen.

    Args:
        rounds: sorted, from 1.
        deeds_NR: uint8, what each client did in each round, as bits.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    num_clients, num_rounds = deeds_NR.shape
    bits = np.array([bit for bit, _, _ in COLOURS], dtype=np.uint8)
    seen_NR = np.zeros((num_clients, num_rounds), dtype=np.uint8)
    for number, bit in enumerate(bits, start=1):
        seen_NR[(deeds_NR & bit) == bit] = number
    per_column = -(-num_rounds // PARTICIPATION_COLUMNS)
    seen_NR = np.maximum.reduceat(seen_NR, np.arange(0, num_rounds, per_column), axis=1)

    # Two rows of pixels a client at least.
    height = max(min(2.5 + num_clients / 16, 8), 1.5 + num_clients / 75)
    figure = new_figure(width=min(5 + num_rounds / 16, 11), height=height)
    axes = figure.add_subplot()
    colours = ListedColormap(["white", *(colour for _, colour, _ in COLOURS)])
    extent = rounds[0] - 0.5, rounds[0] - 0.5 + per_column * seen_NR.shape[1], num_clients - 0.5, -0.5
    axes.imshow(seen_NR, aspect="auto", cmap=colours, vmin=0, vmax=len(COLOURS), interpolation="nearest", extent=extent)
    axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set(xlabel="round", ylabel="client")
    axes.spines[:].set_color("0.8")
    if max(num_clients, num_rounds) <= CLIENTS_OR_ROUNDS_WITH_GAPS:
        axes.set_xticks(np.arange(rounds[0], rounds[-1]) + 0.5, minor=True)
        axes.set_yticks(np.arange(num_clients - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    shown = [
        Patch(facecolor=colour, label=label)
        for number, (_, colour, label) in enumerate(COLOURS, start=1)
        if (seen_NR == number).any()
    ]
    figure.legend(handles=shown, loc="outside upper center", ncols=len(shown), frameon=False)
    return figure


def plot_accuracies(axes: Axes, accuracies: dict[str, Points], x: int) -> None:
    """One line for each metric; ``x`` is the place of the abscissa in a point."""
    for name, points in sorted(accuracies.items()):
        plot_line(axes, [point[x] for point in points], [point[2] for point in points], label=name)
    axes.set_ylabel("validation accuracy")
    if len(accuracies) > 1:
        axes.legend(frameon=False)
