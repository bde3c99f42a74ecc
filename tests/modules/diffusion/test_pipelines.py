"""What is exported draws the same images in plain diffusers, also in a process that has nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from federations import silent_trainer
from small_denoisers import CLASSES, LinearNetwork, batches, dit_config, unet_config
from torch import Tensor

from lightning_fed.modules.diffusion import DiffusionModule, DiffusionTraining, EDMDenoiser, load_denoiser
from lightning_fed.modules.diffusion.pipelines import (
    GRID,
    PipelineCalls,
    consistency_call,
    grid_sigma,
    grid_timestep,
    pipeline_of,
    save_pipeline,
    saved_calls,
)
from lightning_fed.modules.diffusion.sampling import consistency_steps

NUM, SEED = 5, 3


class Consistency(DiffusionModule):
    """Any network as a consistency model of one, two or three steps."""

    sigmas = (0.821, 0.1)

    def draw(
        self,
        denoiser: EDMDenoiser,
        noise: Tensor,
        class_labels: Tensor | None,
        steps: int | None,
        source: torch.Generator,
    ) -> Tensor:
        further = [grid_sigma(denoiser, grid_timestep(denoiser, sigma)) for sigma in self.sigmas[: (steps or 1) - 1]]
        return consistency_steps(denoiser, noise, class_labels, further, source)

    def pipeline_calls(self) -> PipelineCalls:
        return {n: consistency_call(self.denoiser, self.sigmas[: n - 1]) for n in (1, 2, 3)}


@cache
def trained(dtype: torch.dtype = torch.float32, **settings: Any) -> DiffusionTraining:
    """A U-Net that has done a few steps, sampled from by Euler's method."""
    torch.manual_seed(0)
    module = DiffusionTraining(
        unet_config(dropout=0.2, **settings), sigma_data=0.6, sampler="euler", sampling_steps=6, lr=3e-3
    )
    precision = "64-true" if dtype == torch.float64 else "32-true"
    silent_trainer("auto", max_epochs=4, precision=precision).fit(module, batches(channels=module_channels(module)))
    return module


def module_channels(module: DiffusionTraining) -> int:
    return module.denoiser.sample_shape[0]  # type: ignore[index]


@cache
def consistency(**settings: Any) -> Consistency:
    network = trained(**settings).denoiser.network
    levels = {"sigma_data": 0.6, "time_embedding": "consistency", "boundary": True}
    return Consistency(EDMDenoiser(network, **levels), ema_decay=None)  # type: ignore[arg-type]


def shown(images: Tensor) -> Tensor:
    """As a pipeline shows them."""
    return (images / 2 + 0.5).clamp(0, 1)


def drawn(pipeline: Any, call: dict[str, Any], **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(SEED)
    return pipeline(batch_size=NUM, generator=source, output_type="pt", **call, **arguments).images


@pytest.mark.parametrize("classes", [None, CLASSES])
@pytest.mark.parametrize("make", [trained, consistency])
def test_a_folder_draws_the_same_images(make: Any, classes: int | None, tmp_path: Path) -> None:
    module = make() if classes is None else make(num_class_embeds=classes)
    module.save_pretrained(tmp_path)
    labels = {} if classes is None else {"class_labels": torch.arange(NUM) % classes}
    for steps, call in module.pipeline_calls().items():
        loaded: Any = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path))
        expected = shown(module.sample(NUM, steps=steps, seed=SEED))
        assert (drawn(loaded, call, **labels) - expected).abs().max() <= 1e-5
        assert (drawn(module.to_pipeline(), call, **labels) - expected).abs().max() <= 1e-5
        assert expected.std() > 0.05 and (expected == 0).float().mean() < 0.9
        if labels:
            other = drawn(loaded, call, class_labels=(torch.arange(NUM) + 1) % CLASSES)
            assert (other - expected).abs().max() > 1e-3


PLAIN = """
import sys, json, torch
from diffusers import DiffusionPipeline
for folder, jobs in json.load(sys.stdin).items():
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for name, call in jobs.items():
        if "class_labels" in call:
            call["class_labels"] = torch.tensor(call["class_labels"])
        source = torch.Generator().manual_seed(call.pop("seed"))
        images = pipeline(generator=source, output_type="pt", **call).images
        torch.save(images, f"{folder}/{name}.pt")
assert not [name for name in sys.modules if name.startswith("lightning")]
"""


@pytest.mark.slow
def test_a_process_that_has_only_diffusers_draws_the_same_images(tmp_path: Path) -> None:
    modules = {
        "euler": trained(),
        "euler_of_classes": trained(num_class_embeds=CLASSES),
        "consistency": consistency(),
        "consistency_of_classes": consistency(num_class_embeds=CLASSES),
    }
    jobs: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        folder = tmp_path / name
        module.save_pretrained(folder)
        labels = {"class_labels": [i % CLASSES for i in range(NUM)]} if name.endswith("classes") else {}
        calls = module.pipeline_calls()
        jobs[str(folder)] = {
            f"{steps}": {"batch_size": NUM, "seed": SEED, **labels, **call} for steps, call in calls.items()
        }
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, "-c", PLAIN],
        input=json.dumps(jobs),
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    compared = 0
    for name, module in modules.items():
        for steps in module.pipeline_calls():
            images = torch.load(tmp_path / name / f"{steps}.pt", weights_only=True)
            assert (images - shown(module.sample(NUM, steps=steps, seed=SEED))).abs().max() <= 1e-5
            compared += 1
    assert compared == 8


def test_the_average_is_exported_unless_told_otherwise() -> None:
    module = trained()
    averaged, last = (dict(module.to_pipeline(average).unet.state_dict()) for average in (True, False))  # type: ignore[attr-defined]
    for name, value in module.average.module.network.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(averaged[name], value)
    assert all(torch.equal(last[name], value) for name, value in module.denoiser.network.state_dict().items())
    assert any(not torch.equal(last[name], averaged[name]) for name in last)


def test_a_pipeline_has_weights_of_its_own_and_no_dropout() -> None:
    module = trained()
    unet: Any = module.to_pipeline(average=False).unet  # type: ignore[attr-defined]
    assert not unet.training and module.denoiser.network.training
    with torch.no_grad():
        next(unet.parameters()).zero_()
    assert next(module.denoiser.network.parameters()).abs().sum() > 0


def test_training_in_float64_is_exported_in_float32(tmp_path: Path) -> None:
    """A pipeline would draw other noise in another precision."""
    module = trained(torch.float64)
    assert next(module.denoiser.parameters()).dtype == torch.float64
    module.save_pretrained(tmp_path)
    (call,) = module.pipeline_calls().values()
    for pipeline in (module.to_pipeline(), diffusers.DiffusionPipeline.from_pretrained(str(tmp_path))):
        assert (drawn(pipeline, call) - shown(module.sample(NUM, seed=SEED))).abs().max() <= 1e-5
    assert next(module.denoiser.parameters()).dtype == torch.float64


@pytest.mark.parametrize("make", [trained, consistency])
def test_in_bfloat16_the_images_are_nearly_the_same(make: Any, tmp_path: Path) -> None:
    """From the same noise, which a pipeline takes for three channels only: its own would be another one."""
    module = make(in_channels=3, out_channels=3)
    module.save_pretrained(tmp_path)
    z = torch.randn(NUM, 3, 8, 8, generator=torch.Generator().manual_seed(SEED))
    (_, call), *_ = module.pipeline_calls().items()
    exact = drawn(diffusers.DiffusionPipeline.from_pretrained(str(tmp_path)), call, latents=z)
    assert (exact - shown(module.sample(NUM, seed=SEED))).abs().max() <= 1e-5
    halved: Any = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16)
    assert halved.unet.dtype == torch.bfloat16
    images = drawn(halved, call, latents=z).float()
    assert 0 < (images - exact).abs().mean() < 0.02
    halved.save_pretrained(tmp_path / "halved")
    again = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "halved"), torch_dtype=torch.bfloat16)
    assert torch.equal(drawn(again, call, latents=z).float(), images)


def test_a_folder_starts_another_module(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    again = DiffusionTraining(str(tmp_path), sampler="euler", sampling_steps=6)
    assert again.denoiser.settings == trained().denoiser.settings
    # Not to the bit: weights that are read from a file lie elsewhere in memory.
    assert (again.sample(NUM, seed=SEED) - trained().sample(NUM, seed=SEED)).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------------- noise levels


def test_the_grid_is_that_of_the_scheduler() -> None:
    denoiser = consistency().denoiser
    scheduler: Any = pipeline_of(denoiser).scheduler
    assert (grid_timestep(denoiser, 80.0), grid_timestep(denoiser, 0.002)) == (0, GRID - 1)
    # The papers' second step, for CIFAR-10 and for ImageNet-64.
    assert grid_timestep(denoiser, 0.821) == 788 and round(grid_sigma(denoiser, 788), 4) == 0.8209
    assert consistency_call(denoiser, (0.821,)) == {"num_inference_steps": None, "timesteps": [788, 0]}
    assert consistency_call(denoiser, ()) == {"num_inference_steps": 1}
    scheduler.set_timesteps(**{**consistency_call(denoiser, (0.821, 0.1)), "num_inference_steps": None})
    expected = [80.0, *(grid_sigma(denoiser, grid_timestep(denoiser, sigma)) for sigma in (0.821, 0.1)), 0.002]
    np.testing.assert_allclose(scheduler.sigmas, expected, rtol=1e-6)
    for sigma in (0.0021, 0.1, 1.526, 40.0):
        assert abs(grid_sigma(denoiser, grid_timestep(denoiser, sigma)) / sigma - 1) < 0.01


# --------------------------------------------------------------------------------------------------------- model card


@pytest.mark.parametrize("make", [trained, consistency])
def test_the_model_card_says_how_to_draw(make: Any, tmp_path: Path) -> None:
    module = make(num_class_embeds=CLASSES)
    module.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "diffusers" and type(module).__name__ in head["tags"]
    assert saved_calls(tmp_path) == module.pipeline_calls()
    assert "| `sigma_data`, of pixels in [-1, 1] | 0.6 |" in card and "0.002 to 80.0" in card
    assert f"| classes | {CLASSES} |" in card
    is_consistency = make is consistency
    assert ("`timesteps=[788, 0]` is a step at 80 and one at\n0.8209." in card) == is_consistency
    if is_consistency:
        assert "2 with `num_inference_steps=None, timesteps=[788, 0]`" in card
        assert "would take its second step at\n2.5152" in card
    else:
        assert "6 with `num_inference_steps=6`" in card
    # Its example runs.
    (example,) = card.split("```python\n")[1].split("```")[:1]
    space: dict[str, Any] = {}
    exec(example.replace("this folder", str(tmp_path)), space)
    assert len(space["images"]) == 16


def test_a_folder_without_a_card_says_nothing(tmp_path: Path) -> None:
    assert saved_calls(tmp_path) == {}
    (tmp_path / "README.md").write_text("# Somebody's model\n")
    assert saved_calls(tmp_path) == {}


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: DiffusionTraining(unet_config(), time_embedding="consistency"),
            "time_embedding='consistency' with boundary=False: diffusers has no scheduler",
        ),
        (
            lambda: Consistency(load_denoiser(unet_config(), boundary=True), None),
            "time_embedding='edm' with boundary=True: diffusers has no scheduler",
        ),
        (lambda: DiffusionTraining(dit_config()), "the network is a DiTTransformer2DModel: .* take a UNet2DModel only"),
        (lambda: DiffusionTraining(LinearNetwork()), "the network is a LinearNetwork"),
        (lambda: DiffusionTraining(unet_config(sample_size=None)), "the network has sample_size=None: .* squares"),
        (
            lambda: DiffusionTraining(unet_config(sample_size=[8, 4])),
            r"sample_size=\[8, 4\]: .* squares",
        ),
    ],
)
def test_what_diffusers_could_not_draw_is_refused_before_anything_is_written(
    make: Any, says: str, tmp_path: Path
) -> None:
    module = make()
    with pytest.raises(ValueError, match=says):
        module.to_pipeline()
    with pytest.raises(ValueError, match=says):
        module.save_pretrained(tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_square_that_is_given_as_two_sides() -> None:
    module = DiffusionTraining(unet_config(sample_size=[8, 8]), sampler="euler", sampling_steps=6)
    images = drawn(module.to_pipeline(), {"num_inference_steps": 6})
    assert (images - shown(module.sample(NUM, seed=SEED))).abs().max() <= 1e-5


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "export").write_text("mine")
    with pytest.raises(ValueError, match=r"folder='.*export' is a file"):
        save_pipeline(trained().denoiser, tmp_path / "export", {}, "nobody")
    assert (tmp_path / "export").read_text() == "mine"
