"""Settings that are fine one by one, but contradict each other: refused at construction, both named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bad_input.bad_values import refusal
from federations import samples
from small_denoisers import unet_config
from small_distillations import teacher

from lightning_fed import (
    DFedSAMStrategy,
    EControlStrategy,
    FedAvgStrategy,
    GossipStrategy,
    MembershipSchedule,
    MoDeSTStrategy,
    RandomChurn,
    Uniform,
    VirtualClock,
)
from lightning_fed.compression import Quantize, RandK, TopK
from lightning_fed.data import FederatedDataset, GaussianMixtureDataModule, ModularArithmeticDataModule
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.local_rules import Proximal, SharpnessAwareRule
from lightning_fed.federation.participation import FullParticipation, UniformSample
from lightning_fed.metrics import NearestCentreAgreement
from lightning_fed.modules import ConsistencyTraining, ImageClassifier
from lightning_fed.modules.diffusion import DoublingPairs, EDMDenoiser, KarrasUniform
from lightning_fed.proximal import L1Norm
from lightning_fed.sharpness import RhoSteps

ONE_STEP: dict[str, Any] = {"local_steps": 1, "rounds_per_epoch": "pass"}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        # Strategies
        (lambda: GossipStrategy(local_epochs=2, local_steps=5), "local_epochs=2 local_steps=5"),
        (lambda: GossipStrategy(ranks_per_client=2, on_peer_loss="drop"), "ranks_per_client=2 on_peer_loss='drop'"),
        (lambda: FedAvgStrategy(cohort_size=2, cohort_fraction=0.5), "size=2 fraction=0.5"),
        (lambda: FedAvgStrategy(participation=UniformSample(2)), "participation= cohort_size"),
        (lambda: FedAvgStrategy(local_rule=SharpnessAwareRule()), "local_rule= mu"),
        (lambda: DFedSAMStrategy(local_rule=Proximal(0.1, torch.empty)), "local_rule= rho"),
        (lambda: MoDeSTStrategy(participation=FullParticipation()), "participation= sample_size"),
        (lambda: MoDeSTStrategy(sample_size=2, num_aggregators=3), "num_aggregators=3 sample_size=2"),
        (lambda: GossipStrategy(method="choco"), "method='choco' compressor="),
        (lambda: GossipStrategy(method="beer", **ONE_STEP), "method='beer' compressor="),
        (lambda: GossipStrategy(compressor=TopK(0.1)), "compressor=TopK(ratio=0.1, scope='model') method='average'"),
        (
            lambda: GossipStrategy(method="choco", compressor=RandK(0.1, unbiased=True)),
            "compressor=RandK unbiased=False",
        ),
        (lambda: GossipStrategy(proximal=L1Norm(0.1)), "proximal= method='tracking'"),
        (lambda: GossipStrategy(method="tracking"), "method='tracking' local_steps=None"),
        (lambda: GossipStrategy(method="tracking", gossip_steps=2, **ONE_STEP), "method='tracking' gossip_steps=2"),
        (
            lambda: GossipStrategy(method="choco", compressor=TopK(0.1), message_dtype="bf16"),
            "message_dtype='bf16' method='choco'",
        ),
        (
            lambda: GossipStrategy(method="choco", compressor=TopK(0.1), participation=UniformSample(2)),
            "participation=UniformSample method='choco'",
        ),
        (
            lambda: GossipStrategy(method="choco", compressor=TopK(0.1), on_peer_loss="drop"),
            "method='choco' on_peer_loss=",
        ),
        (lambda: EControlStrategy(compressor=Quantize(4, unbiased=True)), "compressor= error_feedback='econtrol'"),
        (lambda: EControlStrategy(participation=UniformSample(2)), "participation=UniformSample"),
        (lambda: EControlStrategy(on_peer_loss="drop"), "on_peer_loss='drop'"),
        (lambda: EControlStrategy(server_optimizer=torch.optim.SGD), "server_optimizer local_steps=1"),
        (lambda: EControlStrategy(optimizer_state="reset"), "optimizer_state='reset' local_steps=1"),
        # Parts of strategies
        (lambda: UniformSample(), "size=None fraction=None"),
        (lambda: Layout(8, num_ranks=4, ranks_per_client=3), "ranks_per_client=3 4"),
        (lambda: Layout(3, num_ranks=4), "num_clients=3 4"),
        (lambda: Uniform(2.0, 1.0), "low=2.0 high=1.0"),
        (lambda: RandomChurn(2.0, 0.1), "crash_rate=2.0 unit='seconds'"),
        (lambda: VirtualClock(bandwidth=1.0, devices_csv="d.csv"), "bandwidth devices_csv='d.csv'"),
        (lambda: VirtualClock(seconds_per_step=1.0, devices_csv="d.csv"), "seconds_per_step devices_csv='d.csv'"),
        (lambda: VirtualClock(latency=1.0, latency_csv="l.csv"), "latency latency_csv='l.csv'"),
        (lambda: MembershipSchedule(joins={1: [0]}, leaves={1: [0]}), "join leave round"),
        (lambda: RhoSteps([0.1], [5]), "1 values 1 milestones"),
        (lambda: RhoSteps([0.1, 0.2, 0.3], [5, 2]), "milestones=[5, 2]"),
        # Data, metrics, modules
        (
            lambda: FederatedDataset(samples(10), [np.arange(5)], [np.arange(5), np.arange(2)]),
            "client_eval_indices client_indices",
        ),
        (
            lambda: FederatedDataset(samples(10), [np.arange(5)], [np.arange(5, 10)], samples(9)),
            "eval_dataset dataset",
        ),
        (lambda: GaussianMixtureDataModule("grid", modes=8), "modes=8 layout="),
        (lambda: GaussianMixtureDataModule(modes=8, train_samples=4), "train_samples=4 modes=8"),
        (lambda: ModularArithmeticDataModule(batch_size=4, steps_per_epoch=2), "batch_size=4 steps_per_epoch=2"),
        (lambda: ModularArithmeticDataModule(9, "divide"), "p=9"),
        (lambda: NearestCentreAgreement(torch.zeros(3, 2), torch.arange(2)), "means classes"),
        (lambda: EDMDenoiser(teacher().network, sigma_min=2.0, sigma_max=1.0), "sigma_min=2.0 sigma_max=1.0"),
        (lambda: KarrasUniform(low=0.5, high=0.5), "low=0.5 high=0.5"),
        (lambda: DoublingPairs(smallest=20, largest=10), "smallest=20 largest=10"),
        (lambda: ConsistencyTraining(unet_config(), teacher=teacher(), pairs="easy"), "pairs='easy' teacher"),
        (lambda: ConsistencyTraining(unet_config(), sampling_sigmas=(0.5, 0.8)), "sampling_sigmas=(0.5, 0.8)"),
        (lambda: ImageClassifier("small_convnet", image_size=16), "image_size=16 small_convnet"),
    ],
)
def test_contradictory_settings_are_refused_by_name(make: Callable[[], Any], names: str) -> None:
    message = refusal(make)
    missing = [name for name in split_outside_brackets(names) if name not in message]
    assert not missing, f"{missing} not in: {message}"


def split_outside_brackets(names: str) -> list[str]:
    """At blanks, but not at those inside of brackets."""
    parts, depth = [""], 0
    for letter in names:
        depth += (letter in "([") - (letter in ")]")
        if letter == " " and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def test_a_setting_that_does_not_exist_is_named() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'topolgy'"):
        GossipStrategy(topolgy="ring")
