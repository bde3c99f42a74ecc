"""Bad settings of modules, of networks, and of the parts of diffusion modules."""

from __future__ import annotations

from typing import Any

from bad_input.bad_values import (
    CHOICE,
    COUNT,
    COUNT_FROM_TWO,
    COUNT_FROM_ZERO,
    FLAG,
    NOT_NEGATIVE,
    NUMBER,
    PART,
    POSITIVE,
    SHARE,
    SHARE_BELOW_ONE,
    Case,
    Catalogue,
    inf,
    nan,
    optional,
)
from small_denoisers import unet_config
from small_distillations import teacher
from torch import Tensor, nn

from lightning_fed.modules import (
    MLP,
    ConsistencyTraining,
    DiffusionModule,
    DiffusionTraining,
    EquiangularHead,
    FDistill,
    ImageClassifier,
    ModularClassifier,
    SmallConvNet,
    StableMaxCrossEntropy,
)
from lightning_fed.modules.diffusion import (
    SIM,
    VSD,
    DensityRatio,
    DoublingPairs,
    EasyPairs,
    EDMDenoiser,
    EDMWeighting,
    FeatureDiscriminator,
    FixedPairs,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    KarrasUniform,
    LogNormal,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    ScoreWeighting,
    SiD,
    SoftenedReverseKL,
    SquaredHellinger,
    UniformWeighting,
    UniInstruct,
)

BETAS = ((0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, nan), ("a", "b"), 3, None)
NAMED = ("other", "", 3, None, {"name": "other"}, {"field": 1})
BOUNDS = ((0.1,), (2.0, 3.0), (-0.1, 3.0), (0.1, nan), (0.1, inf), ("low", "high"), 3)
EMA = optional(SHARE_BELOW_ONE)
LAYERS = ("mid_block", 3, None, ["nowhere"], [3])
SHAPE = ("wide", 3, (1, 8), (1, 8, 0), (1, 8, "8"))
SOURCE = (3, ["network"], "/nowhere/network", "nowhere.ckpt")
LEVELS: dict[str, Any] = {
    "sigma_data": optional(POSITIVE),
    "sigma_min": optional(POSITIVE),
    "sigma_max": optional(POSITIVE),
}
TEACHER = teacher()


class Teacher(nn.Module):
    """Small, because it is copied for every try."""

    sample_shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.mid_block, self.out = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.out(self.mid_block(x))


WITHOUT_SETTINGS = (
    EDMWeighting,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    ScoreWeighting,
    SoftenedReverseKL,
    SquaredHellinger,
    UniformWeighting,
)
CATALOGUE: Catalogue = {
    **{kind: Case() for kind in WITHOUT_SETTINGS},
    ImageClassifier: Case(
        {
            "model": ("nowhere", 3, None),
            "num_classes": COUNT_FROM_TWO,
            "in_channels": COUNT,
            "image_size": optional(COUNT),
            "pretrained": FLAG,
            "optimizer": CHOICE,
            "lr": NOT_NEGATIVE,
            "momentum": NOT_NEGATIVE,
            "weight_decay": NOT_NEGATIVE,
            "lr_decay_per_epoch": SHARE,
            "label_smoothing": SHARE_BELOW_ONE,
        }
    ),
    ModularClassifier: Case(
        {
            "p": COUNT_FROM_TWO,
            "embedding_size": COUNT,
            "hidden_size": COUNT,
            "lr": NOT_NEGATIVE,
            "weight_decay": NOT_NEGATIVE,
            "decoupled": FLAG,
            "loss": CHOICE,
        }
    ),
    SmallConvNet: Case({"num_classes": COUNT, "in_channels": COUNT}),
    MLP: Case({"num_classes": COUNT, "in_channels": COUNT, "image_size": COUNT, "hidden_size": COUNT}),
    EquiangularHead: Case(
        {"num_features": COUNT, "num_classes": COUNT_FROM_TWO, "scale": POSITIVE, "seed": COUNT_FROM_ZERO},
        valid=lambda: {"num_features": 4, "num_classes": 3},
    ),
    StableMaxCrossEntropy: Case({"reduction": CHOICE, "dtype": CHOICE}),
    DiffusionModule: Case({"denoiser": PART, "ema_decay": EMA}, valid=lambda: {"denoiser": TEACHER, "ema_decay": None}),
    EDMDenoiser: Case(
        {
            "network": PART,
            "sigma_data": POSITIVE,
            "sigma_min": (80.0, *POSITIVE),
            "sigma_max": (0.002, *POSITIVE),
            "time_embedding": CHOICE,
            "boundary": FLAG,
        },
        valid=lambda: {"network": TEACHER.network},
    ),
    DensityRatio: Case({"bounds": BOUNDS, "bins": COUNT_FROM_ZERO, "rate": SHARE_BELOW_ONE}),
    DiffusionTraining: Case(
        {
            "network": (*SOURCE, None, {"_class_name": "UNet"}),
            **LEVELS,
            "time_embedding": optional(CHOICE),
            "noise": NAMED,
            "weighting": NAMED,
            "lr": NOT_NEGATIVE,
            "betas": BETAS,
            "warmup_steps": COUNT_FROM_ZERO,
            "ema_decay": EMA,
            "sampling_steps": COUNT,
            "sampler": CHOICE,
        },
        valid=lambda: {"network": unet_config()},
    ),
    ConsistencyTraining: Case(
        {
            "network": (*SOURCE, {"_class_name": "UNet"}),
            "teacher": SOURCE,
            **LEVELS,
            "time_embedding": optional(CHOICE),
            "pairs": NAMED,
            "huber_c": optional(NOT_NEGATIVE),
            "total_steps": optional(COUNT),
            "lr": NOT_NEGATIVE,
            "betas": BETAS,
            "ema_decay": EMA,
            "sampling_sigmas": ("some", 3, None, (100.0,), (1.0, 2.0), (nan,), ("one",)),
        },
        valid=lambda: {"network": unet_config()},
    ),
    FDistill: Case(
        {
            "teacher": (*SOURCE, None),
            "student": SOURCE,
            "fake_score": SOURCE,
            "discriminator": ("nowhere", 3),
            **LEVELS,
            "time_embedding": optional(CHOICE),
            "divergence": NAMED,
            "objective": NAMED,
            "noise": NAMED,
            "fake_noise": optional(NAMED),
            "fake_weighting": NAMED,
            "ratio_bounds": BOUNDS,
            "ratio_bins": COUNT_FROM_ZERO,
            "ratio_rate": SHARE_BELOW_ONE,
            "features": CHOICE,
            "feature_layers": LAYERS,
            "shape": SHAPE,
            "gan_weight": NOT_NEGATIVE,
            "r1_weight": NOT_NEGATIVE,
            "r1_scale": NOT_NEGATIVE,
            "student_every": (1, *COUNT),
            "lr": POSITIVE,
            "fake_lr": optional(POSITIVE),
            "discriminator_lr": optional(POSITIVE),
            "betas": BETAS,
            "weight_decay": NOT_NEGATIVE,
            "accumulate": COUNT,
            "gradient_clip": optional(POSITIVE),
            "ema_decay": EMA,
        },
        valid=lambda: {"teacher": Teacher()},
    ),
    FeatureDiscriminator: Case(
        {"denoiser": PART, "layers": LAYERS, "shape": SHAPE}, valid=lambda: {"denoiser": TEACHER}
    ),
    LogNormal: Case({"mean": NUMBER, "std": POSITIVE}),
    KarrasUniform: Case({"low": (1.5, *NOT_NEGATIVE), "high": (0.0, 1.5, *NOT_NEGATIVE), "steps": COUNT_FROM_TWO}),
    DoublingPairs: Case(
        {"smallest": (2000, *COUNT), "largest": (5, *COUNT), "mean": NUMBER, "std": POSITIVE},
    ),
    FixedPairs: Case({"levels": COUNT_FROM_TWO}),
    EasyPairs: Case({"q": COUNT_FROM_TWO, "stages": COUNT, "mean": NUMBER, "std": POSITIVE}),
    VSD: Case({"weight": CHOICE}),
    SIM: Case({"weight": CHOICE}),
    SiD: Case({"alpha": NUMBER, "weight": CHOICE}),
    UniInstruct: Case({"weight": CHOICE, "drop_fgm": FLAG}),
}
