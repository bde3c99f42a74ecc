"""Training that takes turns: one batch for the student, several for the networks that tell it where to go.

Shapes: B = samples, C, H, W = channels, height and width of an image.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed.checks import check_counts, check_numbers, given
from lightning_fed.federation.randomness import Stream, derive_seed, seed_generators
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.modules.diffusion.denoiser import EDMDenoiser
from lightning_fed.modules.diffusion.diffusion_module import Batch, DiffusionModule

FOR_THE_LOADER = -1  # instead of the place of a batch in its turn


class AlternatingTraining(DiffusionModule):
    """Manual optimization with two optimizers, that of the student (the denoiser) and that of all others.

    A subclass gives both losses and, from ``configure_optimizers``, both optimizers in this order. A turn is one step
    of one of them; of every ``student_every`` turns the first is the student's. On a turn the others' parameters have
    no gradients. Random numbers are a function of the run's seed, the turn and the rank, so that ranks draw different
    ones, and a resumed run those that it would have drawn. Works with half precision and its loss scale, DDP
    (``strategy="ddp_find_unused_parameters_true"``) and federations, where every client takes its own turns.

    Args:
        denoiser: the student.
        ema_decay: see :class:`DiffusionModule`; one update a step of the student.
        student_every: turns for one of the student, at least 2.
        accumulate: batches of one turn, whose gradients are averaged before the step. The last turn of an epoch may
            have fewer, and a checkpoint in the middle of a turn forgets the batches that it has had.
        gradient_clip: largest norm of the gradient of each parameter group; None for no clipping.

    Attributes:
        iteration: turns done, int64.
        student_step: those of the student.

    Raises:
        ValueError: if a setting is out of range; before the first step, if the strategy cannot train in turns.
    """

    iteration: Tensor
    student_step: Tensor
    seed: Tensor

    def __init__(
        self,
        denoiser: EDMDenoiser,
        ema_decay: float | None,
        student_every: int,
        accumulate: int,
        gradient_clip: float | None,
    ) -> None:
        super().__init__(denoiser, ema_decay)
        check_counts(student_every=student_every, accumulate=accumulate)
        check_numbers("(0, inf)", **given(gradient_clip=gradient_clip))
        if student_every < 2:
            raise ValueError(
                f"student_every={student_every} must be at least 2: one batch for the student, the others for the "
                "networks that tell it where to go."
            )
        self.automatic_optimization = False
        self.student_every, self.accumulate, self.gradient_clip = student_every, accumulate, gradient_clip
        for counter, start in (("iteration", 0), ("student_step", 0), ("seed", -1)):
            self.register_buffer(counter, torch.tensor(start))
        self._waiting_batches = 0
        self._is_first_epoch = True

    @abstractmethod
    def student_loss(self, images: Tensor, class_labels: Tensor | None) -> Tensor:
        """The loss of the student on its turn; a number."""

    @abstractmethod
    def others_loss(self, images: Tensor, class_labels: Tensor | None) -> Tensor:
        """The loss of the other networks on theirs; a number."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = self.images_and_labels(batch)
        self._seed_generators(self._waiting_batches)
        student, others = self.optimizers()  # type: ignore[attr-defined]
        is_students = int(self.iteration) % self.student_every == 0
        optimizer = student if is_students else others
        with self.toggled_optimizer(optimizer):
            loss = self.student_loss(images, labels) if is_students else self.others_loss(images, labels)
            self.manual_backward(loss / self.accumulate)
        self._waiting_batches += 1
        if self._waiting_batches < self.accumulate and not self.trainer.is_last_batch:
            return
        optimizer.step()
        optimizer.zero_grad()
        self._waiting_batches = 0
        self.iteration += 1
        self.student_step += int(is_students)
        self.log("student_step", self.student_step.float(), on_step=True, on_epoch=False, batch_size=len(images))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not getattr(self.trainer.strategy.model, "find_unused_parameters", True):
            raise ValueError(
                f"{type(self).__name__} trains its networks in turns, which DDP must know: use "
                'strategy="ddp_find_unused_parameters_true".'
            )
        if self.is_federated and self.accumulate > 1:
            raise ValueError(
                f"accumulate={self.accumulate} in a federation: a client's round may end between the batches of a "
                "turn. Use larger batches."
            )
        if self.seed < 0:
            self.seed.fill_(int(torch.randint(2**31, ())))
        self._waiting_batches = 0
        self._is_first_epoch = True
        self._seed_generators(FOR_THE_LOADER)

    def on_train_epoch_start(self) -> None:
        # The loader of a fit's first epoch has begun before this.
        if not self._is_first_epoch:
            self._seed_generators(FOR_THE_LOADER)
        self._is_first_epoch = False

    def _seed_generators(self, place: int) -> None:
        """Make random numbers a function of the turn, the place of the batch in it, and the rank.

        A federation does so by itself, for each client.
        """
        if not self.is_federated:
            key = int(self.seed), int(self.iteration), place, self.global_rank
            seed_generators(derive_seed(Stream.LOCAL_STEP, *key), self.device)

    def sum_over_replicas(self, values: Tensor) -> Tensor:
        """Add up over the ranks that train this one model. Independent clients do not talk here."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, FederatedStrategy):
            return strategy.reduce(values, reduce_op="sum")
        if strategy.replicas is not None:
            dist.all_reduce(values, group=strategy.replicas)
        return values

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Here gradients are no longer scaled, whatever the precision.
        if self.gradient_clip is not None:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], self.gradient_clip)

    @property
    def steps_done(self) -> int:
        """Steps of the student."""
        return int(self.student_step)
