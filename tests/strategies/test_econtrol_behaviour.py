"""What holds for EControl and its relatives at every step: invariants, counter-example, steps left out, bad input."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from econtrol_equations import Papers, top_k
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from lightning.pytorch import Callback, Trainer
from paper_problem import (
    SEED,
    quiet_trainer,
)
from torch import Tensor

from lightning_fed import EControlStrategy
from lightning_fed.callbacks import FederationMonitor
from lightning_fed.compression import Compressor, Identity, Layer, LowRank, Quantize, RandK, ScaledSign, TopK
from lightning_fed.federation.error_feedback import CompressedMean
from lightning_fed.federation.exchange import LoopbackExchange
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.participation import UniformSample

# ------------------------------------------------------------------------------------------------------- invariants

EVERY_COMPRESSOR = [TopK(0.2), TopK(0.2, "layer"), RandK(0.2), ScaledSign(), Quantize(4), LowRank(1), Identity()]


@pytest.mark.parametrize("compressor", EVERY_COMPRESSOR, ids=repr)
@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_the_error_is_the_sum_of_what_was_left_out(compressor: Compressor, eta: float) -> None:
    """``e_{t+1} = sum_s (g_s - h_s - D_s)``, also if the message is random and the vector is too."""
    mean, exchange = directly("econtrol", compressor, eta, "zero", num_clients=4, shapes=[(4, 5), (5,)])
    left_out = torch.zeros(4, 25, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        g = torch.randn(4, 25, generator=draw, dtype=torch.float64)
        before = mean.estimates.clone()
        mean.estimate(g.clone(), exchange)
        message = mean.estimates - before
        left_out += g - before - message
        torch.testing.assert_close(mean.errors, left_out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mean.mean, mean.estimates.mean(dim=0), rtol=1e-12, atol=1e-12)
    assert (left_out.abs().max() > 1e-2) == (not isinstance(compressor, Identity))


def test_random_messages_differ_between_clients_and_steps() -> None:
    mean, exchange = directly("none", RandK(0.2), 0.0, "zero", num_clients=3, shapes=[(50,)])
    seen, ones = [], torch.ones(3, 50, dtype=torch.float64)
    for step in range(4):
        own = torch.zeros(3, 50, dtype=torch.float64)
        mean.channel.send(lambda place, out: out.copy_(ones[place]), exchange.everyone, exchange, step, [(own, 1.0)])
        seen += [tuple(row.nonzero().squeeze(1).tolist()) for row in own]
    assert len(set(seen)) == 12


@pytest.mark.parametrize("method", ["econtrol", "ef21", "ef", "none"])
def test_what_is_measured(method: Any) -> None:
    mean, exchange = directly(method, TopK(0.2), 0.5, "zero", num_clients=3, shapes=[(20,)])
    papers = Papers(method, partial(top_k, ratio=0.2), 0.5, "zero")
    draw = np.random.default_rng(0)
    for _ in range(5):
        g = draw.normal(size=(3, 20))
        e, h_i = (papers.e.copy(), papers.h_i.copy()) if papers.step else (np.zeros((3, 20)), np.zeros((3, 20)))
        mean.estimate(torch.from_numpy(g.copy()), exchange)
        papers.estimate(g)
    vectors = {"econtrol": 0.5 * e + g - h_i, "ef21": g - h_i, "ef": e + g, "none": g}[method]
    left_out = vectors - np.stack([top_k(v, 0.2) for v in vectors])
    expected = {
        "message_bytes": 4 * (8 + 2) + 4,
        "dense_bytes": 20 * 8,
        "compression_error": np.mean(np.linalg.norm(left_out, axis=1) / np.linalg.norm(vectors, axis=1)),
    }
    if method in ("econtrol", "ef"):
        expected["error_norm"] = np.linalg.norm(papers.e, axis=1).mean()
    assert mean.measure(exchange) == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------- the counter-example of Beznosikov et al. (JMLR 2023)

SLOPES = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)


def directly(
    method: Any, compressor: Compressor, eta: float, h0: Any, num_clients: int, shapes: list[tuple[int, ...]]
) -> tuple[CompressedMean, LoopbackExchange]:
    layers = [Layer(str(number), torch.Size(shape)) for number, shape in enumerate(shapes)]
    exchange = LoopbackExchange(Layout(num_clients))
    like = torch.zeros(num_clients, sum(layer.size for layer in layers), dtype=torch.float64)
    return CompressedMean(compressor, method, eta, h0, layers, like, exchange, SEED), exchange


def descend(method: Any, h0: Any, gamma: float) -> tuple[int, float]:
    """On ``f_i(x) = <a_i, x>^2 + ||x||^2 / 4`` from (1, 1, 1); returns the last step and the norm of x."""
    mean, exchange = directly(method, TopK(1 / 3), 1 / 30, h0, num_clients=3, shapes=[(3,)])
    x, t = torch.ones(3, dtype=torch.float64), 0
    for t in range(3000):
        h = mean.estimate(2 * (SLOPES @ x)[:, None] * SLOPES + x / 2, exchange)
        assert h is not None
        x = x - gamma * h
        if t == 0 and h0 != "exact":
            torch.testing.assert_close(h, torch.full((3,), -11 / 6, dtype=torch.float64))  # the mean gradient is +7/6
        if x.norm() > 1e12:
            break
    return t, float(x.norm())


@pytest.mark.parametrize(("gamma", "step"), [(0.01, 1490), pytest.param(0.005, 2967, marks=pytest.mark.slow)])
def test_plain_top_1_walks_away(gamma: float, step: int) -> None:
    last, norm = descend("none", "zero", gamma)
    assert norm > 1e12 and last == step


@pytest.mark.parametrize("gamma", [0.01, pytest.param(0.005, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "h0", "rounding", "norm"),
    [("ef", "zero", 6e-16, 3.7e-8), ("ef21", "exact", 6e-16, 3.7e-8), ("econtrol", "exact", 1e-15, 4.2e-8)],
)
def test_error_feedback_reaches_the_minimum(method: str, h0: str, rounding: float, norm: float, gamma: float) -> None:
    """The figures are those of an independent transcription, which begins from exact estimates (h_i = g_i)."""
    _, reached = descend(method, h0, gamma)
    if gamma == 0.005:
        assert reached == pytest.approx(norm, rel=0.015)
    else:
        assert 0 < reached < 2 * rounding


class Quadratics(pl.LightningModule):
    """The counter-example as a user would write it: the one sample of each client is its a_i."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.x = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (batch[0][0] @ self.x) ** 2 + self.x.square().sum() / 4

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.gamma)


def test_a_shorter_run_with_the_trainer_is_the_same_descent() -> None:
    dataset = torch.utils.data.TensorDataset(SLOPES)
    dataset.client_indices = [np.array([client]) for client in range(3)]  # type: ignore[attr-defined]
    found = {}
    for method in ("none", "econtrol"):
        strategy = EControlStrategy(TopK(1 / 3), error_feedback=method, eta=1 / 30, num_clients=3, rounds_per_epoch=250)
        module = Quadratics(gamma=0.01)
        loader = torch.utils.data.DataLoader(dataset, batch_size=1)
        quiet_trainer(1, strategy=strategy, limit_train_batches=1.0).fit(module, loader)
        assert strategy.round == 250
        papers, x = Papers(method, partial(top_k, ratio=1 / 3), 1 / 30), np.ones(3)
        for _ in range(250):
            a = SLOPES.numpy()
            x = x - 0.01 * papers.estimate(2 * (a @ x)[:, None] * a + x / 2)
        found[method] = module.x.detach().numpy()
        np.testing.assert_allclose(found[method], x, rtol=1e-9, atol=1e-12)
    assert np.linalg.norm(found["none"]) > 100 and np.linalg.norm(found["econtrol"]) < 1


# --------------------------------------------------------------------------------- vectors that are not finite


@pytest.mark.parametrize("compressor", EVERY_COMPRESSOR, ids=repr)
@pytest.mark.parametrize("method", ["econtrol", "ef21", "ef", "none"])
@pytest.mark.parametrize(
    ("bad", "value"),
    [(slice(3, 4), torch.nan), (slice(None), torch.nan), (slice(3, 4), torch.inf)],
    ids=["one nan", "nan", "one inf"],
)
def test_a_vector_that_is_not_finite_changes_nothing(
    compressor: Compressor, method: Any, bad: slice, value: float
) -> None:
    def run(*poisoned: int) -> dict[str, Tensor]:
        mean, exchange = directly(method, compressor, 0.1, "exact", num_clients=4, shapes=[(4, 5), (5,)])
        draw = torch.Generator().manual_seed(0)
        for step in range(6):
            if step in poisoned:
                g = torch.ones(4, 25, dtype=torch.float64)
                g[1, bad] = value
                before = state_of(mean)
                assert mean.estimate(g, exchange) is None
                torch.testing.assert_close(state_of(mean), before, rtol=0, atol=0)
            else:
                mean.estimate(torch.randn(4, 25, generator=draw, dtype=torch.float64), exchange)
        assert mean.skipped == len(poisoned) and mean.steps == 6 - len(poisoned)
        return state_of(mean)

    after = run(0, 3)  # in the first step, which may be an exact one, and later
    assert all(torch.isfinite(matrix).all() for matrix in after.values())


def state_of(mean: CompressedMean) -> dict[str, Tensor]:
    """Copies of e, h_i and h."""
    kept = {**mean.client_matrices(), "h": mean.mean}
    return {name: value.clone() for name, value in kept.items() if "compressor" not in name}


def test_a_vector_that_is_not_finite_leaves_the_warm_start_of_low_rank() -> None:
    mean, exchange = directly("econtrol", LowRank(1), 0.1, "zero", num_clients=4, shapes=[(4, 5), (5,)])
    g = torch.randn(4, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean.estimate(g.clone(), exchange)
    (before,) = [value.clone() for name, value in mean.client_matrices().items() if "compressor" in name]
    g[1] = torch.nan
    assert mean.estimate(g, exchange) is None
    (after,) = [value for name, value in mean.client_matrices().items() if "compressor" in name]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


class BadBatch(Classifier):
    """Features of client 2 are not a number in one step of round 5."""

    def __init__(self, index: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.index = index

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy = self.trainer.strategy
        features, labels = batch
        if strategy.round == 5 and strategy.bank.bound == 2 and strategy.joint_index == self.index:
            features = features * torch.nan
        return super().training_step((features, labels), batch_idx)


class Snapshots(Callback):
    """Copies of all that a step may change, after every round."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.skipped: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not batch.is_last_of_round:
            return
        strategy = trainer.strategy
        kept = {**strategy.client_matrices(), "h": strategy._mean.mean, "buffers": strategy.bank.buffers.matrix}
        kept["model"] = strategy.consensus(strategy.bank.rows.matrix, strategy.exchange)
        if strategy.one_model:
            for key, value in strategy.bank.state_of(0)["optimizers"][0].items():
                kept[f"momentum {key}"] = value["momentum_buffer"]
        self.taken.append({name: value.clone() for name, value in kept.items()})
        self.skipped.append(float(trainer.callback_metrics["fed/skipped_steps"]))


@pytest.mark.parametrize("float_buffers", ["mix", "local"])
@pytest.mark.parametrize("compressor", [TopK(0.2), RandK(0.2)], ids=repr)
@pytest.mark.parametrize("local_steps", [1, 3])
def test_all_clients_leave_out_a_step_with_a_gradient_that_is_not_finite(
    local_steps: int, compressor: Compressor, float_buffers: Any
) -> None:
    pl.seed_everything(1, verbose=False)
    strategy = EControlStrategy(
        compressor, local_steps=local_steps, num_clients=4, float_buffers=float_buffers, rounds_per_epoch=9
    )
    snapshots = Snapshots()
    trainer = silent_trainer(strategy, max_epochs=1, callbacks=[FederationMonitor(plots=False), snapshots])
    with pytest.warns(UserWarning, match="round 5: a gradient is not finite, so all clients leave this step out"):
        trainer.fit(BadBatch(index=local_steps - 1, momentum=0.9), *loaders(clients(4)))
    assert snapshots.skipped == [0] * 5 + [1] * 4
    before, after = snapshots.taken[4], snapshots.taken[5]
    assert set(before) >= {"error", "estimate", "h", "model", "buffers"}
    for name in before:
        # Equal buffers are averaged again, which rounds.
        tolerance = 1e-6 if name == "buffers" and float_buffers == "mix" else 0
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=tolerance, msg=name)
    for earlier, later in ((3, 4), (5, 6), (7, 8)):  # before and afterwards, training goes on
        assert (snapshots.taken[earlier]["model"] - snapshots.taken[later]["model"]).abs().max() > 1e-4
    assert np.isfinite(all_rows(strategy)).all()
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_a_client_that_keeps_its_momentum_recovers_from_a_round_that_is_left_out() -> None:
    pl.seed_everything(1, verbose=False)
    strategy = EControlStrategy(RandK(0.5), local_steps=3, optimizer_state="keep", num_clients=4, rounds_per_epoch=9)
    with pytest.warns(UserWarning, match="not finite"):
        silent_trainer(strategy, max_epochs=1).fit(BadBatch(momentum=0.9), *loaders(clients(4)))
    assert strategy.round_facts(8).numbers == {"skipped_steps": 1}


# --------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("local_steps", [1, 3])
def test_rows_of_half_precision_keep_a_float32_state(local_steps: int, caplog: pytest.LogCaptureFixture) -> None:
    strategy = EControlStrategy(TopK(0.2), local_steps=local_steps, num_clients=4)
    module = Classifier(norm=False)
    with caplog.at_level("INFO"):
        silent_trainer(strategy, precision="bf16-true").fit(module, *loaders(clients(4)))
    assert caplog.text.count("keeps e and h in float32") == 1
    assert strategy.bank.rows.matrix.dtype == torch.bfloat16
    assert {matrix.dtype for matrix in strategy.client_matrices().values()} == {torch.float32}
    assert strategy._mean.mean.dtype == torch.float32
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_full_precision_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        silent_trainer(EControlStrategy(TopK(0.2), num_clients=4), max_epochs=1).fit(Classifier(), *loaders(clients(4)))
    assert "float32" not in caplog.text


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eta": -0.1}, r"eta=-0.1 must be between 0 \(EF21\) and 1"),
        ({"eta": 1.5}, r"eta=1.5 must be between 0 \(EF21\) and 1"),
        ({"eta": float("nan")}, "eta=nan must be a finite number"),
        ({"error_feedback": "ef14"}, r"error_feedback='ef14' is not one of \('econtrol', 'ef21', 'ef', 'none'\)"),
        ({"h0": "random"}, r"h0='random' is not one of \('exact', 'zero', 'compressed'\)"),
        ({"on_peer_loss": "drop"}, "on_peer_loss='drop' would lose messages.*on_peer_loss='raise'"),
        (
            {"participation": UniformSample(2)},
            r"participation=UniformSample leaves clients out.*full participation \(participation=None\)",
        ),
        ({"optimizer_state": "reset"}, "optimizer_state='reset' would forget momentum at every step.*leave it out"),
        (
            {"server_optimizer": partial(torch.optim.SGD, lr=1.0)},
            "server_optimizer is for rounds of several local steps.*leave it out, or set local_steps",
        ),
        ({"local_steps": 0}, "local_steps=0 must be at least 1"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        EControlStrategy(**settings)


@pytest.mark.parametrize("method", ["econtrol", "ef21", "ef"])
def test_a_scaled_compressor_needs_no_error_feedback(method: Any) -> None:
    with pytest.raises(ValueError) as error:
        EControlStrategy(RandK(0.1, unbiased=True), error_feedback=method)
    for part in ("compressor=RandK(ratio=0.1, scope='model', unbiased=True)", f"error_feedback={method!r}"):
        assert part in str(error.value)
    assert "unbiased=False" in str(error.value) and "error_feedback='none'" in str(error.value)
    EControlStrategy(RandK(0.1, unbiased=True), error_feedback="none")


class OwnSteps(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def refusal(strategy: EControlStrategy, module: Any = None, **fit: Any) -> str:
    trainer = silent_trainer(strategy)
    with pytest.raises(ValueError) as error:
        trainer.fit(module or Classifier(), *loaders(clients(4)), **fit)
    assert trainer.global_step == 0
    return str(error.value)


def test_manual_optimization() -> None:
    message = refusal(EControlStrategy(num_clients=4), OwnSteps())
    assert "OwnSteps has automatic_optimization=False" in message and "use automatic optimization" in message


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("saved") / "saved.ckpt"
    trainer = silent_trainer(EControlStrategy(TopK(0.1), num_clients=4), max_epochs=1)
    trainer.fit(Classifier(), *loaders(clients(4)))
    trainer.save_checkpoint(path)
    return str(path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"compressor": TopK(0.2)},
            "compressor=\"TopK(ratio=0.1, scope='model')\", but this run has \"TopK(ratio=0.2, scope='model')\"",
        ),
        ({"error_feedback": "ef21"}, "error_feedback='econtrol', but this run has 'ef21'"),
        ({"local_steps": 2}, "one_model=True, but this run has False"),
    ],
)
def test_resuming_with_other_settings(settings: dict[str, Any], expected: str, saved: str) -> None:
    message = refusal(EControlStrategy(**{"compressor": TopK(0.1), "num_clients": 4, **settings}), ckpt_path=saved)
    assert expected in message and "resume with the settings of the run that saved it" in message
    assert Path(saved).name in message
