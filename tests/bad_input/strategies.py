"""Bad settings of strategies, of who takes part, of when clients are there, and of simulated time."""

from __future__ import annotations

from typing import Any

from bad_input.bad_values import (
    CHOICE,
    COUNT,
    COUNT_FROM_ZERO,
    FLAG,
    FUNCTION,
    NOT_NEGATIVE,
    NUMBER,
    PART,
    PATH,
    POSITIVE,
    SECONDS,
    SHARE,
    Case,
    Catalogue,
    Fine,
    inf,
    nan,
    optional,
)

from lightning_fed import (
    AlwaysOn,
    AvailabilityTrace,
    Constant,
    DFedSAMStrategy,
    EControlStrategy,
    FedAvgStrategy,
    FederatedStrategy,
    GossipStrategy,
    LogNormal,
    MembershipSchedule,
    MoDeSTStrategy,
    RandomChurn,
    Uniform,
    UserLevelPrivacy,
    VirtualClock,
)
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.local_rules import Proximal, SharpnessAwareRule
from lightning_fed.federation.participation import FullParticipation, UniformSample

FEDERATION = Fine("those of FederatedStrategy; Python names others")
RATE = (-0.1, 1.5, *NUMBER)
SCHEDULE = ("5", 3, {0: [1]}, {1.5: [1]}, {1: 2}, {1: "12"}, {1: [-1]}, {1: ["a"]})
BACKEND = ("", "glue", "cpu:gloo,cuda:ncll", 3)
TOPOLOGY = ("rung", "", 3, None, "Ring()")
RHO = (-1.0, inf, nan, "small", True, None)
GAMMA = (0.0, -0.1, 1.5, *NUMBER)


def cohort(size: Any = None, fraction: Any = None) -> UniformSample:
    """With one of the two, as it must be."""
    return UniformSample(2) if size is fraction is None else UniformSample(size, fraction)


CATALOGUE: Catalogue = {
    FederatedStrategy: Case(
        {
            "num_clients": optional(COUNT),
            "participation": optional(PART),
            "local_rule": optional(PART),
            "local_epochs": COUNT,
            "local_steps": optional(COUNT),
            "rounds_per_epoch": (*COUNT, "all"),
            "optimizer_state": CHOICE,
            "float_buffers": CHOICE,
            "evaluate": CHOICE,
            "ranks_per_client": COUNT,
            "clients_per_step": (*COUNT, "all"),
            "log_clients": FLAG,
            "rows_device": CHOICE,
            "on_nonfinite": CHOICE,
            "seed": optional(COUNT_FROM_ZERO),
            "process_group_backend": BACKEND,
            "timeout": SECONDS,
            "start_method": CHOICE,
            "on_peer_loss": CHOICE,
            "ping_timeout": SECONDS,
            "clock": optional(PART),
        },
        make=GossipStrategy,
    ),
    FedAvgStrategy: Case(
        {
            "cohort_size": optional(COUNT),
            "cohort_fraction": optional(SHARE),
            "weighting": CHOICE,
            "server_optimizer": optional(FUNCTION),
            "mu": NOT_NEGATIVE,
            "max_update_norm": optional(POSITIVE),
            "privacy": optional(PART),
            "robust": optional(PART),
            "attack": optional(PART),
            "federation": FEDERATION,
        }
    ),
    UserLevelPrivacy: Case(
        {
            "clip": POSITIVE,
            "noise_multiplier": POSITIVE,
            "delta": (0.0, 1.0, -0.1, *NUMBER),
            "clipping": CHOICE,
            "secret_seed": optional(COUNT_FROM_ZERO),
        },
        valid=lambda: {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5},
    ),
    GossipStrategy: Case(
        {
            "topology": TOPOLOGY,
            "gossip_steps": COUNT,
            "method": CHOICE,
            "compressor": ("topk", 3, 0.1),
            "gamma": GAMMA,
            "start": CHOICE,
            "proximal": ("l1", 3),
            "message_dtype": CHOICE,
            "max_update_norm": optional(POSITIVE),
            "robust": optional(PART),
            "attack": optional(PART),
            "federation": FEDERATION,
        }
    ),
    DFedSAMStrategy: Case({"topology": TOPOLOGY, "rho": RHO, "gossip_steps": COUNT, "federation": FEDERATION}),
    EControlStrategy: Case(
        {
            "compressor": ("topk", 3, 0.1),
            "error_feedback": CHOICE,
            "eta": (-0.1, 1.5, *optional(NUMBER)),
            "h0": CHOICE,
            "local_steps": optional(COUNT),
            "rounds_per_epoch": (*COUNT, "all"),
            "optimizer_state": optional(CHOICE),
            "server_optimizer": optional(FUNCTION),
            "federation": FEDERATION,
        }
    ),
    MoDeSTStrategy: Case(
        {
            "sample_size": COUNT,
            "num_aggregators": COUNT,
            "success_fraction": SHARE,
            "success_rounding": CHOICE,
            "aggregation_timeout": optional(SECONDS),
            "min_models": COUNT,
            "ping_timeout": SECONDS,
            "activity_window": optional(COUNT),
            "restart_timeout": SECONDS,
            "availability": optional(PART),
            "robust": optional(PART),
            "attack": optional(PART),
            "federation": FEDERATION,
        }
    ),
    Layout: Case(
        {"num_clients": COUNT, "num_ranks": COUNT, "ranks_per_client": COUNT}, valid=lambda: {"num_clients": 4}
    ),
    FullParticipation: Case(),
    UniformSample: Case({"size": optional(COUNT), "fraction": optional(SHARE)}, make=cohort),
    Proximal: Case(
        {"mu": NOT_NEGATIVE, "anchor": Fine("strategies give it, not users")},
        valid=lambda: {"mu": 1.0, "anchor": float},
    ),
    SharpnessAwareRule: Case(
        {
            "rho": RHO,
            "p": (1.0, 0.5, nan, "two", True, None),
            "adaptive": Fine("the callback gives it, not users"),
            "eta": NOT_NEGATIVE,
            "moves": Fine("the callback gives it, not users"),
            "falls_back": Fine("the callback gives it, not users"),
        }
    ),
    AlwaysOn: Case(),
    RandomChurn: Case(
        {"crash_rate": RATE, "return_rate": RATE, "leave_fraction": RATE, "unit": CHOICE},
        valid=lambda: {"crash_rate": 0.1, "return_rate": 0.5},
    ),
    AvailabilityTrace: Case({"path": PATH, "unit": CHOICE}, valid=lambda: {"path": "trace.csv"}),
    MembershipSchedule: Case({"joins": SCHEDULE, "leaves": SCHEDULE, "crashes": SCHEDULE}),
    Constant: Case({"value": (-1.0, nan, "much", True, None)}, valid=lambda: {"value": 1.0}),
    Uniform: Case({"low": NOT_NEGATIVE, "high": NOT_NEGATIVE}, valid=lambda: {"low": 0.1, "high": 0.2}),
    LogNormal: Case({"median": POSITIVE, "sigma": NOT_NEGATIVE}, valid=lambda: {"median": 1.0, "sigma": 0.5}),
    VirtualClock: Case(
        {
            "seconds_per_step": optional(NOT_NEGATIVE),
            "latency": optional(NOT_NEGATIVE),
            "bandwidth": (0.0, -1.0, nan, "much", True),
            "devices_csv": optional(PATH),
            "latency_csv": optional(PATH),
        }
    ),
}
