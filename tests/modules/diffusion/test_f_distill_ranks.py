"""f-distill on several ranks and in federations: replicas of one model share their sums, clients share nothing."""

from __future__ import annotations

from os import environ
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import all_rows, silent_trainer
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_ranks
from small_denoisers import coloured
from small_distillations import Keyed, distillation
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_fed import FedAvgStrategy
from lightning_fed.data import FederatedDataset
from lightning_fed.modules.diffusion.f_distill import FDistill, Noise

WORLD, BATCH = 2, 4
SETTINGS: dict[str, Any] = {"student_every": 2, "gan_weight": 0.01, "ema_decay": 0.9}


def flat(made: nn.Module) -> np.ndarray:
    state = {name: value for name, value in made.state_dict().items() if name != "seed"}
    return torch.cat([value.double().reshape(-1) for value in state.values()]).numpy()


def doubles() -> TensorDataset:
    return TensorDataset(coloured(48).tensors[0].double())


def replica(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    made = distillation(Keyed, **SETTINGS, **settings).double()
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    rank = int(environ["RANK"])
    shard = Subset(doubles(), [i for i in range(48) if i // BATCH % WORLD == rank])
    trainer = silent_trainer(strategy, WORLD, max_epochs=1, precision="64-true", use_distributed_sampler=False)
    trainer.fit(made, DataLoader(shard, BATCH))
    return {"weights": flat(made), "bins": made.ratio.bin_means.numpy().copy(), "steps": made.steps_done}


@pytest.mark.parametrize(
    "settings", [{"divergence": "forward_kl"}, {"divergence": "jensen_shannon", "objective": "uni"}]
)
def test_two_ranks_are_one_with_twice_the_batch(settings: dict[str, Any]) -> None:
    """Exactly so only if the mean ratios of noise levels, and the mean weight, are those of both ranks."""
    one, other = run_ranks(WORLD, replica, settings)
    whole = distillation(Keyed, **SETTINGS, **settings).double()
    start = flat(whole)
    trainer = silent_trainer("auto", max_epochs=1, precision="64-true")
    trainer.fit(whole, DataLoader(doubles(), WORLD * BATCH))
    assert one["steps"] == whole.steps_done == 3
    assert (one["weights"] == other["weights"]).all() and np.abs(one["weights"] - start).max() > 1e-3
    assert np.abs(one["weights"] - flat(whole)).max() <= 1e-8
    assert np.abs(one["bins"] - 1).max() > 1e-3


class Drawing(FDistill):
    """Keeps what it draws."""

    def draw_noise(self, images: Tensor, distribution: Any) -> Noise:
        noise = super().draw_noise(images, distribution)
        self.__dict__.setdefault("drawn", []).append(noise.start[:, 0, 0, 0].tolist())
        return noise


def drawing() -> list[list[float]]:
    pl.seed_everything(0, verbose=False)
    made = distillation(Drawing, **SETTINGS)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    trainer = silent_trainer(strategy, WORLD, max_epochs=1)
    trainer.fit(made, DataLoader(TensorDataset(coloured(16).tensors[0]), BATCH))
    return made.drawn


def test_ranks_draw_different_noise() -> None:
    """Though Lightning seeds them alike."""
    one, other = run_ranks(WORLD, drawing)
    assert len(one) == 3 and not np.isclose(one, other).any()


def refused() -> str:
    with pytest.raises(ValueError, match="ddp_find_unused_parameters_true") as error:
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer = silent_trainer(strategy, WORLD, max_epochs=1)
        trainer.fit(distillation(**SETTINGS), DataLoader(TensorDataset(coloured(16).tensors[0]), BATCH))
    return str(error.value)


def test_ddp_has_to_look_for_unused_parameters() -> None:
    assert all("FDistill trains its networks in turns" in message for message in run_ranks(WORLD, refused))


# --------------------------------------------------------------------------------------------------------- federations


def clients(num_clients: int, samples: int = 12) -> FederatedDataset:
    indices = [np.arange(samples * client, samples * (client + 1)) for client in range(num_clients)]
    return FederatedDataset(TensorDataset(coloured(samples * num_clients).tensors[0]), indices)


def federation(devices: int, num_clients: int, ranks_per_client: int = 1, **settings: Any) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    made = distillation(ratio_rate=0.5, **SETTINGS)
    strategy = FedAvgStrategy(
        num_clients=num_clients, ranks_per_client=ranks_per_client, optimizer_state="keep", **settings
    )
    sums: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            sums.append(float(made.sum_over_replicas(torch.ones(1))))

    trainer = silent_trainer(strategy, devices, max_epochs=3, callbacks=[Watch()])
    trainer.fit(made, DataLoader(clients(num_clients), BATCH, shuffle=True))
    found = {"consensus": flat(made), "sums": sums, "sample": made.sample(2, seed=0).numpy()}
    return {**found, "rows": all_rows(strategy), "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()}}


def test_every_client_of_fedavg_distils_for_itself() -> None:
    """Three rounds of three turns: student, others, student, and so on, for each client; then one model."""
    pl.seed_everything(3, verbose=False)
    made, start = distillation(**SETTINGS), flat(distillation(**SETTINGS))
    seen: list[Tensor] = []

    class Rows(FedAvgStrategy):
        def mix(self, rows: Tensor, exchange: Any) -> None:
            seen.append(rows.clone())
            super().mix(rows, exchange)

    strategy = Rows(num_clients=3)
    trainer = silent_trainer(strategy, max_epochs=3)
    trainer.fit(made, DataLoader(clients(3), BATCH))
    rows = seen[0]
    assert len({row.numpy().tobytes() for row in rows}) == 3  # each has its own data and noise
    assert torch.isfinite(torch.stack(seen)).all() and np.abs(flat(made) - start).max() > 1e-3
    assert int(made.iteration) == 9 and made.steps_done == 5 and trainer.global_step == 9
    assert made.generator is made.denoiser and torch.isfinite(made.sample(2, seed=0)).all()
    trained = torch.cat([p.detach().reshape(-1) for p in made.parameters() if p.requires_grad])
    torch.testing.assert_close(trained, seen[-1].mean(dim=0), rtol=0, atol=1e-6)


def test_clients_do_not_talk_and_where_they_live_does_not_matter() -> None:
    one, other = run_ranks(WORLD, federation, WORLD, 2)
    alone = federation(1, 2)
    assert set(one["sums"]) == set(other["sums"]) == set(alone["sums"]) == {1.0}
    for found in (one, other):
        np.testing.assert_allclose(found["rows"], alone["rows"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(found["sample"], alone["sample"], rtol=0, atol=1e-4)
    assert one["metrics"] == other["metrics"]
    assert one["metrics"]["train/h_mean"] == pytest.approx(alone["metrics"]["train/h_mean"], rel=1e-4)


def test_the_ranks_of_one_client_share_their_sums() -> None:
    one, other = run_ranks(WORLD, federation, WORLD, 1, 2)
    assert set(one["sums"]) == set(other["sums"]) == {2.0}
    assert (one["consensus"] == other["consensus"]).all()


def resumed(directory: str, resume: str | None, max_epochs: int) -> np.ndarray:
    made = distillation(ratio_rate=0.5, **SETTINGS)
    pl.seed_everything(3 if resume is None else 77, verbose=False)
    strategy = FedAvgStrategy(num_clients=3, optimizer_state="keep")
    trainer = silent_trainer(strategy, max_epochs=max_epochs)
    trainer.fit(made, DataLoader(clients(3), BATCH, shuffle=True), ckpt_path=resume)
    trainer.save_checkpoint(f"{directory}/{max_epochs}.ckpt")
    return all_rows(strategy)


def test_a_federation_resumes_bit_by_bit(tmp_path: Any) -> None:
    """After three turns, so that the student's second one is done and the others' is next."""
    whole, _ = resumed(str(tmp_path), None, 3), resumed(str(tmp_path), None, 1)
    assert (resumed(str(tmp_path), f"{tmp_path}/1.ckpt", 3) == whole).all()


def test_turns_of_several_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate=2 in a federation"):
        trainer = silent_trainer(FedAvgStrategy(num_clients=2), max_epochs=1)
        trainer.fit(distillation(accumulate=2), DataLoader(clients(2), BATCH))
