"""``lightning-fed sample``: a picture of what a trained generator draws.

From a checkpoint, and as a folder for diffusers::

    lightning-fed sample --checkpoint run.ckpt --num 64 --out grid.png --export generator

From that folder, or any other of a diffusers pipeline that draws images without a text::

    lightning-fed sample --checkpoint generator --num 10 --labels 0 1 2 --out grid.png

The same seed gives the same images of both, where the module samples by a method that diffusers has.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from lightning_fed.modules.diffusion.diffusion_module import CLASS_KEY, DiffusionModule
from lightning_fed.modules.diffusion.pipelines import saved_calls
from lightning_fed.modules.diffusion.pretrained import read_checkpoint

# Of Euler's method, for a pipeline that does not say: as many steps as EDM's own sampler takes for CIFAR-10.
EULER_STEPS = 18


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-fed sample``; returns the exit status.

    Args:
        arguments: what follows ``sample``; None for those of the process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    drawn: dict[str, Any] = {name: getattr(options, name) for name in ("num", "steps", "seed")}
    try:
        _check(options)
        labels = None if options.labels is None else _turns(options.labels, options.num)
        device = _device(options.device)
        if Path(options.checkpoint).is_dir():
            images = from_folder(options.checkpoint, class_labels=labels, device=device, **drawn)
        else:
            module = load_module(options.checkpoint).to(device)
            if options.export is not None:
                module.save_pretrained(options.export)
            images = module.sample(class_labels=labels, **drawn)
        save_grid(images, options.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{'images:':<13}{options.out}")
    if options.export is not None:
        print(f"{'pipeline:':<13}{options.export}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-fed sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint (.ckpt), or a folder of a diffusers pipeline")
    parser.add_argument("--out", required=True, help="the picture, a .png; its folder is made")
    parser.add_argument("--num", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: those that the model was made for)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--labels", type=int, nargs="+", help="classes, which take turns (default: all)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    parser.add_argument("--export", help="also write the folder of a diffusers pipeline here; of a checkpoint only")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded."""
    if options.num < 1:
        raise ValueError(f"--num {options.num}: it must be at least 1.")
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps {options.steps}: it must be at least 1.")
    if Path(options.out).suffix.lower() != ".png":
        raise ValueError(f"--out {options.out}: its name must end in .png.")
    if Path(options.out).is_dir():
        raise ValueError(f"--out {options.out} is a folder: name a file in it.")
    if options.export is not None and Path(options.checkpoint).is_dir():
        raise ValueError(f"--export {options.export}: {options.checkpoint} is a folder of diffusers already.")
    folder = Path(options.out).parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {options.out}: nothing can be written in {folder}.")


def _turns(labels: Sequence[int], num: int) -> list[int]:
    return [labels[image % len(labels)] for image in range(num)]


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def load_module(path: str | Path) -> DiffusionModule:
    """The module that a checkpoint holds, on the CPU, loaded without running code.

    Its class is the one that the checkpoint names, among those of this package and others that are imported.

    Raises:
        ValueError: if there is no such file, or it holds no such module.
    """
    checkpoint = read_checkpoint(path, "checkpoint")
    name, known = checkpoint.get(CLASS_KEY), diffusion_modules()
    if name not in known:
        raise ValueError(
            f"checkpoint={str(path)!r} holds {name or 'no diffusion module'}: samples are drawn from one of "
            f"{', '.join(sorted(known))}, or of a module that derives from DiffusionModule and is imported."
        )
    try:
        return known[name].load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"checkpoint={str(path)!r} of {name} cannot be loaded here: {error} In Python, "
            f"{name}.load_from_checkpoint(path, ...) takes what is missing."
        ) from error


def diffusion_modules() -> dict[str, type[DiffusionModule]]:
    """The classes that are known to derive from :class:`DiffusionModule`, by name."""
    found: dict[str, type[DiffusionModule]] = {}
    families = [DiffusionModule]
    while families:
        for derived in families.pop().__subclasses__():
            found[derived.__name__] = derived
            families.append(derived)
    return found


def from_folder(
    folder: str | Path,
    num: int,
    class_labels: Sequence[int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw with the pipeline of a folder, as plain diffusers does.

    Args:
        folder: of a pipeline that draws images without a text.
        num: images, B.
        class_labels: ``[B]`` for a network that knows classes; by default they take turns.
        steps: of its scheduler; None for what its model card says (see
            :meth:`~lightning_fed.modules.diffusion.DiffusionModule.pipeline_calls`), or else one step of a consistency
            model and 18 of another one.
        seed: of the noise, which is drawn on the CPU.
        device: to draw on.

    Returns:
        ``[B, C, H, W]`` in [-1, 1], on the CPU.

    Raises:
        ValueError: if the folder is incomplete, or its pipeline is not such a one.
    """
    pipeline = _pipeline(folder, device)
    calls = saved_calls(folder)
    if steps is None:
        is_consistency = type(pipeline.scheduler).__name__ == "CMStochasticIterativeScheduler"
        steps = next(iter(calls), 1 if is_consistency else EULER_STEPS)
    call = dict(calls.get(steps, {"num_inference_steps": steps}))
    classes = pipeline.unet.config.num_class_embeds
    if classes is None and class_labels is not None:
        raise ValueError("class_labels were given, but the network knows no classes.")
    if classes is not None:
        labels = _turns(range(classes), num) if class_labels is None else list(class_labels)
        if len(labels) != num or not 0 <= min(labels) <= max(labels) < classes:
            raise ValueError(f"class_labels={labels} must be {num} integers in 0 .. {classes - 1}.")
        call["class_labels"] = torch.tensor(labels)
    source = torch.Generator().manual_seed(seed)
    return pipeline(batch_size=num, generator=source, output_type="pt", **call).images.float().cpu() * 2 - 1


def _pipeline(folder: str | Path, device: torch.device | str) -> Any:
    """The pipeline of a folder."""
    if not Path(folder, "model_index.json").is_file():
        raise ValueError(
            f"checkpoint={str(folder)!r} is no folder of a diffusers pipeline: it has no model_index.json."
        )
    kind = diffusers.DiffusionPipeline.load_config(str(folder)).get("_class_name")
    if kind != "ConsistencyModelPipeline":
        raise ValueError(
            f"checkpoint={str(folder)!r} is a {kind}: only a ConsistencyModelPipeline, as this package writes them, "
            "is drawn from here. Call others in Python."
        )
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), low_cpu_mem_usage=False)
    except Exception as error:
        raise ValueError(f"checkpoint={str(folder)!r} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def save_grid(images: Tensor, path: str | Path) -> None:
    """Write images ``[B, C, H, W]`` in [-1, 1] as one PNG, in rows of about as many as there are rows.

    Raises:
        ValueError: if a PNG cannot show them.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"samples are {list(images.shape[1:])} each: a picture needs one channel or three.")
    pixels = (images.float().cpu() / 2 + 0.5).clamp(0, 1)
    grid = make_grid(pixels, nrow=math.ceil(math.sqrt(len(images))))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(grid).save(path)
