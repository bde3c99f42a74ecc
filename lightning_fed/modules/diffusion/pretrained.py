"""Where a denoiser comes from: a network, its configuration, a folder or hub name of diffusers, or a checkpoint."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from lightning_fed.modules.diffusion.denoiser import EDMDenoiser, TimeEmbedding, network_config
from lightning_fed.modules.diffusion.diffusion_module import ONE_STEP_KEY, DiffusionModule

# Of Karras et al. 2022, where nothing else is said.
DEFAULTS: dict[str, Any] = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "time_embedding": "edm"}
# What each scheduler tells a network of the noise level.
SCHEDULERS: dict[str, TimeEmbedding] = {"EDMEulerScheduler": "edm", "CMStochasticIterativeScheduler": "consistency"}
# The networks of a pipeline, and of a module's checkpoint: its average before what was trained last.
NETWORKS = ("unet", "transformer")
AVERAGE, TRAINED = "average.module.network.", "denoiser.network."


def load_denoiser(
    source: nn.Module | Mapping[str, Any] | str | Path,
    sigma_data: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    time_embedding: TimeEmbedding | None = None,
    boundary: bool = False,
    setting: str = "network",
) -> EDMDenoiser:
    """Make or load a denoiser.

    Args:
        source: one of

            - a network, or an :class:`EDMDenoiser`, whose network is then used as it is;
            - a module of this package, of whose ``generator`` a copy is taken;
            - the configuration of a diffusers model, with its ``_class_name``: a new network with random weights;
            - a folder, or a name on the hub, of a diffusers pipeline with an ``EDMEulerScheduler`` or a
              ``CMStochasticIterativeScheduler``, which tell the noise levels, or of a bare diffusers model, which does
              not;
            - a Lightning checkpoint (``.ckpt``) of a module of this package; its average, if it has one.
        sigma_data: None: that of the source, or EDM's; likewise the others.
        sigma_min: see there.
        sigma_max: see there.
        time_embedding: see :class:`EDMDenoiser`.
        boundary: see :class:`EDMDenoiser`.
        setting: that the source was given as, for errors.

    Raises:
        ValueError: if there is no such source, it is not one of these, or it was trained with another setting.
    """
    given = {
        "sigma_data": sigma_data,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "time_embedding": time_embedding,
    }
    network, known = _network_and_settings(source, setting)
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None and name in known and value != known[name]:
            raise ValueError(
                f"{name}={value!r}, but {_name(source)} was trained with {known[name]!r}: set it so, or start "
                "from another model."
            )
        settings[name] = known.get(name, DEFAULTS[name]) if value is None else value
    return EDMDenoiser(network, **settings, boundary=boundary)


def is_one_step_generator(source: Any, denoiser: EDMDenoiser) -> bool:
    """Whether a source of a denoiser is a consistency model or a distilled student, which cannot teach others.

    Args:
        source: what :func:`load_denoiser` was given.
        denoiser: what it returned.
    """
    if isinstance(source, DiffusionModule):
        return source.is_one_step_generator
    if isinstance(source, EDMDenoiser):
        return source.boundary
    if not isinstance(source, (str, Path)) or Path(source, "config.json").is_file():
        return False
    if Path(source).suffix == ".ckpt":
        return bool(read_checkpoint(source, "teacher").get(ONE_STEP_KEY))
    # Of pipelines, only those of consistency models have it.
    return denoiser.time_embedding == "consistency"


def network_setting(denoiser: EDMDenoiser) -> dict[str, Any] | None:
    """The configuration that :func:`load_denoiser` makes a like network of; None if it is not one of diffusers."""
    network = denoiser.network
    if _model_class(type(network).__name__) is not type(network):
        return None
    # What begins with an underscore is where the network came from, and which settings were left at their defaults.
    settings = {key: value for key, value in network_config(network).items() if not key.startswith("_")}
    return {"_class_name": type(network).__name__, **_plain(settings)}


def _network_and_settings(source: Any, setting: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what is known of the noise that it was trained with."""
    if isinstance(source, DiffusionModule):
        source = source.generator.copy(boundary=False)
    if isinstance(source, EDMDenoiser):
        return source.network, {name: source.settings[name] for name in DEFAULTS}
    if isinstance(source, nn.Module):
        return source, {}
    if isinstance(source, Mapping):
        return _from_config(source, setting), {}
    if not isinstance(source, (str, Path)):
        raise ValueError(
            f"{setting}={source!r}: pass a network, a diffusers configuration, a folder, a hub name or a checkpoint. A "
            "network that is not one of diffusers is not in the checkpoint, and must be given again when it is loaded."
        )
    if Path(source).suffix == ".ckpt":
        return _from_checkpoint(Path(source), setting)
    return _from_diffusers(str(source), setting)


def _model_class(name: Any) -> Any:
    """The class of diffusers' models with this name, or None."""
    model: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    return model if isinstance(model, type) and issubclass(model, diffusers.ModelMixin) else None


def _from_config(config: Mapping[str, Any], setting: str) -> nn.Module:
    name, model = config.get("_class_name"), _model_class(config.get("_class_name"))
    if model is None:
        near = difflib.get_close_matches(str(name), [name for name in dir(diffusers) if name.endswith("Model")], n=2)
        offer = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"{setting}: a configuration needs _class_name, the name of a diffusers model such as 'UNet2DModel'; got "
            f"{name!r}.{offer}"
        )
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    # Which diffusers would ignore.
    known = list(inspect.signature(model.__init__).parameters)[1:]
    for unknown in sorted(settings.keys() - set(known)):
        near = difflib.get_close_matches(unknown, known, n=2)
        offer = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{setting}: {name} of diffusers {diffusers.__version__} has no setting {unknown!r}.{offer}")
    return model(**settings)


def _from_diffusers(source: str, setting: str) -> tuple[nn.Module, dict[str, Any]]:
    """Of a pipeline only the network is loaded, after a look at the scheduler: the others may be large."""
    if Path(source).is_dir() and not any(Path(source, name).is_file() for name in ("model_index.json", "config.json")):
        raise ValueError(
            f"{setting}={source!r} is no folder of diffusers: it has neither model_index.json (a pipeline) nor "
            "config.json (a model)."
        )
    # A name on the hub is "model" or "owner/model".
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"{setting}={source!r}: there is no such folder.")
    try:
        parts = diffusers.DiffusionPipeline.load_config(source)
    except OSError as no_pipeline:
        try:
            config = diffusers.UNet2DModel.load_config(source)
        except OSError:
            raise ValueError(
                f"{setting}={source!r} cannot be loaded: {_one_line(no_pipeline)} It must be a diffusers pipeline or "
                "model, in a folder or on the hub, or a checkpoint that ends in .ckpt."
            ) from no_pipeline
        return _pretrained(source, config.get("_class_name"), setting), {}
    # Of each part, its library and class; an optional one may have neither.
    names = [name for name in NETWORKS if parts.get(name, [None, None])[1]]
    kind = parts.get("scheduler", [None, None])[1]
    if not names or kind not in SCHEDULERS:
        raise ValueError(
            f"{setting}={source!r} is a {parts.get('_class_name')} with {kind or 'no scheduler'}: a denoiser in EDM's "
            f"parametrisation comes with one of {', '.join(SCHEDULERS)}. A model that predicts noise at discrete times "
            "cannot be used."
        )
    noise = _noise_of(source, kind, setting)
    return _pretrained(source, parts[names[0]][1], setting, names[0]), noise


def _noise_of(source: str, kind: str, setting: str) -> dict[str, Any]:
    """The settings that the scheduler of a pipeline tells."""
    try:
        scheduler = getattr(diffusers, kind).from_pretrained(source, subfolder="scheduler")
    except OSError as error:
        raise ValueError(
            f"{setting}={source!r} cannot be loaded, its scheduler is incomplete: {_one_line(error)}"
        ) from error
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ValueError(
            f"{setting}={source!r} has prediction_type={prediction!r}: only EDM's parametrisation, 'epsilon' in "
            "diffusers, can be used."
        )
    levels = {name: scheduler.config[name] for name in ("sigma_data", "sigma_min", "sigma_max")}
    return {"time_embedding": SCHEDULERS[kind], **levels}


def _pretrained(source: str, class_name: Any, setting: str, subfolder: str | None = None) -> nn.Module:
    model = _model_class(class_name)
    if model is None:
        raise ValueError(
            f"{setting}={source!r} is a {class_name}, which is no model of diffusers {diffusers.__version__}."
        )
    where = f"its folder {subfolder!r}" if subfolder else "it"
    try:
        # Without the setting, diffusers misses another package, at length.
        network, found = model.from_pretrained(
            source, subfolder=subfolder, low_cpu_mem_usage=False, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(f"{setting}={source!r} cannot be loaded, {where} is incomplete: {_one_line(error)}") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{setting}={source!r} cannot be loaded, {where} is damaged: {_one_line(error)}") from error
    # Which diffusers would leave random.
    if missing := found["missing_keys"]:
        raise ValueError(
            f"{setting}={source!r} cannot be loaded, {where} does not hold {len(missing)} of the weights of "
            f"{class_name}, such as {min(missing)!r}."
        )
    return network


def _from_checkpoint(path: Path, setting: str) -> tuple[nn.Module, dict[str, Any]]:
    checkpoint = read_checkpoint(path, setting)
    settings, state = checkpoint.get("hyper_parameters", {}), checkpoint["state_dict"]
    prefix = AVERAGE if int(state.get("average.n_averaged", 0)) else TRAINED
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not weights or settings.get("network") is None or not DEFAULTS.keys() <= settings.keys():
        raise ValueError(
            f"{setting}={str(path)!r} is no checkpoint of a diffusion module with a diffusers network: train one with "
            "DiffusionTraining, or pass the network itself."
        )
    network = _from_config(settings["network"], setting)
    network.load_state_dict(weights)
    return network, {name: settings[name] for name in DEFAULTS}


def read_checkpoint(path: str | Path, setting: str) -> dict[str, Any]:
    """What a Lightning checkpoint holds, on the CPU, loaded without running code.

    Args:
        path: of the file.
        setting: that it was given as, for the errors.

    Raises:
        ValueError: if there is no such file, or it is no checkpoint of Lightning.
    """
    if not Path(path).is_file():
        raise ValueError(f"{setting}={str(path)!r}: there is no such checkpoint.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Torch explains for many lines how one would load it unsafely.
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{setting}={str(path)!r} cannot be loaded as a checkpoint of plain values: {reason}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{setting}={str(path)!r} is no checkpoint of Lightning: it has no state_dict.")
    return checkpoint


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    """Without the containers of diffusers, which checkpoints could not load safely."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the given denoiser"
