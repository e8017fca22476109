"""The one training loop: SGD with step decay over device-resident images, resumable at every epoch.

All random numbers of an epoch come from (seed, epoch), so that a resumed training is equal to an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gross_ray.data.image_set import ImageSet
from gross_ray.errors import DivergedError, InvalidValueError
from gross_ray.nn.precision import forward_at, products_at
from gross_ray.seeds import derive_seed
from gross_ray.training.capture import CapturedStep, captures
from gross_ray.training.draws import EpochDraws, dropout_by
from gross_ray.training.options import EngineOptions, Schedule
from gross_ray.weights import restore_state

EVALUATION_BATCH = 250
"""Images a forward pass when only the accuracy is wanted; larger ones leave the CPU's cache."""
EVALUATION_BATCH_CUDA = 2500
"""The same on a GPU, which smaller ones leave idle."""
PART = 64
"""Images of one pass of a CPU within a step: more leave its cache. The same everywhere, for rounding depends on it."""

FLOAT32 = EngineOptions()
"""The default: nothing compiled, one training at a time."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes normalised images (B, 3, H, W), channels last, and labels (B,)."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did: the columns of the `history` table."""

    epoch: int
    lr: float
    train_loss: float
    gradient_norm: float
    val_accuracy: float | None
    seconds: float
    images_per_second: float


class CheckpointSlot(Protocol):
    """Where one unit of work keeps its state between epochs."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was saved last, or None."""
        ...

    def save(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Replace what was saved, atomically."""
        ...


def train(
    network: nn.Module,
    images: ImageSet,
    schedule: Schedule,
    *,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    seed: int,
    set_mode: Callable[[], object],
    engine: EngineOptions = FLOAT32,
    in_parts: bool = False,
    before_step: Callable[[torch.Generator], object] | None = None,
    measure: Callable[[], float] | None = None,
    checkpoint: CheckpointSlot | None = None,
    on_epoch: Callable[[EpochRecord], object] | None = None,
) -> list[EpochRecord]:
    """Train `parameters` of `network` in place and return one record an epoch.

    `loss` returns a scalar. `before_step` is given the epoch's generator (it draws the configuration), `set_mode` is
    called before each epoch (train or eval), `measure` returns the validation accuracy after one. Epochs found in
    `checkpoint` are not done again. With `in_parts`, for a loss that is a mean over images, a CPU takes a batch in
    parts that fit its cache; the step is the same but for rounding.

    Raises DivergedError, naming the step and the learning rate, if a loss or a gradient is not finite, and
    InvalidValueError where `engine` captures steps that `before_step` changes.
    """
    if captures(engine, images.device) and before_step is not None:  # another configuration is another graph
        raise InvalidValueError(
            "engine.capture = True: steps that each draw a configuration cannot be captured here; train the supernet "
            "with reconstruct_together or finetune_together, or set engine.capture=false"
        )
    history, momenta = restore(network, checkpoint)
    steps = _Steps(network, images, schedule, parameters, loss, engine=engine, in_parts=in_parts, momenta=momenta)
    for epoch in range(len(history), schedule.epochs):
        started = time.perf_counter()
        lr = schedule.lr_at(epoch)
        steps.set_lr(lr)
        set_mode()
        draws = EpochDraws(images, derive_seed(seed, epoch), schedule, steps.dropout)
        losses, norms = steps.of_epoch(draws, before_step)
        check_finite(losses, norms, epoch, lr)
        train_loss, gradient_norm = float(losses.mean()), float(norms.mean())
        seconds = time.perf_counter() - started
        record = EpochRecord(
            epoch=epoch + 1,
            lr=lr,
            train_loss=train_loss,
            gradient_norm=gradient_norm,
            val_accuracy=None if measure is None else measure(),
            seconds=seconds,
            images_per_second=draws.num_images / seconds,
        )
        history.append(record)
        if checkpoint is not None:
            checkpoint.save(state(network, steps.momenta()), {"history": [asdict(one) for one in history]})
        if on_epoch is not None:
            on_epoch(record)
    return history


class _Steps:
    """The steps of one training: stochastic gradient descent on some parameters, as one CUDA graph if `engine` says."""

    def __init__(
        self,
        network: nn.Module,
        images: ImageSet,
        schedule: Schedule,
        parameters: Mapping[str, nn.Parameter],
        loss: Loss,
        *,
        engine: EngineOptions,
        in_parts: bool,
        momenta: Mapping[str, Tensor],
    ) -> None:
        """Continue with `momenta`, by the names of their parameters."""
        self._network, self._images, self._schedule = network, images, schedule
        self._parameters, self._engine, self._in_parts = parameters, engine, in_parts
        self._loss: Loss = torch.compile(loss) if engine.compile else loss
        self._optimizer = torch.optim.SGD(
            list(parameters.values()), lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
        )
        for name, momentum in momenta.items():
            buffer = torch.empty_like(parameters[name])  # keeps the parameter's memory format, so every rounding too
            self._optimizer.state[parameters[name]]["momentum_buffer"] = buffer.copy_(momentum)
        self.dropout = torch.Generator(images.device)
        """Draws what dropout drops."""
        self._captured = CapturedStep(self._step, [self.dropout]) if captures(engine, images.device) else None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        if self._captured is not None and lr != self._optimizer.param_groups[0]["lr"]:
            self._captured.forget()
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def of_epoch(
        self, draws: EpochDraws, before_step: Callable[[torch.Generator], object] | None
    ) -> tuple[Tensor, Tensor]:
        """Do the steps of one epoch; return each one's loss and the norm of its gradients: (steps,) both."""
        found: list[tuple[Tensor, ...]] = []
        with (
            random_numbers_of(draws, self._network, compiled=self._engine.compile),
            products_at(self._engine.precision, self._images.device),
        ):
            for inputs, labels in draws.batches(self._schedule.batch_size):
                if before_step is not None:
                    before_step(draws.generator)
                found.append((self._captured or self._step)(inputs, labels))
        losses, norms = (torch.stack(values) for values in zip(*found, strict=True))
        return losses, norms

    def _step(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        trained = list(self._parameters.values())
        part = images_of_part(self._network, inputs) if self._in_parts else len(inputs)
        value, gradients = _gradients(self._on_pixels, trained, inputs, labels, part, self._engine.precision)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        self._optimizer.step()
        return value, norm

    def _on_pixels(self, pixels: Tensor, labels: Tensor) -> Tensor:
        return self._loss(self._images.as_inputs(pixels), labels)

    def momenta(self) -> dict[str, Tensor]:
        """Return the momenta by the names of their parameters; parameters that took no part yet have none."""
        state = self._optimizer.state
        found = {name: state.get(one, {}).get("momentum_buffer") for name, one in self._parameters.items()}
        return {name: momentum for name, momentum in found.items() if momentum is not None}


def accuracy(network: nn.Module, images: ImageSet) -> float:
    """Return the fraction of correctly classified images; the network is left in eval mode."""
    return count_correct(network, images) / len(images)


def count_correct(network: nn.Module, images: ImageSet, *, batch_size: int | None = None) -> int:
    """Return the number of correctly classified images; the network is left in eval mode."""
    device = images.device
    size = batch_size or (EVALUATION_BATCH_CUDA if device.type == "cuda" else EVALUATION_BATCH)
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode(), products_at("float32", device):
        for batch, labels in images.batches(size):
            correct += (network(images.as_inputs(batch)).argmax(dim=1) == labels).sum()
    return int(correct)


def _gradients(
    loss: Loss, parameters: list[nn.Parameter], inputs: Tensor, labels: Tensor, part: int, precision: str
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the batch's loss and its gradients, None where a parameter takes no part, from `part` images at a time.

    Not by `backward`, which would add the next part's gradients in place: those of a sum's
    terms may lie in one memory.
    """
    total: Tensor | None = None
    gradients: list[Tensor | None] = [None] * len(parameters)
    for inputs_part, labels_part in zip(inputs.split(part), labels.split(part), strict=True):
        with forward_at(precision, inputs.device):
            value = loss(inputs_part, labels_part)
        if len(inputs_part) < len(inputs):
            value = value * (len(inputs_part) / len(inputs))
        some = torch.autograd.grad(value, parameters, allow_unused=True)
        gradients = [_sum(one, other) for one, other in zip(gradients, some, strict=True)]
        total = _sum(total, value.detach())
    assert total is not None
    return total, gradients


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one + other if one is not None and other is not None else one if other is None else other


def images_of_part(network: nn.Module, inputs: Tensor) -> int:
    """Return how many images of a batch go through `network` at once: all of them, but for the sake of a CPU's cache.

    All too where batch-norm is in training, for there an image's response depends on the others of its batch.
    """
    normalises = any(isinstance(one, nn.modules.batchnorm._BatchNorm) and one.training for one in network.modules())
    return PART if inputs.device.type == "cpu" and not normalises else len(inputs)


@contextmanager
def random_numbers_of(draws: EpochDraws, network: nn.Module, *, compiled: bool) -> Iterator[None]:
    """Let dropout draw from the epoch's seed, what is no nn.Dropout too: torch's own generators are lent a seed."""
    device = draws.device
    # A compiled graph cannot draw from a generator of its own: there dropout draws from torch's, with the lent seed.
    own = nullcontext() if compiled else dropout_by(network, draws.keep)
    with own, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(draws.global_seed)
        yield


def check_finite(losses: Tensor, norms: Tensor, epoch: int, lr: float) -> None:
    """Raise DivergedError naming the first step of `epoch` (0 is the first) whose loss or gradient is not finite."""
    finite = torch.isfinite(losses) & torch.isfinite(norms)
    if not finite.all():
        step = int((~finite).nonzero()[0])
        what, value = ("loss", losses[step]) if not losses[step].isfinite() else ("gradient's norm", norms[step])
        raise DivergedError(
            f"the {what} became {float(value)} at step {step + 1} of epoch {epoch + 1} with learning rate {lr:g}; "
            "lower the learning rate"
        )


def state(network: nn.Module, momenta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint between epochs; `momenta` by the names of their parameters."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    return tensors | {f"momentum.{name}": momentum for name, momentum in momenta.items()}


def restore(network: nn.Module, checkpoint: CheckpointSlot | None) -> tuple[list[EpochRecord], dict[str, Tensor]]:
    """Put what a checkpoint holds, if anything, into `network`; return its history and momenta."""
    saved = None if checkpoint is None else checkpoint.load()
    if saved is None:
        return [], {}
    tensors, description = saved
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "momentum": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    restore_state(network, parts["network"], "the checkpoint of a training that was interrupted")
    return [EpochRecord(**record) for record in description["history"]], parts["momentum"]
