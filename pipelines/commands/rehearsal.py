"""Rehearse a new experiment on a few images: a step of each training, and an evaluation of the search."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import DivergedError, GrossRayError, InvalidValueError, one_line
from gross_ray.experiment import Experiment
from gross_ray.export import export_network
from gross_ray.search.evaluator import Evaluator
from gross_ray.search.options import EvaluationOptions
from gross_ray.space import SearchSpace
from gross_ray.supernet.build import made_up
from gross_ray.supernet.configure import extract, largest_decomposed
from gross_ray.training.loop import run_in_format_of
from gross_ray.training.options import Schedule
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import finetune, reconstruct, train_network, train_with_fixed_statistics
from gross_ray.training.together import Member, finetune_together, reconstruct_together

FEW = 2
"""Images of a step: the fewest that every batch-norm can be trained on."""
MOST_PIXELS = 2**20
"""Most pixels of a batch, 256 images of 64x64: larger ones are cut, since a worker may have more memory than this."""
ANY_RATE = 1e-9
"""Learning rate of a step whose schedule leaves it open."""
UNLIMITED = 2**50
"""Bytes: a memory budget that limits no batch, because a worker's automatic budget is not known here."""
Step = Callable[[Splits, Schedule], object]


@dataclass(frozen=True)
class _Training:
    """A training of an experiment."""

    field: str
    """The experiment's field with its schedule."""
    schedule: Schedule
    step: Step
    """Trains on these splits by this schedule."""
    needs: str
    """What a step needs from the network."""
    set_mode: Callable[[], nn.Module] | None = None
    """Sets the training mode of a step and returns the network; None: steps run in evaluation mode."""


def rehearse(
    experiment: Experiment,
    splits: Splits,
    network: nn.Module,
    supernet: nn.Module,
    *,
    original: nn.Module,
    stacked: bool,
) -> None:
    """Raise InvalidValueError, naming the stage, for whatever else would fail in a stage of `experiment`.

    `original` is `network` with the plain convolutions that `supernet` decomposes. The networks run batches as large as
    those of each training in training mode. Each training takes a step of two images, and one of a single image if it
    has such a batch; with `stacked`, supernets are trained as a stack. The search evaluates two configurations. The
    weights of the networks change; the series get random ones first, because their decompositions are not known yet.
    """
    made_up(supernet, torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stages themselves warn
        done: set[tuple[object, int]] = set()
        for training in _trainings(experiment, network, original, supernet, stacked=stacked):
            _rehearse_batches(training, splits.train, experiment.model, done)
            _rehearse_training(training, splits, experiment.model, done)
        _rehearse_search(experiment, _first(splits, FEW), supernet)


def rehearse_export(model: str, supernet: nn.Module, input_shape: Sequence[int], endings: Sequence[str]) -> None:
    """Raise InvalidValueError if a network of `supernet` cannot be exported as a file with one of these endings."""
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        plain = extract(supernet, largest_decomposed(supernet))
        for ending in endings:
            try:
                export_network(plain, Path(folder) / f"network{ending}", input_shape)
            except GrossRayError as error:
                raise InvalidValueError(f"model {model!r}: {error}") from error


def _trainings(
    experiment: Experiment, network: nn.Module, original: nn.Module, supernet: nn.Module, *, stacked: bool
) -> Iterator[_Training]:
    """Yield the trainings in their order, at the experiment's precision if this machine's CPU has it."""
    sampler = ConfigurationSampler(SearchSpace.of(supernet), 0.0)
    precision = _on_a_cpu(experiment.engine.precision)
    engine = replace(experiment.engine, compile=False, capture=False, precision=precision)
    members = [Member(supernet, 0, sampler)]

    def base(few: Splits, schedule: Schedule) -> object:
        return train_network(network, few, schedule, seed=0, engine=engine)

    def reconstruction(few: Splits, schedule: Schedule) -> object:
        return reconstruct(supernet, original, few, schedule, seed=0, sampler=sampler, engine=engine)

    def finetuning(few: Splits, schedule: Schedule) -> object:
        return finetune(supernet, few, schedule, seed=0, sampler=sampler, engine=engine)

    def own_finetuning(few: Splits, schedule: Schedule) -> object:
        trainable = experiment.validation.trainable
        return finetune(supernet, few, schedule, seed=0, sampler=sampler, trainable=trainable, engine=engine)

    def stacked_reconstruction(few: Splits, schedule: Schedule) -> object:
        return reconstruct_together(members, original, few, schedule, engine=engine)

    def stacked_finetuning(few: Splits, schedule: Schedule) -> object:
        return finetune_together(members, few, schedule, engine=engine)

    def fixed_statistics() -> nn.Module:
        train_with_fixed_statistics(supernet)
        return supernet

    of_base = "float32 images, logits from the network in training mode, and their gradients"
    of_responses = "the outputs of its decomposed layers in evaluation mode, and gradients of these alone"
    of_logits = "logits in training mode with batch-norms in evaluation mode, and gradients of its decomposed layers"
    first, second = (stacked_reconstruction, stacked_finetuning) if stacked else (reconstruction, finetuning)
    alone = experiment.validation
    if experiment.trains_base:
        yield _Training("training", experiment.training, base, of_base, network.train)
    yield _Training("reconstruction", experiment.reconstruction, first, of_responses)
    yield _Training("finetuning", experiment.finetuning, second, of_logits, fixed_statistics)
    yield _Training("validation.reconstruction", alone.reconstruction, reconstruction, of_responses)
    if alone.trainable == "all":
        yield _Training("validation.finetuning", alone.finetuning, own_finetuning, of_base, supernet.train)
    else:
        yield _Training("validation.finetuning", alone.finetuning, own_finetuning, of_logits, fixed_statistics)


def _rehearse_training(training: _Training, splits: Splits, model: str, done: set[tuple[object, int]]) -> None:
    """Take a step of FEW images, and one of a single image, as far as the training has such batches, unless `done`."""
    schedule, count = training.schedule, len(splits.train)
    sizes = {min(size, FEW) for size in _batch_sizes(schedule, count)}
    for size in sorted(sizes, reverse=True):
        if (training.step, size) in done:
            continue
        done.add((training.step, size))
        try:
            few = replace(schedule, epochs=1, images=0, batch_size=size, lr=schedule.lr or ANY_RATE)
            training.step(_first(splits, size), few)
        except DivergedError:  # of weights that are made up
            pass
        except InvalidValueError:
            raise
        except Exception as error:  # whatever the user's own code raises
            if size == 1:
                raise _batch_error(training.field, schedule, count, 1, model, error) from None
            raise InvalidValueError(
                f"model {model!r}: a step of {training.field} fails: {one_line(error)}; it needs {training.needs}"
            ) from None


def _rehearse_batches(training: _Training, images: ImageSet, model: str, done: set[tuple[object, int]]) -> None:
    """Run batches of the sizes of a training in its training mode, as far as MOST_PIXELS allow, unless `done`."""
    if training.set_mode is None:
        return
    network, most = training.set_mode(), max(1, MOST_PIXELS // images.images[0, 0].numel())

    def run(laid_out: ImageSet, size: int) -> None:
        with torch.no_grad():
            network(laid_out.as_inputs(images.images[: min(size, most)]))

    for size in sorted(_batch_sizes(training.schedule, len(images))):
        if (network, size) in done:
            continue
        done.add((network, size))
        try:
            run_in_format_of(network, images, partial(run, size=size), trained=True)
        except Exception as error:  # whatever the user's own code raises
            raise _batch_error(training.field, training.schedule, len(images), size, model, error) from None


def _batch_sizes(schedule: Schedule, num_images: int) -> set[int]:
    """Return the sizes of a training's batches: that of all but the last, and the last one's."""
    count = schedule.images_of(num_images)
    size = min(schedule.batch_size, count)
    return {size, count % size or size}


def _batch_error(
    field: str, schedule: Schedule, num_images: int, size: int, model: str, error: Exception
) -> InvalidValueError:
    """Return the error for a network that cannot be trained on a batch of `size` images, with a size that avoids it."""
    count, batch_size = schedule.images_of(num_images), schedule.batch_size
    what = f"model {model!r} cannot be trained on"
    if size == 1 < min(batch_size, count):
        what = f"the last of {count} images is a batch by itself, which {what}"
    else:
        what += " a single image" if size == 1 else f" a batch of {size} images"
    remedy = f"set another {field}.batch_size"
    if size == 1:
        other = (*range(batch_size + 1, count + 1), *range(min(batch_size, count) - 1, 1, -1))
        better = next((fitting for fitting in other if count % fitting != 1), None)
        remedy = "take more images" if better is None else f"{remedy}, like {better}"
    return InvalidValueError(f"{field}.batch_size = {batch_size}: {what}: {one_line(error)}; {remedy}")


def _rehearse_search(experiment: Experiment, few: Splits, supernet: nn.Module) -> None:
    """Evaluate the first and the last configuration, traced if the network can be, without timing forms of layers."""
    search, images = experiment.search, few.validation
    options = EvaluationOptions(
        memory_budget=search.memory_budget or UNLIMITED,
        form="dense" if search.form == "auto" else search.form,
        precision=_on_a_cpu(search.precision),
    )
    space = SearchSpace.of(supernet)
    evaluator = Evaluator(supernet, options, normalisation=images.normalisation)
    calibration = few.train.images if experiment.engine.recalibrate else None
    with _as_invalid_value(f"model {experiment.model!r}: the search cannot evaluate it"):
        evaluator.evaluate(images.images, images.labels, [space[0], space[-1]], calibration)


@contextmanager
def _as_invalid_value(what: str) -> Iterator[None]:
    try:
        yield
    except GrossRayError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise InvalidValueError(
            f"{what}: {one_line(error)}; it needs logits for a batch of any size in evaluation mode"
        ) from None


def _first(splits: Splits, number: int) -> Splits:
    """Return the first `number` images of each split, or all if it has fewer."""

    def few(images: ImageSet) -> ImageSet:
        return images.part(torch.arange(min(number, len(images))))

    return replace(splits, train=few(splits.train), validation=few(splits.validation), test=few(splits.test))


def _on_a_cpu(precision: str) -> str:
    """Return the precision, or float32 in place of tf32, which only CUDA has."""
    return "float32" if precision == "tf32" else precision
