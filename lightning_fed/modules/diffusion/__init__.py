"""Diffusion models and their distillation into one-step generators, on any image network of diffusers."""

from lightning_fed.modules.diffusion.consistency_training import ConsistencyTraining
from lightning_fed.modules.diffusion.denoiser import EDMDenoiser
from lightning_fed.modules.diffusion.density_ratio import DensityRatio
from lightning_fed.modules.diffusion.diffusion_module import DiffusionModule
from lightning_fed.modules.diffusion.diffusion_training import DiffusionTraining
from lightning_fed.modules.diffusion.discriminator import FeatureDiscriminator
from lightning_fed.modules.diffusion.divergences import (
    Divergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    SoftenedReverseKL,
    SquaredHellinger,
)
from lightning_fed.modules.diffusion.f_distill import FDistill
from lightning_fed.modules.diffusion.noise import (
    EDMWeighting,
    KarrasUniform,
    LogNormal,
    NoiseDistribution,
    ScoreWeighting,
    UniformWeighting,
    Weighting,
)
from lightning_fed.modules.diffusion.noise_pairs import DoublingPairs, EasyPairs, FixedPairs, NoisePairs
from lightning_fed.modules.diffusion.objectives import SIM, VSD, Objective, SiD, UniInstruct
from lightning_fed.modules.diffusion.pretrained import load_denoiser

__all__ = [
    "SIM",
    "VSD",
    "ConsistencyTraining",
    "DensityRatio",
    "DiffusionModule",
    "DiffusionTraining",
    "Divergence",
    "DoublingPairs",
    "EDMDenoiser",
    "EDMWeighting",
    "EasyPairs",
    "FDistill",
    "FeatureDiscriminator",
    "FixedPairs",
    "ForwardKL",
    "Jeffreys",
    "JensenShannon",
    "KarrasUniform",
    "LogNormal",
    "NeymanChi2",
    "NoiseDistribution",
    "NoisePairs",
    "Objective",
    "PearsonChi2",
    "ReverseKL",
    "ScoreWeighting",
    "SiD",
    "SoftenedReverseKL",
    "SquaredHellinger",
    "UniInstruct",
    "UniformWeighting",
    "Weighting",
    "load_denoiser",
]
