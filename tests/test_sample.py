"""``lightning-fed sample``: from checkpoints and folders to a picture, and what it says where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from federations import Classifier, loaders, samples, silent_trainer
from PIL import Image
from small_denoisers import CLASSES, LinearNetwork, batches, unet_config
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from lightning_fed.cli import main
from lightning_fed.modules.diffusion import DiffusionModule, DiffusionTraining
from lightning_fed.sample import diffusion_modules, load_module, save_grid


class OfAUser(DiffusionTraining):
    """A module that is not of this package."""


def checkpoint(path: Path, kind: type[DiffusionTraining] = DiffusionTraining, **settings: Any) -> Any:
    """Train for a moment and save; returns the module."""
    torch.manual_seed(0)
    network = unet_config(**settings)
    module = kind(network, sigma_data=0.6, sampler="euler", sampling_steps=4, lr=3e-3)
    trainer = silent_trainer("auto", max_epochs=2)
    trainer.fit(module, batches(channels=settings.get("in_channels", 1)))
    trainer.save_checkpoint(path)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A folder with checkpoints ``run.ckpt`` and ``classes.ckpt``, and the pipeline of the latter in ``folder``."""
    place = tmp_path_factory.mktemp("trained")
    checkpoint(place / "run.ckpt")
    checkpoint(place / "classes.ckpt", num_class_embeds=CLASSES).save_pretrained(place / "folder")
    return place


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["sample", *map(str, arguments)])
    return ended.value.code  # type: ignore[return-value]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def grid_of(images: torch.Tensor, columns: int) -> np.ndarray:
    grid = make_grid((images / 2 + 0.5).clamp(0, 1), nrow=columns)
    return (grid * 255).permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------------------ pictures


def test_a_grid_of_a_checkpoint(place: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "grid.png"
    assert run("--checkpoint", place / "run.ckpt", "--num", 7, "--out", out, "--seed", 5) == 0
    assert capsys.readouterr().out == f"images:      {out}\n"
    module = DiffusionTraining.load_from_checkpoint(place / "run.ckpt", weights_only=True)
    expected = grid_of(module.sample(7, seed=5), columns=3)
    assert pixels(out).shape == expected.shape == (3 * 10 + 2, 3 * 10 + 2, 3)
    assert np.abs(pixels(out) - expected).max() <= 1
    assert pixels(out).std() > 10


def test_options_reach_the_sampler(place: Path, tmp_path: Path) -> None:
    module = DiffusionTraining.load_from_checkpoint(place / "classes.ckpt", weights_only=True)
    drawn = {}
    for name, options, arguments in (
        ("plain", [], {"seed": 0}),
        ("seed", ["--seed", 1], {"seed": 1}),
        ("steps", ["--steps", 2], {"seed": 0, "steps": 2}),
        ("labels", ["--labels", 2, 1], {"seed": 0, "class_labels": [2, 1, 2, 1, 2]}),
    ):
        for source in ("classes.ckpt", "folder"):
            out = tmp_path / f"{name}.png"
            assert run("--checkpoint", place / source, "--num", 5, "--out", out, "--device", "cpu", *options) == 0
            drawn[name] = pixels(out)
            assert np.abs(drawn[name] - grid_of(module.sample(5, **arguments), 3)).max() <= 1, (name, source)
    for name in ("seed", "steps", "labels"):
        assert np.abs(drawn[name] - drawn["plain"]).max() > 5


def test_sixty_four_images_unless_told_otherwise(place: Path, tmp_path: Path) -> None:
    assert run("--checkpoint", place / "run.ckpt", "--steps", 1, "--out", tmp_path / "grid.PNG") == 0
    assert pixels(tmp_path / "grid.PNG").shape == (8 * 10 + 2, 8 * 10 + 2, 3)


def test_colours(tmp_path: Path) -> None:
    module = checkpoint(tmp_path / "run.ckpt", in_channels=3, out_channels=3)
    assert run("--checkpoint", tmp_path / "run.ckpt", "--num", 4, "--out", tmp_path / "grid.png") == 0
    assert np.abs(pixels(tmp_path / "grid.png") - grid_of(module.sample(4, seed=0), 2)).max() <= 1


def test_an_exported_folder_draws_the_same_picture(place: Path, tmp_path: Path, capsys: Any) -> None:
    first, second, folder = tmp_path / "first.png", tmp_path / "second.png", tmp_path / "exported"
    assert run("--checkpoint", place / "classes.ckpt", "--num", 9, "--out", first, "--export", folder) == 0
    assert f"pipeline:    {folder}\n" in capsys.readouterr().out
    assert run("--checkpoint", folder, "--num", 9, "--out", second) == 0
    assert np.abs(pixels(first) - pixels(second)).max() <= 1
    assert type(diffusers.DiffusionPipeline.from_pretrained(str(folder))).__name__ == "ConsistencyModelPipeline"


def test_a_folder_without_a_model_card_is_drawn_by_as_many_steps_as_its_scheduler_needs(
    place: Path, tmp_path: Path
) -> None:
    unet = diffusers.UNet2DModel.from_pretrained(str(place / "folder"), subfolder="unet")
    pipeline: Any = diffusers.ConsistencyModelPipeline
    for name, scheduler, steps in (
        ("euler", diffusers.EDMEulerScheduler(sigma_data=0.6), 18),
        ("consistency", diffusers.CMStochasticIterativeScheduler(sigma_data=0.6), 1),
    ):
        pipeline(unet, scheduler).save_pretrained(tmp_path / name)
        for out, options in ((f"{name}.png", []), (f"{name}_told.png", ["--steps", steps])):
            assert run("--checkpoint", tmp_path / name, "--num", 3, "--out", tmp_path / out, *options) == 0
        assert (pixels(tmp_path / f"{name}.png") == pixels(tmp_path / f"{name}_told.png")).all()


def test_a_module_of_the_users_own_is_found_once_it_is_imported(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run.ckpt", OfAUser)
    assert type(load_module(tmp_path / "run.ckpt")) is OfAUser
    assert diffusion_modules().items() >= {"DiffusionTraining": DiffusionTraining, "OfAUser": OfAUser}.items()
    assert all(issubclass(kind, DiffusionModule) for kind in diffusion_modules().values())


@pytest.mark.slow
def test_the_program(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_fed", "sample", "--checkpoint", str(place / "run.ckpt")]
    root = Path(__file__).parents[1]
    options = ["--num", "4", "--steps", "2", "--out", str(tmp_path / "grid.png")]
    done = subprocess.run([*command, *options], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"images:      {tmp_path / 'grid.png'}\n"), done.stderr
    assert "Traceback" not in done.stderr and pixels(tmp_path / "grid.png").shape == (22, 22, 3)


# ----------------------------------------------------------------------------------------------------------- bad input


def of_a_classifier(path: Path) -> None:
    trainer = silent_trainer("auto", max_epochs=1)
    trainer.fit(Classifier(), *loaders(samples(12)))
    trainer.save_checkpoint(path)


def of_a_network_object(path: Path) -> None:
    trainer = silent_trainer("auto", max_epochs=1)
    trainer.fit(DiffusionTraining(LinearNetwork().float()), DataLoader(torch.rand(8, 3) - 0.5, 4))  # type: ignore[arg-type]
    trainer.save_checkpoint(path)


def of_an_unknown_class(path: Path) -> None:
    torch.save({"state_dict": {}, "diffusion_module": "Mine"}, path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "run.ckpt': there is no such checkpoint"),
        (lambda path: path.write_text("nothing"), "run.ckpt' cannot be loaded as a checkpoint of plain values"),
        (of_a_classifier, "holds no diffusion module: samples are drawn from one of .*DiffusionTraining"),
        (of_an_unknown_class, "holds Mine: samples are drawn from one of"),
        (of_a_network_object, r"of DiffusionTraining cannot be loaded here: network=None: .* takes what is missing"),
        (lambda path: path.mkdir(), "is no folder of a diffusers pipeline: it has no model_index.json"),
    ],
)
def test_checkpoints_from_which_nothing_is_drawn(write: Any, says: str, tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "run.ckpt")
    assert run("--checkpoint", tmp_path / "run.ckpt", "--out", tmp_path / "grid.png") == 2
    error = capsys.readouterr().err
    assert "lightning-fed sample: error: " in error and "Traceback" not in error
    assert re.search(says, error), error
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num", "0"], "--num 0: it must be at least 1"),
        (["--steps", "0"], "--steps 0: it must be at least 1"),
        (["--out", "grid.jpg"], "--out grid.jpg: its name must end in .png"),
        (["--out", "a_file/grid.png"], "a_file"),
        (["--out", "folder.png"], "--out folder.png is a folder"),
        (["--labels", "0", "3"], "must be 64 integers in 0 .. 2"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--export", "a_file"], "folder='a_file' is a file"),
        (["--seed", "one"], "invalid int value: 'one'"),
    ],
)
@pytest.mark.parametrize("source", ["classes.ckpt", "folder"])
def test_options_that_are_refused(
    source: str, options: list[str], says: str, place: Path, in_tmp_path: Path, capsys: Any
) -> None:
    Path("folder.png").mkdir()
    Path("a_file").touch()
    assert run("--checkpoint", place / source, "--out", "grid.png", *options) == 2
    error = capsys.readouterr().err
    if options[0] == "--export" and source == "folder":
        says = "is a folder of diffusers already"
    assert says in error and "Traceback" not in error
    assert not Path("grid.png").exists()


def test_a_folder_that_cannot_be_written(place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert run("--checkpoint", place / "run.ckpt", "--out", tmp_path / "grid.png") == 2
    assert f"nothing can be written in {tmp_path}" in capsys.readouterr().err


def test_labels_of_a_network_without_classes(place: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint(tmp_path / "run.ckpt").save_pretrained(tmp_path / "folder")
    for source in ("run.ckpt", "folder"):
        assert run("--checkpoint", tmp_path / source, "--labels", 0, "--out", tmp_path / "grid.png") == 2
        assert "the network knows no classes" in capsys.readouterr().err


def test_a_pipeline_of_another_kind(place: Path, tmp_path: Path, capsys: Any) -> None:
    unet = diffusers.UNet2DModel.from_pretrained(str(place / "folder"), subfolder="unet")
    pipeline: Any = diffusers.DDPMPipeline
    pipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "other")
    assert run("--checkpoint", tmp_path / "other", "--out", tmp_path / "grid.png") == 2
    assert "is a DDPMPipeline: only a ConsistencyModelPipeline" in capsys.readouterr().err


def test_a_folder_without_weights(place: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint(tmp_path / "run.ckpt").save_pretrained(tmp_path / "folder")
    (tmp_path / "folder/unet/diffusion_pytorch_model.safetensors").unlink()
    assert run("--checkpoint", tmp_path / "folder", "--out", tmp_path / "grid.png") == 2
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3)])
def test_samples_that_are_no_pictures(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a picture needs one channel or three"):
        save_grid(torch.zeros(shape), tmp_path / "grid.png")
