"""The one training loop: SGD with step decay over device-resident images, resumable at every epoch.

All random numbers of an epoch come from (seed, epoch), so that a resumed training is equal to an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gross_ray.data.augment import augment, normalise
from gross_ray.data.images import ImageSet
from gross_ray.errors import DivergedError
from gross_ray.experiment import Schedule
from gross_ray.seeds import derive_seed

EVALUATION_BATCH = 250
"""Images a forward pass when only the accuracy is wanted; larger ones leave the CPU's cache."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did: the columns of the `history` table."""

    epoch: int
    lr: float
    train_loss: float
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
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int,
    set_mode: Callable[[], object],
    before_step: Callable[[torch.Generator], object] | None = None,
    measure: Callable[[], float] | None = None,
    checkpoint: CheckpointSlot | None = None,
    on_epoch: Callable[[EpochRecord], object] | None = None,
) -> list[EpochRecord]:
    """Train `parameters` of `network` in place and return one record an epoch.

    `loss(inputs, labels)` takes normalised images (B, 3, H, W) and returns a scalar. `before_step` is given the
    epoch's generator (it draws the configuration), `set_mode` is called before each epoch (train or eval), `measure`
    returns the validation accuracy after one. Epochs found in `checkpoint` are not done again. Raises DivergedError,
    naming the step and the learning rate, if a loss is not finite.
    """
    optimizer = torch.optim.SGD(
        list(parameters.values()), lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
    )
    history = _restore(network, parameters, optimizer, checkpoint)
    for epoch in range(len(history), schedule.epochs):
        started = time.perf_counter()
        lr = schedule.lr_at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        set_mode()
        mean_loss = _one_epoch(images, schedule, optimizer, loss, derive_seed(seed, epoch), before_step, epoch, lr)
        seconds = time.perf_counter() - started
        record = EpochRecord(
            epoch=epoch + 1,
            lr=lr,
            train_loss=mean_loss,
            val_accuracy=None if measure is None else measure(),
            seconds=seconds,
            images_per_second=len(images) / seconds,
        )
        history.append(record)
        if checkpoint is not None:
            checkpoint.save(_state(network, parameters, optimizer), {"history": [asdict(one) for one in history]})
        if on_epoch is not None:
            on_epoch(record)
    return history


def accuracy(network: nn.Module, images: ImageSet) -> float:
    """Return the fraction of correctly classified images; the network is left in eval mode."""
    return count_correct(network, images) / len(images)


def count_correct(network: nn.Module, images: ImageSet, *, batch_size: int = EVALUATION_BATCH) -> int:
    """Return the number of correctly classified images; the network is left in eval mode."""
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.images.device)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = normalise(images.images[start : start + batch_size])
            logits = network(batch.contiguous(memory_format=torch.channels_last))
            correct += (logits.argmax(dim=1) == images.labels[start : start + batch_size]).sum()
    return int(correct)


def _one_epoch(
    images: ImageSet,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int,
    before_step: Callable[[torch.Generator], object] | None,
    epoch: int,
    lr: float,
) -> float:
    device = images.images.device
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).to(device)
    losses = []
    # Dropout draws from torch's global generators: they are lent the epoch's seed and given back as they were.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in order.split(schedule.batch_size):
            inputs = images.images[batch]
            if schedule.augment:
                inputs = augment(inputs, generator)
            if before_step is not None:
                before_step(generator)
            optimizer.zero_grad(set_to_none=True)
            value = loss(normalise(inputs).contiguous(memory_format=torch.channels_last), images.labels[batch])
            value.backward()
            optimizer.step()
            losses.append(value.detach())
    values = torch.stack(losses)
    finite = torch.isfinite(values)
    if not finite.all():
        step = int((~finite).nonzero()[0])
        raise DivergedError(
            f"the loss became {float(values[step])} at step {step + 1} of epoch {epoch + 1} with learning rate {lr:g}; "
            "lower the learning rate"
        )
    return float(values.mean())


def _state(
    network: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in parameters.items():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    return tensors


def _restore(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    checkpoint: CheckpointSlot | None,
) -> list[EpochRecord]:
    saved = None if checkpoint is None else checkpoint.load()
    if saved is None:
        return []
    tensors, description = saved
    prefix = "network."
    network.load_state_dict({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})
    for name, parameter in parameters.items():
        if (momentum := tensors.get(f"momentum.{name}")) is not None:
            buffer = torch.empty_like(parameter)  # keeps the parameter's memory format, and with it every rounding
            optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(momentum)
    return [EpochRecord(**record) for record in description["history"]]
