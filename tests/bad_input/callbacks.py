"""Bad settings of callbacks."""

from __future__ import annotations

from bad_input.bad_values import (
    CHOICE,
    COUNT,
    COUNT_FROM_TWO,
    COUNT_FROM_ZERO,
    FLAG,
    FUNCTION,
    NAME,
    NOT_NEGATIVE,
    NUMBER,
    PAIR,
    PART,
    PATH,
    Case,
    Catalogue,
    inf,
    nan,
    optional,
)

from lightning_fed.callbacks import (
    DiffusionMonitor,
    FederationMonitor,
    GenerativeMetrics,
    GeometryReport,
    Grokfast,
    NeuralCollapseMonitor,
    OrthogonalGradient,
    RoundProgressBar,
    SampleGrid,
    SharpnessAware,
    SharpnessMonitor,
)

DIRECTORY = optional(PATH)
NAMES = ("fc", 3)  # a text is a sequence of its letters
CATALOGUE: Catalogue = {
    DiffusionMonitor: Case({"bins": COUNT, "prefix": NAME, "directory": DIRECTORY, "plots": FLAG}),
    FederationMonitor: Case({"directory": DIRECTORY, "every_n_rounds": COUNT, "plots": FLAG}),
    GenerativeMetrics: Case(
        {
            "every_n_epochs": COUNT,
            "num": COUNT,
            "steps": optional(COUNT),
            "seed": COUNT_FROM_ZERO,
            "data": CHOICE,
            "max_batches": optional(COUNT),
            "batch_size": COUNT,
            "measures": ("mmd", 3, (), ("fid",), ("mmd", 3)),
            "extractor": CHOICE,
            "classifier": optional(PART),
            "prefix": NAME,
            "directory": DIRECTORY,
            "plots": FLAG,
        }
    ),
    GeometryReport: Case({"directory": DIRECTORY}),
    Grokfast: Case(
        {
            "filter": CHOICE,
            "alpha": (-0.1, 1.0, *NUMBER),
            "lamb": NOT_NEGATIVE,
            "window": COUNT,
            "warmup": optional(COUNT_FROM_ZERO),
            "stop_step": optional(COUNT_FROM_ZERO),
            "stop_monitor": optional(NAME),
            "stop_threshold": NUMBER,
        }
    ),
    NeuralCollapseMonitor: Case(
        {
            "head": optional(NAME),
            "layer": optional(NAME),
            "layers": (*NAMES, ["fc", 3], [""]),
            "every_n_epochs": COUNT,
            "data": CHOICE,
            "max_batches": optional(COUNT),
            "batch_size": optional(COUNT),
            "nearest_centre": FLAG,
            "split_batch": optional(FUNCTION),
            "pool": optional(FUNCTION),
            "decays": optional(PAIR),
            "prefix": NAME,
            "directory": DIRECTORY,
            "plots": FLAG,
        }
    ),
    OrthogonalGradient: Case({"rescale": FLAG}),
    RoundProgressBar: Case({"refresh_rate": COUNT_FROM_ZERO, "process_position": COUNT_FROM_ZERO, "leave": FLAG}),
    SampleGrid: Case(
        {
            "every_n_epochs": COUNT,
            "num": optional(COUNT),
            "steps": optional(COUNT),
            "seed": COUNT_FROM_ZERO,
            "class_labels": ("cat", 3, [], [-1], [1.5], ["cat"]),
            "prefix": NAME,
            "directory": DIRECTORY,
        }
    ),
    SharpnessAware: Case(
        {
            "rho": (-1.0, *NUMBER),
            "adaptive": FLAG,
            "eta": NOT_NEGATIVE,
            "p": (1.0, 0.5, nan, "two", True, None),
            "every_n_steps": COUNT,
            "reuse": NOT_NEGATIVE,
            "m_sharpness": FLAG,
            "parameters": ("some", 3, None, ["fc.*", 3]),
            "rho_schedule": optional(FUNCTION),
        }
    ),
    SharpnessMonitor: Case(
        {
            "every_n_epochs": COUNT,
            "num_batches": COUNT,
            "batch_size": optional(COUNT),
            "data": CHOICE,
            "rho": (0, -1.0, nan, inf, "small", True, None),
            "iterations": COUNT,
            "tolerance": (0.0, 1.0, -0.1, *NUMBER),
            "trace_samples": COUNT_FROM_TWO,
            "mode": CHOICE,
            "loss": optional(FUNCTION),
            "prefix": NAME,
        }
    ),
}
