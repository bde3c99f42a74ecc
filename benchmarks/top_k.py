"""How long it takes to find the k largest of 10 million numbers by magnitude: this package against three other ways.

``topk``: torch.topk of the magnitudes. ``kthvalue``: torch.kthvalue, then the indices of what is not below it; left out
(-) where the numbers descend, for which it takes minutes. ``sampled``: the threshold of a sample, then torch.topk among
what is not below it; it makes no promise about ties, and would fail on a sample that misleads.

The ways alternate in one process after a warm-up of each; wall-clock medians on one thread. ``ours`` and ``kthvalue``
return ascending indices, the others unsorted ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from lightning_fed.compression.top_k import top_k_indices

SHARES = (0.001, 0.01, 0.1)
SAMPLE = 65_536


def ours(row: Tensor, k: int) -> Tensor:
    return top_k_indices(row[None], k)[0]


def topk(row: Tensor, k: int) -> Tensor:
    return row.abs().topk(k, sorted=False).indices


def kthvalue(row: Tensor, k: int) -> Tensor:
    magnitudes = row.abs()
    threshold = magnitudes.kthvalue(len(row) - k + 1).values
    return (magnitudes >= threshold).nonzero()[:, 0]


def sampled(row: Tensor, k: int) -> Tensor:
    magnitudes = row.abs()
    expected = SAMPLE * k / len(row)
    rank = math.ceil(expected + 4 * math.sqrt(expected))
    threshold = magnitudes[:: len(row) // SAMPLE][:SAMPLE].topk(rank, sorted=False).values.amin()
    candidates = (magnitudes >= threshold).nonzero()[:, 0]
    return candidates[magnitudes[candidates].topk(k, sorted=False).indices]


WAYS: tuple[Callable[[Tensor, int], Tensor], ...] = (ours, topk, kthvalue, sampled)


def distributions(size: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(size, generator=draw)
    return {
        "normal": normal,
        "Cauchy": torch.empty(size).cauchy_(generator=draw),
        "0.05 % non-zero": normal * (torch.rand(size, generator=draw) < 5e-4),
        "all zero": torch.zeros(size),
        "all equal": torch.ones(size),
        "ascending": normal.sort().values,
        "descending": normal.abs().sort(descending=True).values,
    }


def milliseconds(row: Tensor, k: int, repeats: int, ways: list[Callable[[Tensor, int], Tensor]]) -> list[float]:
    """Median of each way."""
    times: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for way, measured in zip(ways, times):
            start = perf_counter()
            way(row, k)
            if repeat:  # the first is the warm-up
                measured.append(1e3 * (perf_counter() - start))
    return [median(measured) for measured in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| numbers | k | {' | '.join(way.__name__ + ', ms' for way in WAYS)} | ours to the fastest other |")
    print("| --- " * (len(WAYS) + 3) + "|")
    for name, row in distributions(args.size).items():
        ways = [way for way in WAYS if name != "descending" or way is not kthvalue]
        for share in SHARES:
            times = dict(zip(ways, milliseconds(row, round(share * args.size), args.repeats, ways)))
            cells = [f"{times[way]:.1f}" if way in times else "-" for way in WAYS]
            ratio = times[ours] / min(time for way, time in times.items() if way is not ours)
            print(f"| {name} | {share:.1%} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
