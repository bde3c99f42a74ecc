"""Bad settings of topologies, partitioners, compressors, proximal operators and schedules of radii."""

from __future__ import annotations

from bad_input.bad_values import (
    CHOICE,
    COUNT,
    COUNT_FROM_ZERO,
    FLAG,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SHARE,
    Case,
    Catalogue,
    inf,
    nan,
    optional,
)

from lightning_fed.compression import Identity, LowRank, Quantize, RandK, ScaledSign, TopK
from lightning_fed.partition import IID, ByAttribute, Dirichlet, QuantitySkew, Shards
from lightning_fed.proximal import L1Norm
from lightning_fed.sharpness import RhoSteps
from lightning_fed.topology import (
    Complete,
    ErdosRenyi,
    Exponential,
    GraphFile,
    OnePeerExponential,
    RandomRegular,
    Ring,
    Star,
    Torus,
)

CATALOGUE: Catalogue = {
    Ring: Case({"mixing": CHOICE}),
    Star: Case({"mixing": CHOICE}),
    Torus: Case({"rows": optional(COUNT), "mixing": CHOICE}),
    Exponential: Case(),
    OnePeerExponential: Case(),
    Complete: Case(),
    RandomRegular: Case({"degree": COUNT, "seed": COUNT_FROM_ZERO, "mixing": CHOICE}, valid=lambda: {"degree": 3}),
    ErdosRenyi: Case(
        {"probability": SHARE, "seed": COUNT_FROM_ZERO, "mixing": CHOICE}, valid=lambda: {"probability": 0.5}
    ),
    GraphFile: Case({"path": PATH, "mixing": CHOICE}, valid=lambda: {"path": "graph.edgelist"}),
    IID: Case(),
    Dirichlet: Case({"alpha": POSITIVE, "min_samples": COUNT_FROM_ZERO, "balanced": FLAG}),
    Shards: Case({"shards_per_client": COUNT}),
    QuantitySkew: Case({"alpha": POSITIVE, "min_samples": COUNT_FROM_ZERO}),
    ByAttribute: Case({"attribute": (3, None)}, valid=lambda: {"attribute": "writers.npy"}),
    Identity: Case(),
    TopK: Case({"ratio": SHARE, "scope": CHOICE}, valid=lambda: {"ratio": 0.1}),
    RandK: Case({"ratio": SHARE, "scope": CHOICE, "unbiased": FLAG}, valid=lambda: {"ratio": 0.1}),
    Quantize: Case(
        {"bits": (9, *COUNT), "scope": CHOICE, "bucket_size": optional(COUNT), "unbiased": FLAG},
    ),
    ScaledSign: Case({"scope": CHOICE}),
    LowRank: Case({"rank": COUNT}),
    L1Norm: Case({"weight": NOT_NEGATIVE}, valid=lambda: {"weight": 0.1}),
    RhoSteps: Case(
        {
            "values": ("small", 3, None, [0.1, -1.0], [0.1, nan], [0.1, inf], [0.1, "small"]),
            "milestones": ("late", 3, None, [-1], [1.5], ["late"], [True]),
        },
        valid=lambda: {"values": [0.1, 0.5], "milestones": [10]},
    ),
}
