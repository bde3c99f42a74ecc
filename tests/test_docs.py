"""The documentation: its examples run, its links lead somewhere, and it names what the package exports."""

from __future__ import annotations

import itertools
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from documentation import ROOT, example, execute
from federations import Classifier, all_rows, clients, loaders, samples, silent_trainer
from lightning.pytorch import Callback, seed_everything

import lightning_fed
from lightning_fed import DFedSAMStrategy, EControlStrategy, FedAvgStrategy, GossipStrategy, MoDeSTStrategy
from lightning_fed.cli import FederatedCLI
from lightning_fed.compression import TopK
from lightning_fed.data import DigitsDataModule
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.federation.virtual_clock import VirtualClock
from lightning_fed.modest.membership import hash_order
from lightning_fed.modules import ImageClassifier

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"```.*?```", re.DOTALL)


# -------------------------------------------------------------------------------------------------- the examples run


def test_the_readmes_example_trains_the_federation(in_tmp_path: Path) -> None:
    names = execute(ROOT / "README.md", example(ROOT / "README.md", "quickstart"))
    strategy, trainer = names["strategy"], names["trainer"]
    assert strategy.round == trainer.max_epochs
    row_bytes, neighbours = 4 * 6186, 2
    assert strategy.exchange.total_bytes == strategy.round * 20 * neighbours * row_bytes
    assert trainer.callback_metrics["val/acc"] > 0.8
    page = (ROOT / "README.md").read_text()
    assert f"{strategy.exchange.total_bytes:,}" in page, "the number of bytes in the README is another one"


def test_the_readmes_data_of_ones_own_are_federated() -> None:
    train, val = samples(400), samples(40, seed=1)
    given = {"train": train, "val": val, "test": val, "client_indices": np.arange(400).reshape(10, 40)}
    names = execute(ROOT / "README.md", example(ROOT / "README.md", "data"), **given)
    for data in ({"datamodule": names["data"]}, {"train_dataloaders": names["loader"]}):
        strategy = FedAvgStrategy(num_clients=10)
        silent_trainer(strategy, max_epochs=1, limit_val_batches=0).fit(Classifier(norm=False), **data)
        assert strategy.round == 1 and sum(map(len, strategy.shards)) == 400


def test_the_readmes_federation_of_nodes_that_come_and_go_trains() -> None:
    strategy = execute(ROOT / "README.md", example(ROOT / "README.md", "churn"))["strategy"]
    silent_trainer(strategy, max_epochs=4).fit(Classifier(norm=False), *loaders(clients(50)))
    assert strategy.round == 4 and strategy.clock.elapsed > 0


def test_the_readmes_clients_train_together(in_tmp_path: Path) -> None:
    trainer = execute(ROOT / "README.md", example(ROOT / "README.md", "vectorized"))["trainer"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(ImageClassifier("mlp"), DigitsDataModule(num_clients=100))
    assert trainer.strategy.round == 2 and trainer.strategy.local_step.clients_per_step.begin(20) == 10


@pytest.mark.parametrize(("page", "name"), [("README.md", "slow-links"), ("docs/compression.md", "compression")])
def test_the_examples_of_compressed_training_train(page: str, name: str, in_tmp_path: Path) -> None:
    trainer = execute(ROOT / page, example(ROOT / page, name))["trainer"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Classifier(), *loaders(clients(trainer.strategy.num_clients)))
    assert trainer.strategy.round >= 2


MODEST = ROOT / "docs" / "modest.md"


def test_the_example_of_modest_trains(in_tmp_path: Path) -> None:
    names = execute(MODEST, example(MODEST, "modest"))
    assert names["trainer"].callback_metrics["val/acc"] > 0.8
    assert list(in_tmp_path.rglob("participation.png"))


@pytest.mark.parametrize("number", range(4))
def test_the_settings_of_modest_are_read(number: int, in_tmp_path: Path) -> None:
    blocks = example(MODEST, "availability", "yaml")
    assert len(blocks) == 4
    (trace,) = example(MODEST, "availability.csv", "text")
    Path("availability.csv").write_text(trace)
    settings = {"num_clients": 50, **yaml.safe_load(blocks[number])}
    trainer = {"strategy": {"class_path": "MoDeSTStrategy", "init_args": settings}, "accelerator": "cpu", "devices": 1}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    classes = ["--model", "ImageClassifier", "--data", "DigitsDataModule"]
    strategy = FederatedCLI(["--config", "config.yaml", *classes], run=False).trainer.strategy
    strategy.availability.validate(50)
    list(itertools.islice(strategy.availability.changes(50, seed=0), 10))
    named = yaml.safe_load(blocks[number]).popitem()
    assert type(getattr(strategy, named[0])).__name__ == named[1]["class_path"]


ADDING = ROOT / "docs" / "adding-an-algorithm.md"


def slowmo(**settings: Any) -> FederatedStrategy:
    return execute(ADDING, example(ADDING, "slowmo")[:1])["SlowMoStrategy"](num_clients=4, seed=3, **settings)


def test_the_example_of_a_new_algorithm_runs_as_written(in_tmp_path: Path) -> None:
    definition, run = example(ADDING, "slowmo")
    assert len(definition.splitlines()) < 60
    names = execute(ADDING, [definition, run])
    assert names["trainer"].callback_metrics["val/acc"] > 0.5


class Decaying(Classifier):
    """A learning rate that changes after every round, by no constant factor, which would cancel."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: [1, 0.5, 0.1, 0.3, 0.2][epoch])]


class Record(Callback):
    """Keeps the clients' models before mixing, and the common model after it."""

    def __init__(self, strategy: Any) -> None:
        self.means: list[np.ndarray] = []
        self.models: list[np.ndarray] = []
        mix = strategy.mix

        def recorded(rows: torch.Tensor, exchange: Any) -> None:
            self.means.append(rows.double().mean(dim=0).numpy())
            mix(rows, exchange)
            self.models.append(strategy.x.double().numpy())

        strategy.mix = recorded


def fit(strategy: FederatedStrategy, module: Classifier, *callbacks: Callback, **settings: Any) -> np.ndarray:
    """Train from a fixed start; all clients' rows and the model that the user is left with."""
    seed_everything(1, verbose=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.3, 0.3)
    silent_trainer(strategy, callbacks=list(callbacks), **settings).fit(module, *loaders(clients(4)))
    model = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
    return np.concatenate([all_rows(strategy).ravel(), model])


def test_the_new_algorithm_follows_its_equations_when_the_learning_rate_changes() -> None:
    strategy = slowmo(alpha=0.8, beta=0.6)
    start = {}

    class Start(Callback):
        def on_train_start(self, *_: Any) -> None:
            start["x"] = strategy.x.double().numpy().copy()  # type: ignore[attr-defined]

    record = Record(strategy)
    fit(strategy, Decaying(norm=False), Start(), max_epochs=4)
    x, u = start["x"], 0.0
    for y_bar, model, gamma in zip(record.means, record.models, [0.4, 0.2, 0.04, 0.12]):
        u = 0.6 * u + (x - y_bar) / gamma
        x = x - 0.8 * gamma * u
        np.testing.assert_allclose(model, x, rtol=0, atol=1e-5)
    assert len(record.models) == 4 and np.abs(x - start["x"]).max() > 1e-2


def test_the_new_algorithm_reduces_to_fedavg_and_fedavgm() -> None:
    averaged = partial(FedAvgStrategy, num_clients=4, seed=3, weighting="uniform")
    momentum = partial(torch.optim.SGD, lr=0.8, momentum=0.6)
    for mine, known in (
        (slowmo(beta=0.0), averaged()),
        (slowmo(alpha=0.8, beta=0.6), averaged(server_optimizer=momentum)),
    ):
        np.testing.assert_allclose(fit(mine, Classifier()), fit(known, Classifier()), rtol=0, atol=1e-5)
        assert mine.exchange.total_bytes == known.exchange.total_bytes


def test_the_new_algorithm_resumes_exactly(tmp_path: Path) -> None:
    whole = fit(slowmo(), Classifier(), max_epochs=3)
    interrupted, module = slowmo(), Classifier()
    fit(interrupted, module, max_epochs=1)
    module.trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, module = slowmo(), Classifier()
    silent_trainer(resumed).fit(module, *loaders(clients(4)), ckpt_path=str(tmp_path / "one.ckpt"))
    model = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
    np.testing.assert_array_equal(np.concatenate([all_rows(resumed).ravel(), model]), whole)


# ------------------------------------------------------------------------- the formulas for bytes in algorithms.md


@pytest.mark.parametrize("float_buffers", ["mix", "local"])
@pytest.mark.parametrize(
    ("make", "rows_of_clients", "rows_of_server"),
    [
        (partial(FedAvgStrategy, cohort_size=3), 3, 3),
        (partial(FedAvgStrategy, mu=0.1, server_optimizer=partial(torch.optim.Adam, lr=0.01)), 8, 8),
        (partial(GossipStrategy, topology="ring", local_steps=1), 8 * 2, 0),
        (partial(GossipStrategy, topology="one-peer-exponential"), 8, 0),
        (partial(GossipStrategy, topology="star"), 7 + 7, 0),
        (partial(GossipStrategy, topology="complete", participation=UniformSample(size=4)), 4 * 3, 0),
        (partial(DFedSAMStrategy, topology="exponential", gossip_steps=3), 3 * 8 * 3, 0),
    ],
)
def test_bytes_are_those_of_the_documented_formula(
    make: Any, rows_of_clients: int, rows_of_server: int, float_buffers: Any
) -> None:
    strategy, module = make(num_clients=8, float_buffers=float_buffers), Classifier()
    silent_trainer(strategy, max_epochs=2).fit(module, *loaders(clients(8)))
    numbers = sum(parameter.numel() for parameter in module.parameters())
    numbers += sum(buffer.numel() for buffer in module.net.buffers() if buffer.is_floating_point() and buffer.ndim) * (
        float_buffers == "mix"
    )
    assert strategy.exchange.sent_bytes.sum() == 2 * rows_of_clients * 4 * numbers
    assert strategy.exchange.server_bytes == 2 * rows_of_server * 4 * numbers


STEP: dict[str, Any] = {"local_steps": 1, "rounds_per_epoch": 1}


@pytest.mark.parametrize(
    ("make", "messages", "first", "rows_in_full"),
    [
        (partial(EControlStrategy, TopK(0.1), h0="exact", rounds_per_epoch=1), 8 * 7, 0, 8 * 7),
        (partial(EControlStrategy, TopK(0.1), rounds_per_epoch=1), 8 * 7, 8 * 7, 0),
        (partial(GossipStrategy, method="choco", compressor=TopK(0.1), gossip_steps=2), 2 * 8 * 2, 2 * 8 * 2, 0),
        (partial(GossipStrategy, method="beer", compressor=TopK(0.1), **STEP), 2 * 8 * 2, 8 * 2, 0),
        (partial(GossipStrategy, method="tracking", compressor=TopK(0.1), **STEP), 2 * 8 * 2, 2 * 8 * 2, 0),
    ],
)
def test_compressed_bytes_are_those_of_the_documented_formula(
    make: Any, messages: int, first: int, rows_in_full: int
) -> None:
    """``messages`` a round, ``first`` in the first one, where ``rows_in_full`` travel too; B = 6 K + 4."""
    strategy, module = make(num_clients=8), Classifier(norm=False)
    silent_trainer(strategy, max_epochs=3).fit(module, *loaders(clients(8)))
    numbers = sum(parameter.numel() for parameter in module.parameters())
    message_bytes = 6 * round(0.1 * numbers) + 4
    assert strategy.exchange.total_bytes == (first + 2 * messages) * message_bytes + rows_in_full * 4 * numbers


@pytest.mark.parametrize("float_buffers", ["mix", "local"])
def test_modests_bytes_are_those_of_the_documented_formula(float_buffers: Any) -> None:
    strategy = MoDeSTStrategy(
        sample_size=4, num_aggregators=2, num_clients=8, float_buffers=float_buffers, clock=VirtualClock()
    )
    module = Classifier()
    silent_trainer(strategy, max_epochs=3).fit(module, *loaders(clients(8)))
    to_itself = 0
    for round, plan in enumerate(strategy.replay(3)):
        trained, aggregators = plan.starts, plan.averages
        to_itself += sum(client in trained for client in aggregators)
        to_itself += sum(client in hash_order(8, round + 2)[:4] for client in aggregators)
    row_bytes = strategy.bank.row_bytes if float_buffers == "mix" else strategy.bank.rows.row_bytes
    assert strategy.exchange.total_bytes == (3 * 2 * 4 * 2 - to_itself) * (row_bytes + 8 * 8 + 32)


# ------------------------------------------------------------------------------------------ links, names, other code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    prose = CODE_BLOCK.sub("", page.read_text())
    targets = [target for target in LINK.findall(prose) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target.split("#")[0]).exists()]
    assert not missing, f"{page.name} links to files that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_lead_to_headings(page: Path) -> None:
    prose = CODE_BLOCK.sub("", page.read_text())
    for target in LINK.findall(prose):
        path, _, anchor = target.partition("#")
        if not anchor or "://" in target:
            continue
        headings = re.findall(
            r"^#+ (.*)$", CODE_BLOCK.sub("", (page.parent / path if path else page).read_text()), re.MULTILINE
        )
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{page.name}: no heading {target!r}"


def test_the_readmes_table_names_every_strategy_and_short_name() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    for name in lightning_fed.__all__:
        if name.endswith("Strategy"):
            assert any(f"`{name}" in row for row in rows), f"the README's table does not name {name}"
    for short in ("fedavg", "gossip", "dpsgd", "dfedsam", "modest"):
        assert any(f'`"{short}"`' in row for row in rows), f"the README's table does not name {short!r}"


def test_every_config_is_in_the_readme() -> None:
    page = (ROOT / "README.md").read_text()
    paths = [str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")]
    assert [path for path in paths if path not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_a_page_names_exists(page: Path) -> None:
    """A file of the package or the tests, in backquotes, is there."""
    prose = CODE_BLOCK.sub("", page.read_text())
    files = set(re.findall(r"`((?:\w+/)*\w+\.py)`", prose))
    places = [ROOT, ROOT / "lightning_fed", ROOT / "lightning_fed" / "federation"]
    assert [file for file in files if not any((place / file).is_file() for place in places)] == []
