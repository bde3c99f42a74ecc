"""The Strategy that turns a Trainer into a federation: rounds of local steps, then one communication.

The file reads in the order of a run: construction, processes, set-up, local steps, rounds, evaluation, checkpoints. An
algorithm overrides the methods of :class:`~lightning_fed.federation.algorithm.Algorithm`.
Shapes: N = clients, C = clients on this rank, P = trainable parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_fed.checks import check_choice, check_counts, check_counts_or, check_flags, given
from lightning_fed.federation.algorithm import Algorithm
from lightning_fed.federation.checkpoint import FederationCheckpoint
from lightning_fed.federation.clients import ClientBank
from lightning_fed.federation.companion import Companion
from lightning_fed.federation.consensus import consensus_distance, refresh_consensus
from lightning_fed.federation.evaluation import Evaluation, shard_for_evaluation
from lightning_fed.federation.local_rules import LocalRule
from lightning_fed.federation.local_step import LocalStep
from lightning_fed.federation.participation import FullParticipation, Participation
from lightning_fed.federation.processes import FederationProcesses
from lightning_fed.federation.rounds import hold_rows, leaves_nothing_behind
from lightning_fed.federation.sampler import (
    ClientBatchSampler,
    JointBatch,
    LocalWork,
    batching_of,
    check_shards,
    client_shards,
    federated_loader,
)
from lightning_fed.federation.settings import check_parts, check_training, check_work
from lightning_fed.federation.unfinished_epoch import finish_epoch
from lightning_fed.federation.virtual_clock import VirtualClock


class FederatedStrategy(Algorithm, FederationProcesses):
    """Trains a federation of clients inside one ``Trainer.fit``; the base of every algorithm.

    Args:
        num_clients: clients of the federation, N; by default one a host (a rank, or ``ranks_per_client`` ranks).
        participation: who takes part in a round; by default everybody.
        local_rule: a change to the local step (SAM, a proximal term); by default none.
        local_epochs: passes over a client's shard in a round.
        local_steps: optimizer steps of a client in a round, instead of ``local_epochs``.
        rounds_per_epoch: rounds in one Lightning epoch; ``"pass"`` for as many as the largest shard has steps.
        optimizer_state: ``"reset"`` the clients' optimizers each round, as in the papers, or ``"keep"`` their state.
        float_buffers: ``"mix"`` BatchNorm statistics like parameters, or leave them ``"local"``.
        evaluate: what ``validate`` and ``test`` measure: the ``"consensus"`` model, every one of the ``"clients"``'
            own models (logged as mean, minimum and maximum), or ``"both"``.
        ranks_per_client: ranks that train one client together; gradients are averaged inside the client.
        clients_per_step: clients that train in one vectorized step (docs/vectorized.md); 1 trains them one by one,
            ``"auto"`` measures some numbers in the first steps and keeps the fastest.
        log_clients: log what a ``training_step`` logs for an epoch for each client too, as ``name/client_3``.
        rows_device: keep the clients' rows on the training ``"device"``, or on the ``"cpu"``, from where a client's row
            is copied to the device while it trains; rows are mixed where they are kept.
        on_nonfinite: ``"raise"`` if a client's row is not finite when it should be mixed, or ``"drop"`` the client from
            the round and restart it from the mean of the rest of the cohort.
        seed: of cohorts, shuffling, dropout and augmentation; by default that of ``seed_everything``, else 0.
        process_group_backend: of ``torch.distributed``; by default NCCL on GPUs and gloo on CPUs.
        timeout: seconds that a rank waits for another one.
        start_method: how Lightning starts ranks when no launcher such as torchrun or SLURM has.
        on_peer_loss: ``"raise"``: all ranks must live. ``"drop"``: ranks may die or hang, and the others go on.
        ping_timeout: seconds in which a rank answers, or is taken for dead, if ``on_peer_loss="drop"``.
        clock: simulated time of local steps and transfers, in which nothing waits; by default no time is counted.

    Raises:
        ValueError: for a setting out of range; the message names it and the way out.
    """

    def __init__(
        self,
        num_clients: int | None = None,
        participation: Participation | None = None,
        local_rule: LocalRule | None = None,
        local_epochs: int = 1,
        local_steps: int | None = None,
        rounds_per_epoch: int | Literal["pass"] = 1,
        optimizer_state: Literal["reset", "keep"] = "reset",
        float_buffers: Literal["mix", "local"] = "mix",
        evaluate: Literal["consensus", "clients", "both"] = "consensus",
        ranks_per_client: int = 1,
        clients_per_step: int | Literal["auto"] = 1,
        log_clients: bool = False,
        rows_device: Literal["device", "cpu"] = "device",
        on_nonfinite: Literal["raise", "drop"] = "raise",
        seed: int | None = None,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        on_peer_loss: Literal["raise", "drop"] = "raise",
        ping_timeout: float = 5.0,
        clock: VirtualClock | None = None,
    ) -> None:
        check_work(local_epochs, local_steps)
        check_counts_or("pass", rounds_per_epoch=rounds_per_epoch)
        check_counts_or("auto", clients_per_step=clients_per_step)
        check_counts(0, **given(seed=seed))
        check_flags(log_clients=log_clients)
        check_parts(participation, local_rule, clock)
        check_choice("optimizer_state", optimizer_state, "reset", "keep")
        check_choice("float_buffers", float_buffers, "mix", "local")
        check_choice("evaluate", evaluate, "consensus", "clients", "both")
        check_choice("rows_device", rows_device, "device", "cpu")
        check_choice("on_nonfinite", on_nonfinite, "raise", "drop")
        super().__init__(
            num_clients, ranks_per_client, process_group_backend, timeout, start_method, on_peer_loss, ping_timeout
        )
        self.participation = participation or FullParticipation()
        self.local_rule = local_rule
        self.local_epochs = local_epochs
        self.local_steps = local_steps
        self.rounds_per_epoch = rounds_per_epoch
        self.optimizer_state_policy = optimizer_state
        self.float_buffers = float_buffers
        self.evaluate = evaluate
        self.clients_per_step = clients_per_step
        self.log_clients = log_clients
        self.rows_device = rows_device
        self.on_nonfinite = on_nonfinite
        self.clock = clock
        self._seed = seed
        self.round = 0
        self.joint_index = 0
        self.dropped: np.ndarray = np.array([], dtype=np.int64)
        self.shards: list[np.ndarray] = []
        self.buffers_before = torch.empty(0)
        self._cohort: tuple[tuple[int, int, int], np.ndarray] | None = None
        self._bank: ClientBank | None = None
        self._local_step: LocalStep | None = None
        self._evaluation: Evaluation | None = None
        self._sampler: ClientBatchSampler | None = None
        self._resume: FederationCheckpoint | None = None
        self._bank_of: tuple[LightningModule, Trainer] | None = None
        self.consensus_is_stale = False

    # ------------------------------------------------------------------------------------------------------- facts

    @property
    def seed(self) -> int:
        """The seed of all streams of the federation; a resumed run goes on with that of the run that it resumes."""
        return self._seed if self._seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = seed

    @property
    def cohort(self) -> np.ndarray:
        """The clients that take part in the present round, sorted, int64."""
        key = self.round, self.num_clients, self.seed
        if self._cohort is None or self._cohort[0] != key:
            self._cohort = key, self.participation.cohort(*key)
        return self._cohort[1]

    @property
    def bank(self) -> ClientBank:
        """The clients of this rank. Exists from the set-up of a fit on."""
        assert self._bank is not None, "the clients' rows exist from the set-up of `fit` on"
        return self._bank

    @property
    def local_step(self) -> LocalStep:
        """What runs one client's minibatch. Exists during a fit."""
        assert self._local_step is not None
        return self._local_step

    @property
    def is_within_joint_step(self) -> bool:
        """Whether some clients may have made a step that others have not."""
        return self._local_step is not None and self._local_step.joint is not None

    @property
    def sampler(self) -> ClientBatchSampler:
        """What plans the rounds. Exists from the first training loader on."""
        assert self._sampler is not None
        return self._sampler

    @property
    def evaluation(self) -> Evaluation:
        """What runs validation and test. Exists from the set-up on."""
        assert self._evaluation is not None
        return self._evaluation

    @property
    def handles_gradient_accumulation(self) -> bool:
        """True: clients accumulate one by one, so every joint step has to come by :meth:`optimizer_step`."""
        return True

    # ------------------------------------------------------------------------------------------------------ set-up

    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        # Lightning would put in a sampler that splits every client's data over the ranks, and shuffles training data
        # whatever the loader says; see `process_dataloader`.
        model.trainer._accelerator_connector.use_distributed_sampler = False
        Companion.accompany(model.trainer, self)

    def setup_distributed(self) -> None:
        self.participation.validate(self.num_clients)
        super().setup_distributed()
        self.exchange.keep_time(self.clock, self.seed)

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None and self.model is not None and self.lightning_module is not None
        if self._layer_sync is not None:
            raise ValueError(
                "sync_batchnorm=True would average the statistics of different clients at every step: leave it off; "
                "float buffers are mixed once a round (float_buffers='mix')."
            )
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if self.peers is not None:
            self.peers.require_equal_start(self.lightning_module)
        elif self.world_size > 1 and not self.is_elastic:
            _sync_module_states(self.lightning_module)
        self._setup_clients(trainer, fitting)
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
            self._setup_training(trainer)
        self._evaluation = Evaluation(self, self.lightning_module)

    def _setup_clients(self, trainer: Trainer, fitting: bool) -> None:
        """Make the rows, keep those of an earlier fit that this one continues, or read them from a checkpoint."""
        module = self.lightning_module
        assert module is not None
        resume, self._resume = self._resume, None
        wanted = fitting or self.evaluate != "consensus"
        if resume is not None and wanted:
            resume.check(type(self).__name__, self.layout, module, self.fixed_settings())
            self.seed = resume.header["seed"]  # before the algorithm is set up, whose messages may be random
        elif self._bank is not None and self._bank_of == (module, trainer) and self._bank.is_exported_unchanged():
            self._bank.to(self.root_device)
            return
        elif not fitting:
            if self.evaluate != "consensus":
                raise ValueError(
                    f"evaluate={self.evaluate!r} needs the clients' own models, and there are none: call `fit` with "
                    "this Trainer first, pass the `ckpt_path` of a federated run, or set evaluate='consensus'."
                )
            return
        in_host_memory = self.rows_device == "cpu"
        self._bank = ClientBank(module, self.exchange.clients, self.one_model, self.keeps_rows, in_host_memory)
        self.exchange.deals_evenly = leaves_nothing_behind(self, self._bank)
        hold_rows(self, np.arange(self.num_clients if self.keeps_rows else 0))
        self._bank_of = (module, trainer)
        self.round, self.joint_index = 0, 0
        self.exchange.reset_counts()
        self.exchange.riders = self._bank.buffers if self.float_buffers == "mix" else None
        if self.clock is not None:
            self.clock.reset()
        self.setup_algorithm(self._bank, self.exchange)
        if resume is not None:
            resume.restore(self)
            self._resume = resume
        self.buffers_before = self._bank.buffers.matrix.clone()

    def _setup_training(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        check_training(self, module)
        keep_gradients = not module.automatic_optimization or trainer.accumulate_grad_batches > 1
        self.bank.use_optimizers(self.optimizers, getattr(self.precision_plugin, "scaler", None), keep_gradients)
        self._local_step = LocalStep(self, module)

    def process_dataloader(self, dataloader: object) -> object:
        """Give a training loader the client-aware sampler, and let ranks share an evaluation loader's samples."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if not isinstance(dataloader, DataLoader):
            return dataloader
        if trainer.predicting:
            return dataloader
        if not trainer.training:
            sharers = 1 if self.is_elastic else self.world_size
            return shard_for_evaluation(dataloader, sharers, self.global_rank, self.evaluate)
        batch_size, shuffle, drop_last = batching_of(dataloader)
        work = LocalWork(
            batch_size=batch_size,
            local_epochs=self.local_epochs,
            local_steps=self.local_steps,
            accumulate=trainer.accumulate_grad_batches,
            shuffle=shuffle,
            drop_last=drop_last,
            ranks_per_client=self.ranks_per_client,
            replica=self.layout.replica_of_rank(self.global_rank),
        )
        self.shards = client_shards(dataloader.dataset, self.num_clients, self.seed)
        check_shards(self.shards, work)
        rounds = self.rounds_per_epoch
        self._sampler = self.make_sampler(
            dataloader,
            shards=self.shards,
            clients=self.exchange.clients,
            work=work,
            participation=self.participation,
            seed=self.seed,
            rounds_per_epoch=rounds if isinstance(rounds, int) else work.rounds_per_pass(self.shards),
            next_position=self.next_position,
            takes_part=self.exchange.takes_part,
            share_of=self.exchange.share_of,
        )
        if self.peers is not None:
            self.peers.start()
        return federated_loader(dataloader, self._sampler, self.seed)

    def make_sampler(self, loader: DataLoader[Any], **plan: Any) -> ClientBatchSampler:
        """What draws the clients' minibatches, instead of the sampler of the user's loader."""
        return ClientBatchSampler(**plan)

    def next_position(self) -> tuple[int, int]:
        """The round that the federation has reached, and how many of its joint steps are done."""
        return self.round, self.joint_index

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        transfer, local_step = super().batch_to_device, self._local_step
        if not isinstance(batch, JointBatch) or local_step is None:
            return transfer(batch, device, dataloader_idx)
        device = device or local_step.device
        if not local_step.transfers_plainly:
            batch.replace(lambda minibatch: transfer(minibatch, device, dataloader_idx), one_by_one=True)
        elif local_step.device.type != "cpu":
            batch.replace(lambda data: move_data_to_device(data, device), one_by_one=False)
        return batch

    # -------------------------------------------------------------------------------------------------- local steps

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """A joint step: the closure and the optimizer's step for each client that has work."""
        assert self.lightning_module is not None
        step = super().optimizer_step
        if not self.lightning_module.automatic_optimization:
            return step(optimizer, closure, model, **kwargs)

        def lightning(closure: Callable[[], Any]) -> None:
            step(optimizer, closure, model, **kwargs)

        return self.local_step.run_automatic(optimizer, closure, super().training_step, lightning)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        step = super().training_step
        if self.lightning_module.automatic_optimization:
            return self.local_step.training_step(step, *args[1:], **kwargs)
        return self.local_step.run_manual(step, *args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        backward = super().backward
        return self.local_step.backward(lambda: backward(closure_loss, optimizer, *args, **kwargs))

    # ------------------------------------------------------------------------------------- evaluation and the export

    def refresh_consensus(self) -> None:
        """Make the module the consensus model of the rows as they are now; a collective call."""
        refresh_consensus(self)

    def consensus_distance(self) -> float:
        """``sqrt(mean_i ||x_i - x_bar||^2)`` over all clients' parameters, x_bar their mean; a collective call.

        Of clients that keep no rows: over the last cohort, as it was when its round ended. In an elastic federation:
        over this rank's clients, around the consensus model that this rank has.
        """
        return consensus_distance(self)

    def on_train_start(self) -> None:
        finish_epoch(self)

    def on_train_end(self) -> None:
        self.refresh_consensus()  # a fit may end in the middle of a round

    def on_validation_start(self) -> None:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self.refresh_consensus()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.evaluation.step(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.evaluation.step(super().test_step, *args, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        if self._bank is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            bound = self.bank.bound
            self.refresh_consensus()
            state = {name: value.detach().clone() for name, value in self.lightning_module.state_dict().items()}
            if bound is not None:
                self.bank.bind_client(bound)
            return state
        return self.lightning_module.state_dict()

    def teardown(self) -> None:
        """Leave an ordinary module with the consensus weights; the rows stay, for a later fit or evaluation."""
        if self._bank is not None:
            if self.consensus_is_stale and self.world_size == 1:
                self.refresh_consensus()
            self._bank.export()
            self._bank.to(torch.device("cpu"))
        super().teardown()

    # -------------------------------------------------------------------------------------------------- checkpoints

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Hyperparameters only: the clients' states are saved with their rows."""
        return {"state": {}, "param_groups": super().optimizer_state(optimizer)["param_groups"]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """The ordinary file holds the consensus model; the clients' states are written beside it, sharded by rank."""
        if "optimizer_states" not in checkpoint or self._bank is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if self.is_elastic and not self.is_global_zero:
            return
        FederationCheckpoint.write(self, checkpoint, Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = FederationCheckpoint.choose(self, Path(checkpoint_path))
        checkpoint = super().load_checkpoint(path, weights_only=True)
        assert self.lightning_module is not None
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        self._resume = FederationCheckpoint.read(checkpoint, path, required=fitting)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        super().load_optimizer_state_dict(checkpoint)
        if self._resume is not None:
            self._resume.restore_training(self)
            self._resume = None

    def remove_checkpoint(self, filepath: str | Path) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            FederationCheckpoint.remove_directories(Path(filepath))
