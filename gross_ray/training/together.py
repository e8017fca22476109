"""Train several supernets in one batched pass, each as if it were trained alone, up to rounding.

Each supernet draws the same random numbers (order, crops, configurations, dropout) and writes the same checkpoints as
if it were trained alone. Shapes: S supernets, B images of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import DivergedError, InvalidValueError, one_line
from gross_ray.nn.copies import copied
from gross_ray.nn.precision import forward_at, products_at
from gross_ray.seeds import derive_seed
from gross_ray.space import SearchSpace
from gross_ray.supernet.configure import largest_decomposed, series_layers, set_configuration
from gross_ray.supernet.stacked import SupernetStack
from gross_ray.training.capture import CapturedStep, captures
from gross_ray.training.draws import EpochDraws, dropout_by
from gross_ray.training.kernels import kernels_of
from gross_ray.training.loop import (
    FLOAT32,
    CheckpointSlot,
    EpochRecord,
    accuracy,
    check_finite,
    images_of_part,
    in_first_format,
    restore,
    run_in_format_of,
    state,
)
from gross_ray.training.options import EngineOptions, Schedule
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import (
    Responses,
    freeze_all_but_series,
    total_response_error,
    train_with_fixed_statistics,
)

Outcome = list[EpochRecord] | DivergedError
Goal = Tensor | dict[str, list[Tensor]]
"""The target of a loss: labels (S, B), or the responses (S, B, ...) of each call, by layer."""
MemberLoss = Callable[[Callable[[Tensor], Tensor], Any, Tensor, Any], Tensor]
"""Takes one member's network, its recorder (`_Stage.watch`), inputs (B, 3, H, W) and goal; returns a scalar."""


@dataclass(frozen=True)
class Member:
    """One of several supernets, with the arguments of its training."""

    supernet: nn.Module
    seed: int
    sampler: ConfigurationSampler
    checkpoint: CheckpointSlot | None = None
    on_epoch: Callable[[EpochRecord], object] | None = None


@dataclass(frozen=True)
class _Stage:
    """The differences between reconstruction and fine-tuning."""

    loss: MemberLoss
    set_mode: Callable[[nn.Module], object]
    targets: Callable[[Tensor], Goal] | None = None
    """Returns the goal for inputs (S, B, 3, H, W); None: the labels, and the loss is a mean over images."""
    watch: Callable[[nn.Module], Responses] | None = None
    """Takes the template network, which runs all members, and returns the recorder that the loss reads."""


def reconstruct_together(
    members: Sequence[Member],
    original: nn.Module,
    splits: Splits,
    schedule: Schedule,
    *,
    engine: EngineOptions = FLOAT32,
) -> list[Outcome]:
    """Run `reconstruct` for all members together; a member that diverges gets the error in place of its history.

    Raises InvalidValueError for supernets of different networks, and for networks that cannot be batched.
    """
    names = list(series_layers(members[0].supernet))

    def targets(inputs: Tensor) -> Goal:
        with Responses(original, names) as theirs, torch.no_grad():
            original(inputs.flatten(0, 1))
            calls = theirs.take()
            return {name: [output.unflatten(0, inputs.shape[:2]) for output in calls[name]] for name in names}

    def loss(network: Callable[[Tensor], Tensor], ours: Responses, inputs: Tensor, goal: Any) -> Tensor:
        network(inputs)
        return total_response_error(ours.take(), goal)

    stage = _Stage(loss, nn.Module.eval, targets, lambda template: Responses(template, names))

    def run(images: ImageSet) -> list[Outcome]:
        original.eval().to(memory_format=images.memory_format)
        return _train_all(members, replace(splits, train=images), schedule, engine, stage)

    with _naming_options(engine):
        return run_in_format_of(members[0].supernet, _in_first_format(members, splits, engine), run, trained=True)


def finetune_together(
    members: Sequence[Member], splits: Splits, schedule: Schedule, *, engine: EngineOptions = FLOAT32
) -> list[Outcome]:
    """Run `finetune` for all members together; a member that diverges gets the error in place of its history.

    Raises InvalidValueError for supernets of different networks, and for networks that cannot be batched.
    """
    with _naming_options(engine):
        return _finetune(members, splits, schedule, engine)


def _finetune(members: Sequence[Member], splits: Splits, schedule: Schedule, engine: EngineOptions) -> list[Outcome]:
    def run(images: ImageSet) -> list[Outcome]:
        return _train_all(members, replace(splits, train=images), schedule, engine, _FINETUNING)

    return run_in_format_of(members[0].supernet, _in_first_format(members, splits, engine), run, trained=True)


def _in_first_format(members: Sequence[Member], splits: Splits, engine: EngineOptions) -> ImageSet:
    return in_first_format(splits.train, engine, *(member.supernet for member in members))


_FINETUNING = _Stage(
    lambda network, _, inputs, labels: F.cross_entropy(network(inputs), labels), train_with_fixed_statistics
)


def check_stackable(supernet: nn.Module, shape: Sequence[int], engine: EngineOptions) -> None:
    """Raise InvalidValueError if `finetune_together` could not train `supernet` on images (C, H, W).

    The error names the engine options to change. The supernet stays unchanged.
    """
    images = ImageSet(torch.zeros(2, *shape, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    member = Member(copied(supernet), 0, ConfigurationSampler(SearchSpace.of(supernet), 0.0))
    plain = replace(engine, compile=False, capture=False, precision="float32")
    splits = Splits("", images, images, images, ())
    with _naming_options(engine):
        try:
            _finetune([member], splits, Schedule(epochs=1, lr=1e-9), plain)
        except (RuntimeError, NotImplementedError) as error:  # torch.func lacks a rule for an operation
            raise _NoStackError(f"the network cannot be mapped over several supernets: {one_line(error)}") from None


class _NoStackError(Exception):
    """A supernet cannot be part of a stack."""


@contextmanager
def _naming_options(engine: EngineOptions) -> Iterator[None]:
    """Re-raise `_NoStackError` as InvalidValueError, naming the engine options to change."""
    stacking = {
        "engine.parallel_seeds=1": engine.parallel_seeds > 1,
        "engine.capture=false": engine.capture,
        "engine.compile=false": engine.compile,
    }
    options = [option for option, stacks in stacking.items() if stacks] or ["engine.parallel_seeds=1"]
    try:
        yield
    except _NoStackError as error:
        raise InvalidValueError(f"{error}: train such supernets one by one ({', '.join(options)})") from None


def _train_all(
    members: Sequence[Member], splits: Splits, schedule: Schedule, engine: EngineOptions, stage: _Stage
) -> list[Outcome]:
    """Train each member from its checkpoint on; members with equally many finished epochs are trained together."""
    starts = []
    for member in members:
        freeze_all_but_series(member.supernet)
        starts.append(restore(member.supernet, member.checkpoint))
    outcomes: dict[int, Outcome] = {}
    for done in sorted({len(history) for history, _ in starts}):
        group = [index for index, (history, _) in enumerate(starts) if len(history) == done]
        momenta = [starts[index][1] for index in group]
        steps = _Steps([members[index] for index in group], momenta, schedule, engine, stage)
        histories = [starts[index][0] for index in group]
        outcomes |= dict(zip(group, _epochs(steps, histories, splits, schedule, stage), strict=True))
    return [outcomes[index] for index in range(len(members))]


def _epochs(
    steps: _Steps, histories: list[list[EpochRecord]], splits: Splits, schedule: Schedule, stage: _Stage
) -> list[Outcome]:
    """Train to the last epoch, dropping members that diverge; return each member's history or error."""
    outcomes: list[Outcome] = list(histories)
    alive = list(range(len(histories)))
    for epoch in range(len(histories[0]), schedule.epochs):
        if not alive:
            break
        started = time.perf_counter()
        lr = schedule.lr_at(epoch)
        losses, norms = (each.cpu() for each in steps.epoch(splits.train, epoch, lr))  # .cpu() waits for the device
        seconds = (time.perf_counter() - started) / len(alive)
        finite = []
        for column, index in enumerate(alive):
            try:
                check_finite(losses[:, column], norms[:, column], epoch, lr)
            except DivergedError as error:
                outcomes[index] = error
                continue
            finite.append(column)
            member, supernet = steps.members[column], steps.stack.write_back(column)
            if stage.targets is None:
                set_configuration(supernet, largest_decomposed(supernet))
            record = EpochRecord(
                epoch=epoch + 1,
                lr=lr,
                train_loss=float(losses[:, column].mean()),
                gradient_norm=float(norms[:, column].mean()),
                val_accuracy=accuracy(supernet, splits.validation) if stage.targets is None else None,
                seconds=seconds,
                images_per_second=schedule.images_of(len(splits.train)) / seconds,
            )
            histories[index].append(record)
            if member.checkpoint is not None:
                history = [asdict(each) for each in histories[index]]
                member.checkpoint.save(state(supernet, steps.momenta(column)), {"history": history})
            if member.on_epoch is not None:
                member.on_epoch(record)
        if len(finite) < len(alive):
            alive = [alive[column] for column in finite]
            if alive:
                steps.select(finite)
    return outcomes


class _Steps:
    """The steps of members that have finished the same number of epochs."""

    def __init__(
        self,
        members: list[Member],
        momenta: Sequence[Mapping[str, Tensor]],
        schedule: Schedule,
        engine: EngineOptions,
        stage: _Stage,
    ) -> None:
        self.members = members
        self._schedule, self._engine, self._stage = schedule, engine, stage
        device = next(members[0].supernet.parameters()).device
        self.stack = SupernetStack([member.supernet for member in members], engine.kernels)
        zeros = (
            {name: torch.zeros_like(term) for name, term in member.supernet.named_parameters() if term.requires_grad}
            for member in members
        )
        self._momenta = self.stack.stack([zero | dict(known) for zero, known in zip(zeros, momenta, strict=True)])
        self._lay_flat()
        self._dropouts = {
            module: name for name, module in self.stack.template.named_modules() if type(module) is nn.Dropout
        }
        # Registered once, because compiled code cannot register hooks.
        self._watched = None if stage.watch is None else stage.watch(self.stack.template)
        self._masks: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] | None = None
        batched = vmap(self._loss)
        self._compiled = torch.compile(batched) if engine.compile else batched
        self._lr = 0.0
        self._as_inputs: Callable[[Tensor], Tensor] = torch.Tensor.float
        self._captured = CapturedStep(self._whole_step) if captures(engine, device) else None

    def epoch(self, images: ImageSet, epoch: int, lr: float) -> tuple[Tensor, Tensor]:
        """Do one epoch; return the losses and gradient norms of its steps, (steps, S) each."""
        size, template = self._schedule.batch_size, self.stack.template
        self._stage.set_mode(template)
        if lr != self._lr and self._captured is not None:
            self._captured.forget()
        self._lr, self._as_inputs = lr, images.as_inputs
        draws = [EpochDraws(images, derive_seed(member.seed, epoch), self._schedule) for member in self.members]
        drawn = [
            [member.sampler.draw(each.generator) for _ in range(0, each.num_images, size)]
            for member, each in zip(self.members, draws, strict=True)
        ]
        actives = self.stack.active(list(zip(*drawn, strict=True)))
        steps: list[tuple[Tensor, ...]] = []
        at_once = "epoch-crops" in self._engine.kernels
        batches = EpochDraws.batches_of_all(draws, size, at_once=at_once)
        precision = products_at(self._engine.precision, images.device)
        with dropout_by(template, self._keep), precision, kernels_of(self._engine, template):
            for active, (inputs, labels) in zip(actives, batches, strict=True):
                if self._captured is None:
                    steps.append(self._step(inputs, labels, active, draws))
                else:
                    masks = self._draw_masks(inputs, active, draws)
                    steps.append(self._captured(inputs, labels, *active.values(), *masks.values()))
        losses, norms = (torch.stack(values) for values in zip(*steps, strict=True))
        return losses, norms

    def _lay_flat(self) -> None:
        """Put all terms of a member into one row, and all momenta too, so that a step of SGD is a few kernels."""
        terms = self.stack.terms
        self._flat_terms, self.stack.terms = _rows(terms)
        self._flat_momenta, self._momenta = _rows(self._momenta)
        starts, count = {}, 0
        for name, layer in self.stack.layers.items():
            starts[name], count = count, count + len(layer.group_sizes)
        # For each element of a row, the index of its mask among the concatenated masks of all layers.
        indices = [
            (starts[name.rpartition(".")[0]] + torch.arange(term.shape[1])).repeat_interleave(term[0, 0].numel())
            for name, term in terms.items()
        ]
        self._mask_of = torch.cat(indices).to(self._flat_terms.device)

    def momenta(self, member: int) -> dict[str, Tensor]:
        """Return one member's momenta, by the names of its parameters."""
        return self.stack.unstack(self._momenta, member)

    def select(self, members: list[int]) -> None:
        """Continue with these members only."""
        self.members = [self.members[member] for member in members]
        self.stack.select(members)
        self._momenta = {name: momentum[members] for name, momentum in self._momenta.items()}
        self._lay_flat()
        if self._captured is not None:
            self._captured.forget()

    def _step(
        self, inputs: Tensor, labels: Tensor, active: dict[str, Tensor], draws: Sequence[EpochDraws]
    ) -> tuple[Tensor, Tensor]:
        """Do one step, on a CPU in parts of the batch; return the losses and gradient norms, (S,) each."""
        count = inputs.shape[1]
        whole = self._stage.targets is not None
        part = count if whole else images_of_part(self.stack.template, inputs[0])
        total: Tensor | None = None
        gradients: list[Tensor] = []
        for inputs_part, labels_part in zip(inputs.split(part, dim=1), labels.split(part, dim=1), strict=True):
            masks = self._draw_masks(inputs_part, active, draws)
            share = inputs_part.shape[1] / count
            losses, more = self._gradients(inputs_part, labels_part, active, masks, share)
            total = losses if total is None else total + losses
            gradients = [so_far + term for so_far, term in zip(gradients, more, strict=True)] if gradients else more
        assert total is not None
        return total, self._update(gradients, active)

    def _whole_step(self, inputs: Tensor, labels: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step of a whole batch; `masks` are those of the layers, followed by those of the dropouts."""
        assert self._shapes is not None
        names = [f"{layer}.active" for layer in self.stack.layers]
        active = dict(zip(names, masks[: len(names)], strict=True))
        kept = dict(zip(self._shapes, masks[len(names) :], strict=True))
        losses, gradients = self._gradients(inputs, labels, active, kept, 1.0)
        return losses, self._update(gradients, active)

    def _gradients(
        self, pixels: Tensor, labels: Tensor, active: dict[str, Tensor], masks: dict[str, Tensor], share: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the losses (S,) times `share`, and their gradients for the stacked terms."""
        images = self._as_inputs(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        terms = {name: term.detach().requires_grad_() for name, term in self.stack.terms.items()}
        with forward_at(self._engine.precision, pixels.device):
            goal = labels if self._stage.targets is None else self._stage.targets(images)
            values = self._batched(terms, active, masks, images, goal) * share
        return values.detach(), list(torch.autograd.grad(values.sum(), list(terms.values())))

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], active: dict[str, Tensor]) -> Tensor:
        """Take a step of SGD for the active terms, as torch.optim.SGD would; return the gradient norms (S,)."""
        gradient = torch.cat([term.flatten(1) for term in gradients], dim=1)
        part = torch.cat(list(active.values()), dim=1)[:, self._mask_of]
        step = gradient.add(self._flat_terms, alpha=self._schedule.weight_decay)
        step.add_(self._flat_momenta, alpha=self._schedule.momentum)
        self._flat_momenta.copy_(torch.where(part > 0, step, self._flat_momenta))
        self._flat_terms.sub_(self._flat_momenta * part, alpha=self._lr)
        return gradient.square().sum(1).sqrt()

    def _batched(self, *arguments: Any) -> Tensor:
        """Return the losses of all members, (S,)."""
        try:
            return self._compiled(*arguments)
        except RuntimeError as error:
            if "random operation" not in str(error):
                raise
            raise _NoStackError("the network draws random numbers other than by nn.Dropout") from None

    def _loss(
        self, terms: dict[str, Tensor], active: dict[str, Tensor], masks: dict[str, Tensor], images: Tensor, goal: Any
    ) -> Tensor:
        """Return the loss of one member; vmap maps this function over all members."""
        self._masks = masks
        template = self.stack.template
        loss = self._stage.loss(
            lambda inputs: functional_call(template, {**terms, **active}, (inputs,)), self._watched, images, goal
        )
        self._masks = {}  # torch.compile would return tensors that stay referenced from the graph
        if self._watched is not None:
            self._watched.take()
        return loss

    def _keep(self, dropout: nn.Dropout, inputs: Tensor) -> Tensor:
        return self._masks[self._dropouts[dropout]].to(inputs.dtype)

    def _draw_masks(self, pixels: Tensor, active: dict[str, Tensor], draws: Sequence[EpochDraws]) -> dict[str, Tensor]:
        """Draw each dropout's factors, (S, B, ...) by name, as each member would draw them alone."""
        if self._shapes is None:
            self._shapes = self._dropout_shapes(self._as_inputs(pixels[0]), active)
        modules = {name: module for module, name in self._dropouts.items()}
        masks: dict[str, list[Tensor]] = {name: [] for name in self._shapes}
        for each in draws:
            for name, shape in self._shapes.items():
                like = torch.empty(pixels.shape[1], *shape, device=pixels.device)
                masks[name].append(each.keep(modules[name], like))
        return {name: torch.stack(of_members) for name, of_members in masks.items()}

    def _dropout_shapes(self, images: Tensor, active: dict[str, Tensor]) -> dict[str, torch.Size]:
        """Return the shape of one image at each dropout, in the order of their calls."""
        shapes: dict[str, torch.Size] = {}

        def record(dropout: nn.Dropout, inputs: Tensor) -> Tensor:
            name = self._dropouts[dropout]
            if name in shapes:
                raise _NoStackError(f"dropout {name!r} is used twice in one pass")
            shapes[name] = inputs.shape[1:]
            return torch.ones_like(inputs)

        first = {name: tensor[0] for name, tensor in (self.stack.terms | active).items()}
        with torch.no_grad(), dropout_by(self.stack.template, record):
            functional_call(self.stack.template, first, (images,))
        if self._watched is not None:
            self._watched.take()  # drop the responses: this pass belongs to no step
        return shapes


def _rows(tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the tensors (S, ...) concatenated to (S, n), and views of the result in their own shapes."""
    rows = torch.cat([tensor.flatten(1) for tensor in tensors.values()], dim=1)
    parts = rows.split([tensor[0].numel() for tensor in tensors.values()], dim=1)
    return rows, {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
