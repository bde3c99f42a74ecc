"""What the monitor measures, on which samples, and that training does not notice."""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import CLASSES, Classifier, Noisy, clients, loaders, samples, silent_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from matplotlib.image import imread
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_fed import DFedSAMStrategy, GossipStrategy
from lightning_fed.callbacks import NeuralCollapseMonitor
from lightning_fed.callbacks.feature_pass import undisturbed
from lightning_fed.callbacks.neural_collapse_plots import draw_means, snapshot_of
from lightning_fed.metrics import NearestCentreAgreement, NeuralCollapse


def fit(monitor: NeuralCollapseMonitor | None = None, strategy: Any = "auto", **settings: Any) -> pl.Trainer:
    """Three epochs of a small classifier with BatchNorm and dropout, from the same start."""
    pl.seed_everything(0, verbose=False)
    data = settings.pop("data", None) or loaders(clients(4) if strategy != "auto" else samples(60))
    module = settings.pop("module", Classifier)()
    callbacks = [*settings.pop("callbacks", []), *([monitor] if monitor is not None else [])]
    trainer = silent_trainer(strategy, callbacks=callbacks, **settings)
    trainer.fit(module, *data)
    return trainer


def metrics_of(trainer: pl.Trainer, prefix: str = "nc/") -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


@torch.no_grad()
def by_hand(module: Classifier, dataset: TensorDataset) -> dict[str, float]:
    """The measures of the classifier's last layer on a data set, in one batch."""
    module.eval()
    inputs, labels = dataset.tensors
    features, head = module.net[:-1](inputs), module.net[-1]
    metric = NeuralCollapse(CLASSES, features.shape[1])
    metric.update(features, labels)
    measures = metric.compute(head.weight, head.bias)
    nearest = NearestCentreAgreement(*metric.moments()[2::-2])
    nearest.update(features, head(features))
    measures |= {"nc2": measures.pop("nc2_etf"), "nc4": nearest.compute()}
    return {f"nc/{name}": float(value) for name, value in measures.items()}


def everything(trainer: pl.Trainer) -> dict[str, Any]:
    """What a fit leaves behind: weights, buffers, generators, metrics that the user logged."""
    module = trainer.lightning_module
    return {
        **{name: value.numpy().copy() for name, value in module.state_dict().items()},
        "torch": torch.get_rng_state().numpy(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate()[1],
        "modes": [layer.training for layer in module.modules()],
        "hooks": [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in module.modules()],
        **{name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("nc/")},
    }


def test_a_measurement_is_that_of_the_final_model_on_all_training_samples():
    trainer = fit(NeuralCollapseMonitor(plots=False))
    assert metrics_of(trainer) == pytest.approx(by_hand(trainer.lightning_module, samples(60)), rel=1e-4)
    assert {"nc/nc1", "nc/nc2", "nc/nc3", "nc/nc4"} < set(metrics_of(trainer))


def test_validation_data_and_the_batch_size() -> None:
    trainer = fit(NeuralCollapseMonitor(data="val", plots=False, batch_size=7), check_val_every_n_epoch=2)
    assert metrics_of(trainer) == pytest.approx(by_hand(trainer.lightning_module, samples(37, seed=1)), rel=1e-4)


def test_a_few_batches_are_spread_over_a_data_set_that_is_sorted_by_class() -> None:
    inputs, labels = samples(60).tensors
    by_class = TensorDataset(inputs[labels.argsort()], labels.sort()[0])
    trainer = fit(NeuralCollapseMonitor(plots=False, max_batches=2), data=loaders(by_class, 10))
    every_third = TensorDataset(*(tensor[::3] for tensor in by_class.tensors))
    assert metrics_of(trainer) == pytest.approx(by_hand(trainer.lightning_module, every_third), rel=1e-4)


class Stream(IterableDataset[Any]):
    """Samples in an order of its own."""

    def __init__(self, count: int) -> None:
        self.samples = samples(count)

    def __iter__(self) -> Any:
        return iter(self.samples)


def test_a_stream_is_measured_as_it_comes() -> None:
    whole = fit(NeuralCollapseMonitor(plots=False), data=[DataLoader(Stream(60), 10)])
    assert metrics_of(whole) == pytest.approx(by_hand(whole.lightning_module, samples(60)), rel=1e-4)
    part = fit(NeuralCollapseMonitor(plots=False, max_batches=2), data=[DataLoader(Stream(60), 10)])
    assert metrics_of(part) == pytest.approx(by_hand(part.lightning_module, TensorDataset(*samples(60)[:20])), rel=1e-4)


class Counting(Classifier):
    """Logs in `forward` and keeps a buffer that changes even in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        self.calls = self.calls + 1
        if self.trainer.training:
            self.log("forward", features.mean())
        return super().forward(features)


@pytest.mark.parametrize("strategy", ["auto", GossipStrategy, DFedSAMStrategy])
@pytest.mark.parametrize("data", ["train", "val"])
def test_training_does_not_notice(strategy: Any, data: Any) -> None:
    outcomes = []
    for monitor in (None, NeuralCollapseMonitor(data=data, plots=False, layers=["net.0", "net.1"])):
        federated = strategy if strategy == "auto" else strategy(num_clients=4, optimizer_state="keep")
        given = DataLoader(Noisy(), 8, shuffle=True), DataLoader(samples(37, seed=1), 10)
        outcomes.append(everything(fit(monitor, federated, module=Counting, data=given)))
    assert outcomes[0].keys() == outcomes[1].keys() and "forward" in outcomes[0]
    for name, value in outcomes[0].items():
        np.testing.assert_array_equal(value, outcomes[1][name], err_msg=name)


def test_modes_of_single_layers_are_kept() -> None:
    class Frozen(Classifier):
        def on_train_epoch_start(self) -> None:
            self.net[1].eval()

    means = []
    for monitor in (None, NeuralCollapseMonitor(plots=False)):
        module = Frozen()

        class Modes(pl.Callback):
            def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                means.append([layer.training for layer in pl_module.modules()])

        pl.seed_everything(0, verbose=False)
        order = [monitor, Modes()] if monitor is not None else [Modes()]
        silent_trainer("auto", callbacks=order, max_epochs=1).fit(module, loaders(samples(60))[0])
    assert means[0] == means[1] and any(means[0]) and not all(means[0])


def test_every_n_epochs_and_what_a_checkpoint_can_monitor(tmp_path: Path) -> None:
    monitor = NeuralCollapseMonitor(every_n_epochs=2)
    best = ModelCheckpoint(tmp_path / "best", monitor="nc/nc1", every_n_epochs=2, save_on_train_epoch_end=True)
    trainer = fit(
        monitor,
        callbacks=[best],
        max_epochs=5,
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1),
    )
    assert [epoch for epoch, _ in monitor.curves["nc1"]] == [2, 4]
    logged = [line.split(",") for line in (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()]
    place = logged[0].index("nc/nc1")
    values = [float(row[place]) for row in logged[1:] if row[place]]
    assert values == pytest.approx([value for _, value in monitor.curves["nc1"]], rel=1e-5)
    assert best.best_model_score == pytest.approx(min(values), rel=1e-5)
    pictures = sorted((Path(trainer.log_dir) / "neural_collapse").iterdir())
    assert [picture.name for picture in pictures] == ["curves.png", "gram.png", "means.png"]
    for picture in pictures:
        pixels = imread(picture)
        assert min(pixels.shape[:2]) > 200 and float(pixels[..., :3].std()) > 0.01


def test_layers_are_followed_through_depth(tmp_path: Path) -> None:
    monitor = NeuralCollapseMonitor(layers=["net.0", "net.3"], directory=str(tmp_path))
    trainer = fit(monitor)
    metrics = metrics_of(trainer)
    # What leaves dropout (nothing is dropped in evaluation) enters the head.
    for name in ("nc1", "nc1_trace", "cdnv", "nc2", "nc2_of", "nc4", "effective_rank"):
        assert metrics[f"nc/net.3/{name}"] == metrics[f"nc/{name}"]
        assert name == "nc4" or metrics[f"nc/net.0/{name}"] != metrics[f"nc/{name}"]
    assert "nc/net.3/nc3" not in metrics
    assert (tmp_path / "depth.png").exists()


def test_the_feature_may_be_another_layers_output() -> None:
    direct = metrics_of(fit(NeuralCollapseMonitor(plots=False)))
    named = metrics_of(fit(NeuralCollapseMonitor(layer="net.3", head="net.4", plots=False)))
    assert named == direct
    other = metrics_of(fit(NeuralCollapseMonitor(layer="net.0", nearest_centre=False, plots=False)))
    assert other["nc/nc1"] != direct["nc/nc1"] and "nc/nc4" not in other


class Images(Classifier):
    """Feature maps, then a 1 x 1 convolution and a mean, and a dictionary as batch."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.maps = nn.Conv2d(1, 6, 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, features: Tensor) -> Any:
        maps = self.maps(features.reshape(-1, 1, 3, 4)).relu_()
        return {"logits": self.head(maps.mean(dim=(2, 3)))}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["x"])["logits"], batch["y"])


def as_dictionary(batch: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in batch]), "y": torch.stack([y for _, y in batch])}


def test_feature_maps_are_averaged_and_a_batch_may_be_anything() -> None:
    data = [DataLoader(samples(60), 8, collate_fn=as_dictionary)]
    monitor = NeuralCollapseMonitor(
        "head", layers=["maps"], plots=False, split_batch=lambda batch: (batch["x"], batch["y"])
    )
    metrics = metrics_of(fit(monitor, module=Images, data=data))
    # The in-place ReLU that follows must not reach the feature that was taken.
    assert metrics["nc/maps/nc1"] != metrics["nc/nc1"]
    pooled = NeuralCollapseMonitor(
        "head",
        layer="maps",
        plots=False,
        split_batch=lambda batch: (batch["x"], batch["y"]),
        pool=lambda maps: maps.relu().mean(dim=(2, 3)),
    )
    assert metrics_of(fit(pooled, module=Images, data=data)) == pytest.approx(
        {name: value for name, value in metrics.items() if "maps" not in name}, rel=1e-5
    )


def test_subsets_and_the_samples_of_no_client_are_left_out() -> None:
    chosen = list(range(0, 60, 2))
    data = [DataLoader(samples(60), 8, sampler=SubsetRandomSampler(chosen))]
    trainer = fit(NeuralCollapseMonitor(plots=False), data=data)
    subset = TensorDataset(*(tensor[chosen] for tensor in samples(60).tensors))
    assert metrics_of(trainer) == pytest.approx(by_hand(trainer.lightning_module, subset), rel=1e-4)


@pytest.mark.parametrize("validate", [True, False])
def test_a_federation_is_measured_by_its_consensus_model_on_all_clients_samples(validate: bool) -> None:
    shards = clients(4)
    data = loaders(shards)[: 1 + validate]
    trainer = fit(NeuralCollapseMonitor(plots=False), GossipStrategy(num_clients=4), data=data)
    assert trainer.strategy.consensus_distance() > 0.01  # type: ignore[attr-defined]
    expected = by_hand(trainer.lightning_module, shards.dataset)
    assert metrics_of(trainer) == pytest.approx(expected, rel=1e-4)


def test_a_fit_that_ends_within_a_round_is_measured_by_the_consensus_model() -> None:
    shards = clients(4)
    trainer = fit(NeuralCollapseMonitor(plots=False), GossipStrategy(num_clients=4), data=loaders(shards), max_steps=2)
    assert trainer.strategy.round == 0 and len(metrics_of(trainer)) > 10  # type: ignore[attr-defined]
    assert metrics_of(trainer) == pytest.approx(by_hand(trainer.lightning_module, shards.dataset), rel=1e-4)


def test_a_look_in_the_middle_of_a_round_sees_the_consensus_model_and_leaves_the_client() -> None:
    class Look(pl.Callback):
        seen = 0

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            bank = trainer.strategy.bank  # type: ignore[attr-defined]
            before, weights = bank.bound, [value.clone() for value in pl_module.parameters()]
            with undisturbed(trainer, pl_module):
                inside = torch.cat([value.flatten() for value in pl_module.parameters()])
                torch.testing.assert_close(inside, bank.rows.matrix.mean(dim=0))
                assert not pl_module.training and not torch.is_grad_enabled()
            self.seen += before is not None
            assert bank.bound == before and pl_module.training
            assert all(map(torch.equal, pl_module.parameters(), weights))

    look = Look()
    with_look = fit(strategy=GossipStrategy(num_clients=4), callbacks=[look])
    assert look.seen > 5
    without = fit(strategy=GossipStrategy(num_clients=4))
    for value, other in zip(with_look.lightning_module.parameters(), without.lightning_module.parameters()):
        assert torch.equal(value, other)


def test_the_curves_of_a_resumed_run_are_whole(tmp_path: Path) -> None:
    half, resumed, whole = (NeuralCollapseMonitor(plots=False) for _ in range(3))
    fit(
        half, max_epochs=2, data=loaders(samples(60), shuffle=False), module=partial(Classifier, dropout=0)
    ).save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    trainer = silent_trainer("auto", max_epochs=4, callbacks=[resumed])
    trainer.fit(Classifier(dropout=0), *loaders(samples(60), shuffle=False), ckpt_path=tmp_path / "half.ckpt")
    fit(whole, max_epochs=4, data=loaders(samples(60), shuffle=False), module=partial(Classifier, dropout=0))
    assert resumed.curves == whole.curves and len(whole.curves["nc1"]) == 4


def test_the_curves_of_a_second_fit_begin_anew() -> None:
    monitor = NeuralCollapseMonitor(plots=False)
    for epochs in (2, 1):
        fit(monitor, max_epochs=epochs)
    assert [epoch for epoch, _ in monitor.curves["nc1"]] == [1]


def test_two_monitors_keep_apart(tmp_path: Path) -> None:
    both = [NeuralCollapseMonitor(plots=False), NeuralCollapseMonitor(data="val", prefix="nc/val", plots=False)]
    trainer = fit(callbacks=both)
    assert trainer.callback_metrics["nc/nc1"] != trainer.callback_metrics["nc/val/nc1"]
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert sum("NeuralCollapseMonitor" in key for key in saved) == 2


def test_a_missing_class_is_named_once() -> None:
    inputs, labels = samples(60).tensors
    kept = TensorDataset(inputs[labels != 2], labels[labels != 2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(NeuralCollapseMonitor(plots=False), data=[DataLoader(kept, 8, drop_last=True)])
    told = [str(warning.message) for warning in caught if "have no sample" in str(warning.message)]
    assert len(told) == 1 and "classes [2] have no sample" in told[0] and "the other 3" in told[0]
    assert metrics_of(trainer)["nc/effective_rank"] <= 2


@pytest.mark.slow
def test_an_offline_wandb_run_has_the_measures_and_the_pictures(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, project="tests", offline=True)
    trainer = fit(NeuralCollapseMonitor(), logger=logger)
    run = logger.experiment
    assert run.summary["nc/nc1"] == pytest.approx(metrics_of(trainer)["nc/nc1"])
    run.finish()
    pictures = sorted(path.name.split("_")[0] for path in Path(run.dir).rglob("nc/*.png"))
    assert pictures == ["curves", "gram", "means"]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 0.05), ("bf16-true", 0.05), ("64-true", 1e-4)])
def test_precisions(precision: Any, tolerance: float) -> None:
    """Features and weights come in the Trainer's precision; the sums are float64 in any."""
    trainer = fit(NeuralCollapseMonitor(plots=False), precision=precision)
    expected = by_hand(trainer.lightning_module.float(), samples(60))
    assert metrics_of(trainer) == pytest.approx(expected, rel=tolerance, abs=0.02 if tolerance > 0.01 else 0)


def test_nothing_is_written_by_a_fast_dev_run_or_without_plots(in_tmp_path: Path) -> None:
    fit(NeuralCollapseMonitor(), fast_dev_run=True, data=[DataLoader(samples(60), 20)])
    fit(NeuralCollapseMonitor(plots=False))
    assert not list(in_tmp_path.iterdir())


def test_a_simplex_is_drawn_as_a_regular_polygon(tmp_path: Path) -> None:
    metric = NeuralCollapse(10, 64)
    rotation = torch.linalg.qr(torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))[0]
    metric.update(torch.eye(10) @ rotation.T + 3, torch.arange(10))
    snapshot = snapshot_of(metric.moments(), rotation.T)
    radius = np.linalg.norm(snapshot.points[0])
    angles = 2 * np.pi * np.arange(10) / 10
    np.testing.assert_allclose(snapshot.points, radius * np.stack([np.cos(angles), np.sin(angles)], 1), atol=1e-5)
    np.testing.assert_allclose(snapshot.rows, snapshot.points, atol=1e-5)
    np.testing.assert_allclose(snapshot.cosines, np.eye(10) * 10 / 9 - 1 / 9, atol=1e-5)
    draw_means(snapshot).savefig(tmp_path / "means.png")


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be at least 1"),
        ({"max_batches": 0}, "max_batches=0 must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1 must be at least 1"),
        ({"data": "test"}, "data='test' is not one of"),
    ],
)
def test_a_setting_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralCollapseMonitor(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "model.net.4"}, r"head: Classifier has no layer 'model.net.4'. The nearest names: \['net.4'"),
        ({"layers": ["nett.1"]}, r"layers: Classifier has no layer 'nett.1'. The nearest names: .*'net.1'"),
        ({"layer": "net.9"}, r"layer: Classifier has no layer 'net.9'. The nearest names: .*'net.\d'"),
        ({"layers": ["val_accuracy"]}, r"layers \['val_accuracy'\] did not run in `Classifier.forward`"),
        ({"pool": lambda output: output[:, None]}, r"'input of the head' yields a tensor \[4, 1, 16\] for 4 labels"),
        ({"split_batch": lambda batch: (batch[0], batch[1] + 1)}, "labels lie in 1 .. 4, but num_classes=4 allows"),
    ],
)
def test_a_wrong_layer(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(NeuralCollapseMonitor(plots=False, **settings))


def test_tokens_need_a_pool_and_other_batches_a_split() -> None:
    class Tokens(Classifier):
        def forward(self, features: Tensor) -> Tensor:
            return self.net[-1](self.net[:-1](features)[:, None].expand(-1, 5, -1))[:, 0]

    with pytest.raises(ValueError, match=r"does not return the output of a linear layer.*'net.0', 'net.4'"):
        fit(NeuralCollapseMonitor(plots=False), module=Tokens)
    with pytest.raises(ValueError, match=r"the head yields a tensor \[4, 5, 4\]"):
        fit(NeuralCollapseMonitor("net.4", plots=False), module=Tokens)
    with pytest.raises(ValueError, match=r"a batch is a dict, not \(inputs, labels\): pass split_batch="):
        fit(NeuralCollapseMonitor("head"), module=Images, data=[DataLoader(samples(60), 8, collate_fn=as_dictionary)])


def test_loaders_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="data='val' needs a validation loader, but there is none"):
        fit(NeuralCollapseMonitor(data="val", plots=False), data=loaders(samples(60))[:1])

    class Several(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[0], batch_idx)

    with pytest.raises(ValueError, match="data='train' needs one training loader, but there are 2"):
        fit(NeuralCollapseMonitor(plots=False), module=Several, data=[[DataLoader(samples(60), 8)] * 2])


def test_hooks_are_gone_after_an_error() -> None:
    module = Classifier()
    with pytest.raises(ValueError, match="labels lie in"):
        fit(
            NeuralCollapseMonitor(split_batch=lambda batch: (batch[0], batch[1] - 9), plots=False),
            module=lambda: module,
        )
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    assert "log" not in module.__dict__


def test_no_warning_comes_from_the_monitor() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "It is recommended to use")
        warnings.filterwarnings("error", ".*compute.*method of metric")
        fit(NeuralCollapseMonitor(plots=False))
