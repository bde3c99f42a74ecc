"""Every place that a denoiser comes from, and every way in which one may not be there or not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from federations import silent_trainer
from safetensors.torch import save_file
from small_denoisers import LinearNetwork, batches, dit_config, unet_config
from torch import nn

from lightning_fed.modules.diffusion import DiffusionTraining, EDMDenoiser, load_denoiser
from lightning_fed.modules.diffusion.pretrained import network_setting

LEVELS = {"sigma_data": 0.6, "sigma_min": 0.01, "sigma_max": 20.0}


@pytest.fixture(autouse=True)
def offline(monkeypatch: Any) -> Iterator[None]:
    """Nothing asks the hub: it is offline, and whoever would connect is caught."""
    calls: list[Any] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda self, address: calls.append(address))
    yield
    assert not calls


def denoiser(**settings: Any) -> EDMDenoiser:
    torch.manual_seed(0)
    return load_denoiser(unet_config(), **{**LEVELS, **settings})


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items())
    return all(name == its and torch.equal(value, theirs) for (name, value), (its, theirs) in pairs)


def save(source: EDMDenoiser, folder: Path, scheduler: Any = None) -> str:
    pipeline: Any = diffusers.ConsistencyModelPipeline
    pipeline(source.network, scheduler or diffusers.EDMEulerScheduler(**LEVELS)).save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------------- all sources


def test_a_configuration_makes_a_network_and_is_what_it_is_remembered_by() -> None:
    config = unet_config(num_class_embeds=3)
    made = load_denoiser(config)
    assert type(made.network) is diffusers.UNet2DModel and made.settings["sigma_max"] == 80.0
    remembered = network_setting(made)
    assert remembered is not None and remembered.items() >= config.items()
    assert [key for key in remembered if key.startswith("_")] == ["_class_name"]
    assert network_setting(load_denoiser(remembered)) == remembered
    assert network_setting(load_denoiser(dit_config()))["num_embeds_ada_norm"] == 3  # type: ignore[index]


def test_a_network_built_in_python_is_remembered_like_one_from_a_folder(tmp_path: Path) -> None:
    config = {key: value for key, value in unet_config().items() if key != "_class_name"}
    built = load_denoiser(diffusers.UNet2DModel(**config))
    built.network.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    assert network_setting(built) == network_setting(load_denoiser(str(tmp_path / "model")))


@pytest.mark.parametrize("name", ["Changed", "UNet2DModel"])
def test_what_is_not_of_diffusers_is_not_remembered(name: str) -> None:
    class Changed(diffusers.UNet2DModel):
        pass

    Changed.__name__ = name
    assert network_setting(EDMDenoiser(LinearNetwork())) is None
    config = {key: value for key, value in unet_config().items() if key != "_class_name"}
    assert network_setting(EDMDenoiser(Changed(**config))) is None


def test_a_network_and_a_denoiser_are_used_as_they_are() -> None:
    first = denoiser(time_embedding="consistency")
    assert load_denoiser(first.network).network is first.network
    again = load_denoiser(first, boundary=True)
    assert again.network is first.network
    assert again.settings == {**LEVELS, "time_embedding": "consistency", "boundary": True}


def test_of_a_module_the_average_is_copied() -> None:
    module = DiffusionTraining(denoiser(), lr=0.01)
    silent_trainer("auto", max_epochs=2).fit(module, batches())
    loaded = load_denoiser(module)
    assert same_weights(loaded, module.average.module) and not same_weights(loaded, module.denoiser)  # type: ignore[union-attr]
    assert loaded.settings == module.denoiser.settings
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.network is not module.generator.network


@pytest.mark.parametrize(
    ("scheduler", "time_embedding"),
    [
        (diffusers.EDMEulerScheduler, "edm"),
        (diffusers.CMStochasticIterativeScheduler, "consistency"),
    ],
)
def test_a_pipeline_tells_the_levels(scheduler: Any, time_embedding: str, tmp_path: Path) -> None:
    first = denoiser()
    folder = save(first, tmp_path, scheduler(**LEVELS))
    for source in (folder, Path(folder)):
        loaded = load_denoiser(source)  # type: ignore[arg-type]
        assert loaded.settings == {**LEVELS, "time_embedding": time_embedding, "boundary": False}
        assert same_weights(loaded, first)
    # Told the same again.
    assert load_denoiser(folder, sigma_max=20.0, time_embedding=time_embedding).sigma_max == 20.0  # type: ignore[arg-type]


def test_a_bare_model_has_the_levels_that_it_is_given(tmp_path: Path) -> None:
    first = denoiser()
    first.network.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_denoiser(str(tmp_path), sigma_max=30.0, time_embedding="consistency")
    assert same_weights(loaded, first)
    assert (loaded.sigma_max, loaded.sigma_data, loaded.time_embedding) == (30.0, 0.5, "consistency")


def test_loading_says_nothing(tmp_path: Path, capfd: Any) -> None:
    folder = save(denoiser(), tmp_path)
    capfd.readouterr()
    load_denoiser(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ema_decay", [0.9, None])
def test_a_checkpoint_gives_its_average(ema_decay: float | None, tmp_path: Path) -> None:
    module = DiffusionTraining(denoiser(), lr=0.01, ema_decay=ema_decay)
    trainer = silent_trainer("auto", max_epochs=2)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = load_denoiser(str(tmp_path / "run.ckpt"), boundary=True)
    assert same_weights(loaded, module.generator) and same_weights(loaded, module.denoiser) == (ema_decay is None)
    assert loaded.settings == {**module.denoiser.settings, "boundary": True}


def test_a_checkpoint_from_before_the_first_step_gives_its_network(tmp_path: Path) -> None:
    module = DiffusionTraining(denoiser())
    trainer = silent_trainer("auto", max_steps=0)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert same_weights(load_denoiser(str(tmp_path / "run.ckpt")), module.denoiser)


# ------------------------------------------------------------------------------------------------- nothing to be found


@pytest.mark.parametrize("name", ["./runs", "/nowhere/model", "runs/one/model", "~/model"])
def test_a_folder_that_is_not_there(name: str, in_tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"network='{name}': there is no such folder"):
        load_denoiser(name)


@pytest.mark.parametrize("name", ["no_such_folder", "nobody/no_such_model"])
def test_a_name_that_cannot_be_reached(name: str, in_tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"network='{name}' cannot be loaded: .* It must be a diffusers pipeline or"):
        load_denoiser(name)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("model_index.json", "is no folder of diffusers: it has neither model_index.json"),
        ("unet/config.json", "cannot be loaded, its folder 'unet' is incomplete: .*config.json"),
        (
            "unet/diffusion_pytorch_model.safetensors",
            "cannot be loaded, its folder 'unet' is incomplete: .*model",
        ),
        ("unet", "cannot be loaded, its folder 'unet' is incomplete"),
        ("scheduler/scheduler_config.json", "cannot be loaded, its scheduler is incomplete: .*scheduler_config.json"),
        ("scheduler", "cannot be loaded, its scheduler is incomplete"),
    ],
)
def test_a_pipeline_without_one_of_its_files(missing: str, says: str, tmp_path: Path) -> None:
    folder = save(denoiser(), tmp_path)
    place = tmp_path / missing
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(ValueError, match=f"network='{folder}' {says}"):
        load_denoiser(folder)


def test_files_of_something_else(tmp_path: Path) -> None:
    folder = save(denoiser(), tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"its folder 'unet' does not hold \d+ of the weights of UNet2DModel"):
        load_denoiser(folder)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be loaded, its folder 'unet' is"):
        load_denoiser(folder)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=f"network='{folder}' cannot be loaded"):
        load_denoiser(folder)


def damaged(path: Path) -> None:
    path.write_bytes(b"no checkpoint")


def of_another_module(path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": {}}, path)


def without_state(path: Path) -> None:
    torch.save([1, 2], path)


def with_code(path: Path) -> None:
    torch.save({"state_dict": {}, "code": nn.Linear(1, 1)}, path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "there is no such checkpoint"),
        (damaged, "cannot be loaded as a checkpoint of plain values"),
        (with_code, "cannot be loaded as a checkpoint of plain values"),
        (without_state, "is no checkpoint of Lightning: it has no state_dict"),
        (of_another_module, "is no checkpoint of a diffusion module with a diffusers network"),
    ],
)
def test_checkpoints_that_are_none(write: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=f"network='{tmp_path / 'run.ckpt'}'.* {says}|{says}") as caught:
        load_denoiser(tmp_path / "run.ckpt")  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"sample_size": 8}, "needs _class_name, .* such as 'UNet2DModel'; got None"),
        (unet_config(_class_name="Unet2DModel"), "got 'Unet2DModel'. Did you mean 'UNet2DModel'"),
        (unet_config(_class_name="EDMEulerScheduler"), "got 'EDMEulerScheduler'"),
        (unet_config(_class_name="logging"), "got 'logging'"),
        (unet_config(block_out_channel=[8]), "no setting 'block_out_channel'. Did you mean 'block_out_channels'"),
        (unet_config(zebra=1), "UNet2DModel of diffusers .* has no setting 'zebra'"),
        (None, "network=None: pass a network"),
        (7, "network=7: pass a network"),
    ],
)
def test_configurations_that_are_none(config: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_denoiser(config)


# -------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("name", "value"),
    [("sigma_data", 0.5), ("sigma_min", 0.002), ("sigma_max", 80.0), ("time_embedding", "consistency")],
)
def test_another_setting_than_that_of_training(name: str, value: Any, tmp_path: Path) -> None:
    first = denoiser()
    module = DiffusionTraining(first)
    trainer = silent_trainer("auto", max_steps=0)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    for source in (save(first, tmp_path / "pipeline"), str(tmp_path / "run.ckpt"), first, module):
        with pytest.raises(ValueError, match=f"{name}={value!r}, but .* was trained with"):
            load_denoiser(source, **{name: value})


def test_a_pipeline_of_another_kind(tmp_path: Path) -> None:
    pipeline: Any = diffusers.DDPMPipeline
    pipeline(denoiser().network, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a DDPMPipeline with DDPMScheduler: .* EDMEulerScheduler"):
        load_denoiser(str(tmp_path))


def test_another_prediction_type(tmp_path: Path) -> None:
    folder = save(denoiser(), tmp_path, diffusers.EDMEulerScheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="prediction_type='v_prediction': only EDM's parametrisation"):
        load_denoiser(folder)


def test_a_pipeline_of_a_network_that_needs_a_text(tmp_path: Path) -> None:
    folder = save(denoiser(), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(tmp_path / "unet")
    settings = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    diffusers.UNet2DConditionModel(**settings, **blocks).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"UNet2DConditionModel, cannot be called .*hidden_states"):
        load_denoiser(folder)
