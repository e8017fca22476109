"""The training loop: SGD with step decay, resumable at every epoch.

All random numbers of an epoch come from (seed, epoch), so a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gross_ray.data.image_set import ImageSet
from gross_ray.errors import DivergedError, GrossRayError, InvalidValueError
from gross_ray.nn.memory_format import memory_format_of
from gross_ray.nn.precision import forward_at, products_at
from gross_ray.seeds import derive_seed
from gross_ray.training.capture import CapturedStep, captures
from gross_ray.training.draws import EpochDraws, dropout_by
from gross_ray.training.kernels import kernels_of
from gross_ray.training.options import EngineOptions, Schedule
from gross_ray.weights import restore_state

EVALUATION_BATCH = 250
"""Images per forward pass that measures accuracy on a CPU; more do not fit its cache."""
EVALUATION_BATCH_CUDA = 2500
"""Images per forward pass that measures accuracy on a GPU; fewer do not fill it."""
PART = 64
"""Images per pass within a step on a CPU; more do not fit its cache. A constant, because rounding depends on it."""

FLOAT32 = EngineOptions()
"""The default engine: float32, nothing compiled, one training at a time."""

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes normalised images (B, 3, H, W), in the memory format of their set, and labels (B,)."""


@dataclass(frozen=True)
class EpochRecord:
    """The results of one epoch: columns of the `history` table."""

    epoch: int
    lr: float
    train_loss: float
    gradient_norm: float
    val_accuracy: float | None
    seconds: float
    images_per_second: float


class CheckpointSlot(Protocol):
    """Stores the state of one training between epochs."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the last saved state, or None."""
        ...

    def save(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Replace the saved state atomically."""
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
    """Train `parameters` of `network` in place and return one record per epoch.

    `loss` returns a scalar. `before_step` receives the epoch's generator, to draw the configuration; `set_mode` is
    called before each epoch (train or eval); `measure` returns the validation accuracy after each. Epochs stored in
    `checkpoint` are not repeated. With `in_parts`, for a loss that is a mean over images, a CPU computes a batch in
    parts that fit its cache; the step is the same up to rounding.

    Raises DivergedError, naming the step and the learning rate, if a loss or gradient is not finite, and
    InvalidValueError if `engine` captures steps and `before_step` is set.
    """
    if captures(engine, images.device) and before_step is not None:  # each configuration would need its own graph
        raise InvalidValueError(
            "engine.capture = True: this loop cannot capture steps that draw a configuration; train the supernet with "
            "reconstruct_together or finetune_together, or set engine.capture=false"
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
            checkpoint.save(state(network, steps.momenta()), {"history": [asdict(each) for each in history]})
        if on_epoch is not None:
            on_epoch(record)
    return history


class _Steps:
    """The steps of one training: stochastic gradient descent on `parameters`, captured if `engine` says so."""

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
        """Start from `momenta`, by the names of their parameters."""
        self._network, self._images, self._schedule = network, images, schedule
        self._parameters, self._engine, self._in_parts = parameters, engine, in_parts
        self._loss: Loss = torch.compile(loss) if engine.compile else loss
        self._fused = "fused-sgd" in engine.kernels
        self._optimizer = torch.optim.SGD(
            list(parameters.values()),
            lr=schedule.lr,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            fused=self._fused or None,
        )
        if self._fused and schedule.momentum:  # torch's kernel takes momenta of all parameters or of none
            momenta = {name: torch.zeros_like(each) for name, each in parameters.items()} | dict(momenta)
        for name, momentum in momenta.items():
            buffer = torch.empty_like(parameters[name])  # its memory format, and so the rounding, is the parameter's
            self._optimizer.state[parameters[name]]["momentum_buffer"] = buffer.copy_(momentum)
        self.dropout = torch.Generator(images.device)
        """Draws the factors of dropout."""
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
        """Do the steps of one epoch; return the loss and the gradient norm of each, (steps,) both."""
        results: list[tuple[Tensor, ...]] = []
        with (
            random_numbers_of(draws, self._network, compiled=self._engine.compile),
            products_at(self._engine.precision, self._images.device),
            kernels_of(self._engine, self._network),
        ):
            at_once = "epoch-crops" in self._engine.kernels
            for inputs, labels in draws.batches(self._schedule.batch_size, at_once=at_once):
                if before_step is not None:
                    before_step(draws.generator)
                results.append((self._captured or self._step)(inputs, labels))
        losses, norms = (torch.stack(values) for values in zip(*results, strict=True))
        return losses, norms

    def _step(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        trained = list(self._parameters.values())
        part = images_of_part(self._network, inputs) if self._in_parts else len(inputs)

        def loss(pixels: Tensor, labels: Tensor) -> Tensor:
            return self._loss(self._images.as_inputs(pixels), labels)

        value, gradients = _gradients(loss, trained, inputs, labels, part, self._engine.precision)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None and self._fused and gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)  # the fused kernel reads memory in its order
            parameter.grad = gradient
        known = [gradient for gradient in gradients if gradient is not None]
        norm = torch.nn.utils.get_total_norm(known) if known else torch.zeros_like(value)
        self._optimizer.step()
        return value, norm

    def momenta(self) -> dict[str, Tensor]:
        """Return the momenta by the names of their parameters; those without a gradient so far have none, or zeros."""
        state = self._optimizer.state
        buffers = {name: state.get(term, {}).get("momentum_buffer") for name, term in self._parameters.items()}
        return {name: momentum for name, momentum in buffers.items() if momentum is not None}


def accuracy(network: nn.Module, images: ImageSet) -> float:
    """Return the fraction of correctly classified images; leaves the network in eval mode."""
    return count_correct(network, images) / len(images)


def count_correct(network: nn.Module, images: ImageSet, *, batch_size: int | None = None) -> int:
    """Return the number of correctly classified images; leaves the network in eval mode."""
    device = images.device
    size = batch_size or (EVALUATION_BATCH_CUDA if device.type == "cuda" else EVALUATION_BATCH)

    def count(images: ImageSet) -> int:
        correct = torch.zeros((), dtype=torch.int64, device=device)
        with torch.inference_mode(), products_at("float32", device):
            for batch, labels in images.batches(size):
                correct += (network(images.as_inputs(batch)).argmax(dim=1) == labels).sum()
        return int(correct)

    network.eval()
    return run_in_format_of(network, images, count)


def run_in_format_of(network: nn.Module, images: ImageSet, run: Callable[[ImageSet], T], *, trained: bool = False) -> T:
    """Return `run(images)`, or if `network` fails on that memory format but not on the other, `run` of images in that.

    Before the second call, the network's buffers get their values from before the first. With `trained`, `run` trains.
    """
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        return run(images)
    except GrossRayError:
        raise
    except Exception:  # whatever the network's own code raises
        other = in_format_of(network, images, trained=trained)
        if other.memory_format == images.memory_format:
            raise
    with torch.no_grad():
        for buffer, values in before:
            buffer.copy_(values)
    return run(other)


def in_first_format(images: ImageSet, engine: EngineOptions, *networks: nn.Module) -> ImageSet:
    """Return the images in the memory format in which a training is tried first; `networks` are brought into it too."""
    if "contiguous" not in engine.kernels:
        return images
    for network in networks:
        network.to(memory_format=torch.contiguous_format)
    return replace(images, memory_format=torch.contiguous_format)


def in_format_of(network: nn.Module, images: ImageSet, *, trained: bool = False) -> ImageSet:
    """Return the same images in the memory format that `network` runs, or with `trained` can be trained, in."""
    memory_format = memory_format_of(network, images.images.shape[1:], trained=trained)
    return replace(images, memory_format=memory_format)


def _gradients(
    loss: Loss, parameters: list[nn.Parameter], inputs: Tensor, labels: Tensor, part: int, precision: str
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the batch's loss and gradients (None for an unused parameter), computed from `part` images at a time.

    `backward` would accumulate in place, which is wrong for gradients that share memory, like those of a sum's terms.
    """
    total: Tensor | None = None
    gradients: list[Tensor | None] = [None] * len(parameters)
    for inputs_part, labels_part in zip(inputs.split(part), labels.split(part), strict=True):
        with forward_at(precision, inputs.device):
            value = loss(inputs_part, labels_part)
        if len(inputs_part) < len(inputs):
            value = value * (len(inputs_part) / len(inputs))
        of_part: Sequence[Tensor | None] = [None] * len(parameters)
        if value.requires_grad:  # not where every decomposed layer runs its original convolution
            of_part = torch.autograd.grad(value, parameters, allow_unused=True)
        gradients = [_sum(so_far, more) for so_far, more in zip(gradients, of_part, strict=True)]
        total = _sum(total, value.detach())
    assert total is not None
    return total, gradients


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return left + right if left is not None and right is not None else left if right is None else right


def images_of_part(network: nn.Module, inputs: Tensor) -> int:
    """Return how many images of a batch go through `network` at once: PART on a CPU, else all.

    All on a CPU too if a batch-norm is in training mode: an image's response then depends on the rest of its batch.
    """
    normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules())
    return PART if inputs.device.type == "cpu" and not normalises else len(inputs)


@contextmanager
def random_numbers_of(draws: EpochDraws, network: nn.Module, *, compiled: bool) -> Iterator[None]:
    """Within the block, seed dropout and torch's global generators from the epoch's seed."""
    device = draws.device
    # A compiled graph cannot draw from a generator of ours: its dropout uses torch's global one.
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
    """Load the checkpoint's state, if any, into `network`; return its history and momenta."""
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
