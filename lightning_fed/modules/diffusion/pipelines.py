"""From a denoiser to a pipeline that needs nothing but diffusers, and the folder that it is kept in."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from lightning_fed.modules.diffusion.denoiser import EDMDenoiser
from lightning_fed.modules.diffusion.noise import karras_positions, karras_sigmas

# Levels of the exported scheduler's grid: those of improved consistency training at the end of its curriculum, of which
# neighbours differ by less than 2 %.
GRID = 1281
MODEL_CARD = "README.md"
# Begins the line of the model card's head that says how the pipeline is called: JSON, which YAML reads too.
CALLS_KEY = "pipeline_calls"

# The arguments with which a pipeline is called, by the number of its steps. The first is the one that is meant.
PipelineCalls = dict[int, dict[str, Any]]


def pipeline_of(denoiser: EDMDenoiser) -> diffusers.DiffusionPipeline:
    """The pipeline that draws what this denoiser draws, with a copy of its weights, in evaluation mode.

    ============================ ==================================== ===========================================
    time_embedding, boundary     scheduler                            steps
    ============================ ==================================== ===========================================
    ``"consistency"``, True      ``CMStochasticIterativeScheduler``   1, or several by ``timesteps=[index, 0]``
    ``"edm"``, False             ``EDMEulerScheduler``                1, or Euler's method on the probability flow
    ============================ ==================================== ===========================================

    Weights in float64 become float32, in which modules draw their noise: a pipeline draws it in the precision of its
    weights, and in another precision it is other noise.

    Raises:
        ValueError: for any other denoiser, or a network that the pipeline cannot use: diffusers would draw other
            images, or none.
    """
    noise = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max, "sigma_data": denoiser.sigma_data}
    scheduler: Any
    if denoiser.time_embedding == "consistency" and denoiser.boundary:
        # Data may lie outside of [-1, 1], and what a second step starts from is not clipped in training either.
        scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=GRID, clip_denoised=False, **noise)
    elif denoiser.time_embedding == "edm" and not denoiser.boundary:
        scheduler = diffusers.EDMEulerScheduler(**noise)
    else:
        raise ValueError(
            f"time_embedding={denoiser.time_embedding!r} with boundary={denoiser.boundary}: diffusers has no scheduler "
            "for it. Consistency models need time_embedding='consistency', other denoisers 'edm', from the start."
        )
    # Diffusers makes its classes when they are first used, unseen by type checkers.
    pipeline: Any = diffusers.ConsistencyModelPipeline
    return pipeline(_network_for_pipeline(denoiser), scheduler)


def _network_for_pipeline(denoiser: EDMDenoiser) -> nn.Module:
    network: Any = denoiser.network
    shape, is_unet = denoiser.sample_shape, type(network) is diffusers.UNet2DModel
    if not is_unet:
        raise ValueError(
            f"the network is a {type(network).__name__}: among the pipelines of diffusers, those that are not for text "
            "or latents take a UNet2DModel only. Sample from the module itself."
        )
    if shape is None or shape[1] != shape[2]:
        raise ValueError(
            f"the network has sample_size={network.config['sample_size']!r}: the pipeline of diffusers draws squares "
            "of a known size. Make the network with such a sample_size, or sample from the module itself."
        )
    network = copy.deepcopy(network).eval()
    network.register_to_config(sample_size=shape[1])
    return network.float() if network.dtype == torch.float64 else network


def grid_timestep(denoiser: EDMDenoiser, sigma: float) -> int:
    """The nearest timestep of the exported consistency model: an index, from 0 at sigma_max to 1,280 at sigma_min."""
    position = karras_positions(torch.tensor(sigma, dtype=torch.float64), denoiser.sigma_min, denoiser.sigma_max)
    return round((1 - float(position)) * (GRID - 1))


def grid_sigma(denoiser: EDMDenoiser, timestep: int) -> float:
    """The noise level of a timestep of the exported consistency model; see :func:`grid_timestep`."""
    position = torch.tensor(1 - timestep / (GRID - 1), dtype=torch.float64)
    return float(karras_sigmas(position, denoiser.sigma_min, denoiser.sigma_max))


def consistency_call(denoiser: EDMDenoiser, sigmas: Sequence[float]) -> dict[str, Any]:
    """The call of an exported consistency model with further steps at the nearest of its noise levels."""
    if not sigmas:
        return {"num_inference_steps": 1}
    # Diffusers takes indices in descending order, and goes through them in ascending order.
    return {"num_inference_steps": None, "timesteps": [*sorted(grid_timestep(denoiser, s) for s in sigmas)[::-1], 0]}


def model_card(denoiser: EDMDenoiser, calls: PipelineCalls, trained_by: str) -> str:
    """What the README of an exported folder says: how to draw images, and what was trained."""
    arguments = ["batch_size=16", "generator=torch.Generator().manual_seed(0)"]
    if denoiser.num_classes is not None:
        arguments.insert(1, f"class_labels=torch.arange(16) % {denoiser.num_classes}")
    meant, *others = [", ".join(f"{name}={value}" for name, value in call.items()) for call in calls.values()]
    evaluations = ", ".join(f"{steps} with `{text}`" for steps, text in zip(calls, [meant, *others]))
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [lightning_fed, {trained_by}]
{CALLS_KEY}: {json.dumps(calls)}
---

# Image generator trained by `{trained_by}`

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder")
images = pipeline({", ".join([*arguments, meant])}).images
```

| setting | value |
| --- | --- |
| images (channels, height, width) | {denoiser.sample_shape} |
| classes | {denoiser.num_classes or "none"} |
| `sigma_data`, of pixels in [-1, 1] | {denoiser.sigma_data} |
| noise levels `sigma_min` to `sigma_max` | {denoiser.sigma_min} to {denoiser.sigma_max} |
| time that the network is told | {"250 log sigma" if denoiser.time_embedding == "consistency" else "log(sigma) / 4"} |
| evaluations of the network | {evaluations} |
{_on_steps(denoiser)}"""


def _on_steps(denoiser: EDMDenoiser) -> str:
    if not denoiser.boundary:
        return ""
    timestep = grid_timestep(denoiser, 0.821)
    return f"""
Timesteps are indices of {GRID} noise levels, from 0 (`sigma_max`) to {GRID - 1} (`sigma_min`), and the one named last
comes first: `timesteps=[{timestep}, 0]` is a step at {denoiser.sigma_max:g} and one at
{grid_sigma(denoiser, timestep):.4f}. `num_inference_steps=2` would take its second step at
{grid_sigma(denoiser, GRID // 2):.4f}.
"""


def save_pipeline(denoiser: EDMDenoiser, folder: str | Path, calls: PipelineCalls, trained_by: str) -> None:
    """Write the folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads, with a model card.

    Raises:
        ValueError: before anything is written, if ``folder`` is a file or diffusers has no pipeline for the denoiser.
    """
    if Path(folder).is_file():
        raise ValueError(f"folder={str(folder)!r} is a file: name a folder.")
    pipeline: Any = pipeline_of(denoiser)
    pipeline.save_pretrained(folder)
    Path(folder, MODEL_CARD).write_text(model_card(denoiser, calls, trained_by), encoding="utf-8")


def saved_calls(folder: str | Path) -> PipelineCalls:
    """How an exported folder's model card says that its pipeline is called; empty if it does not."""
    card = Path(folder, MODEL_CARD)
    for line in card.read_text(encoding="utf-8").splitlines() if card.is_file() else []:
        if line.startswith(f"{CALLS_KEY}: "):
            calls = json.loads(line.removeprefix(f"{CALLS_KEY}: "))
            return {int(steps): call for steps, call in calls.items()}
    return {}
