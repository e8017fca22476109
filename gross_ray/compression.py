"""Compress a trained network in one call, in this process and in memory; `gross compress` can resume and distribute."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.data.grey import grey
from gross_ray.data.image_set import Splits
from gross_ray.data.images import splits_of
from gross_ray.data.normalisation import DEVIATION, MEAN
from gross_ray.data.options import DataOptions
from gross_ray.data.sizes import size_text
from gross_ray.defaults import augmentation_for, compression_experiment
from gross_ray.experiment import Experiment
from gross_ray.nn.batch_norm import calibration_batches, calibration_images, recalibrate
from gross_ray.nn.calls import input_channels
from gross_ray.nn.copies import copied
from gross_ray.own_network import accepted
from gross_ray.search.budgeted import BudgetedSpace
from gross_ray.search.budgets import amounts, parse_budgets
from gross_ray.search.cost import LayerCosts, count_parameters, full_costs, layer_costs
from gross_ray.search.evaluator import Evaluator
from gross_ray.search.folding import fold_within
from gross_ray.search.latency import CONDITIONS, LatencyModel, measure_latency
from gross_ray.search.operations import count_operations
from gross_ray.search.options import EvaluationOptions, LatencyOptions
from gross_ray.search.scores import Score, Scoreboard
from gross_ray.search.strategies import strategy
from gross_ray.seeds import derive_seed, derived_generator
from gross_ray.space import DENSE, Configuration, SearchSpace
from gross_ray.supernet.build import build_supernet, decompose_choice, made_up, running_supernet
from gross_ray.supernet.configure import extract, series_layers
from gross_ray.supernet.layers import choice_of
from gross_ray.supernet.options import parse_layer_group_sizes
from gross_ray.training.loop import EpochRecord, accuracy, in_format_of
from gross_ray.training.options import Schedule
from gross_ray.training.rates import find_rate
from gross_ray.training.sampling import ConfigurationSampler
from gross_ray.training.stages import all_parameters, finetune, reconstruct, train_network

Data = Dataset[Any] | tuple[Tensor, Tensor]
"""A dataset with a length and items (image, class number), or two tensors: images and class numbers."""
OnProgress = Callable[[str, float], object]
"""Receives the name of the step and the share of it that is done (0 to 1)."""
ROUND = 32
"""Configurations that the search evaluates at a time."""


@dataclass(frozen=True)
class Compressed:
    """A compressed network, and what is known of it."""

    network: nn.Module
    """Plain torch.nn modules, in eval mode; each layer in the form that is faster, as far as the budgets allow it."""
    configuration: Configuration
    """Its group-sizes, in layer order."""
    table: pd.DataFrame
    """The full network and each candidate: network, val_accuracy, test_accuracy, macs, parameters, latency_ms."""
    card: dict[str, Any]
    """Plain values for JSON: configuration, layers, accuracies, costs, the expected input, classes, experiment, and
    the learning rate of each training."""


def compress(
    network: nn.Module,
    train: Data,
    test: Data,
    *,
    budget: str | Sequence[str],
    validation: Data | None = None,
    runtime: str = "onnxruntime",
    batch_size: int = 1,
    threads: int = 1,
    effort: str = "normal",
    epochs: int = 0,
    adapt: int = 0,
    mean: Sequence[float] = (MEAN,),
    std: Sequence[float] = (DEVIATION,),
    image_size: int | str | tuple[int, int] = "",
    settings: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> Compressed:
    """Return the most accurate version of a trained `network` within `budget` that the search finds.

    `train` and `test` have PIL images, uint8 arrays (H, W) or (H, W, 3), or tensors (1 or 3, H, W), with class numbers.
    They have one size, or are resized to `image_size`, like 224 or "224x160" (`DataOptions`). Without `validation`, a
    fifth of `train` selects. `budget` is one or more like "macs=40%" or "latency_ms=60%", of the full network's cost;
    time is that of a batch of `batch_size` on `threads` threads in `runtime`, measured here. `effort` is quick, normal
    or long; `epochs` those of the supernet's fine-tuning; `adapt` the epochs in which the network itself is trained on
    first. Pixels (0 to 1) are normalised by `mean` and `std`. Trainings crop and mirror images, unless the network
    classifies mirrored images worse (`mirrored_alike`). `settings` override fields of the experiment, like "seed=1".
    `on_progress` is called with a step's name and the share of it that is done; by default tqdm shows it, if it is
    installed. The network that is passed stays unchanged.
    Raises InvalidValueError for a network or a value that cannot be used, and DatasetError for images.
    """
    base = copied(accepted(network, "the network")).eval()
    given = [train, *([] if validation is None else [validation]), test]
    sets = [TensorDataset(*each) if isinstance(each, tuple) else each for each in given]
    data = DataOptions(mean=tuple(mean), std=tuple(std), image_size=size_text(image_size))
    splits = splits_of("the given images", sets, data)
    if input_channels(base, splits.train.images.shape[-1]) == 1:
        splits = replace(splits, train=grey(splits.train), validation=grey(splits.validation), test=grey(splits.test))
    texts, shape = [budget] if isinstance(budget, str) else list(budget), splits.train.images.shape[1:]
    experiment = compression_experiment(
        base,
        shape,
        budgets=texts,
        num_images=len(splits.train),
        effort=effort,
        epochs=epochs,
        augment=augmentation_for(base, splits.validation),
    ).override(list(settings))
    timed = LatencyOptions(runtime=runtime, batch_size=batch_size, threads=threads)
    rates: dict[str, float] = {}
    with _shown(on_progress) as show:
        if adapt:
            schedule = replace(experiment.training, epochs=adapt, milestones=())
            rates["adapt"] = _train("adapt", base, partial(train_network, base), splits, schedule, experiment, show)
        return _compressed(base, splits, experiment, timed, rates, show)


def _compressed(
    base: nn.Module,
    splits: Splits,
    experiment: Experiment,
    timed: LatencyOptions,
    rates: dict[str, float],
    show: OnProgress,
) -> Compressed:
    """Do every stage with a network that nothing else uses; the learning rates are added to `rates`."""
    shape = splits.train.images.shape[1:]
    options = experiment.decomposition
    by_layer = parse_layer_group_sizes(options.layer_group_sizes)
    choice = choice_of(base, options.layers, options.group_sizes, by_layer, keep_dense=True, input_shape=shape)
    base = choice.network
    undecomposed = running_supernet(base, choice.group_sizes, shape)
    model = _measured(undecomposed, shape, timed, experiment.seed, show)
    within = _within(base, undecomposed, shape, experiment, model)
    show("decompose", 0.0)
    supernet = decompose_choice(choice, options, nested=options.nested, seed=experiment.seed)
    bottlenecks = {
        name: {size: _kept(layer.bottleneck(size)) for size in layer.series_sizes}
        for name, layer in series_layers(supernet).items()
    }
    sampler = ConfigurationSampler(within.space, experiment.supernet.alpha, scaling=experiment.supernet.scaling)
    training = partial(reconstruct, supernet, base, sampler=sampler)
    reconstruction, finetuning = experiment.reconstruction, experiment.finetuning
    rates["reconstruct"] = _train("reconstruct", supernet, training, splits, reconstruction, experiment, show)
    training = partial(finetune, supernet, sampler=sampler)
    rates["finetune"] = _train("finetune", supernet, training, splits, finetuning, experiment, show)
    best = _searched(supernet, splits, experiment, within, show)
    candidates = {one: _alone(one, base, bottlenecks, splits, experiment, rates, show) for one in best}
    written = {one: fold_within(found, model, shape, [within.budgets])[0] for one, found in candidates.items()}
    rows = [_row("full network", base, splits, shape, model.full_ms)]
    rows += [_row(str(one), found, splits, shape, model.predict_network(found)) for one, found in written.items()]
    table = pd.DataFrame(rows)
    chosen = best[int(table["val_accuracy"].iloc[1:].to_numpy().argmax())]
    card = _card(chosen, [*choice.group_sizes], table, splits, experiment, model) | {"learning rates": rates}
    return Compressed(written[chosen].eval(), chosen, table, card)


def _kept(bottleneck: Bottleneck) -> Bottleneck:
    """Return a copy, which the training of the series does not change."""
    parts = (bottleneck.pointwise_in, bottleneck.grouped, bottleneck.pointwise_out)
    return Bottleneck(*(part.detach().clone() for part in parts))


def _measured(
    supernet: nn.Module, shape: Sequence[int], timed: LatencyOptions, seed: int, show: OnProgress
) -> LatencyModel:
    """Time networks of a supernet, whose series get made-up weights."""
    generator = derived_generator(seed, "latency")
    made_up(supernet, generator)
    step = f"latency in {timed.runtime}"
    return measure_latency(
        supernet, shape, timed, generator=generator, device="cpu", on_part=lambda done, all_: show(step, done / all_)
    )


def _train(
    step: str,
    network: nn.Module,
    training: Callable[..., list[EpochRecord]],
    splits: Splits,
    schedule: Schedule,
    experiment: Experiment,
    show: OnProgress,
) -> float:
    """Train in place and return the learning rate, which a range test finds if the schedule leaves it open."""
    seeded = partial(training, seed=derive_seed(experiment.seed, step), engine=experiment.engine)
    if not schedule.lr:
        show(f"{step}: learning rate", 0.0)
        schedule = replace(schedule, lr=find_rate(network, seeded, splits, schedule).chosen)
    seeded(splits, schedule, on_epoch=lambda record: show(step, record.epoch / schedule.epochs))
    return schedule.lr


def _within(
    base: nn.Module, supernet: nn.Module, shape: Sequence[int], experiment: Experiment, model: LatencyModel
) -> BudgetedSpace:
    """Return the configurations within the experiment's limits; raises InvalidValueError if there are none."""
    asked = [budget for text in experiment.search.limits for budget in parse_budgets(text)]
    budgets = amounts(asked, full_costs(base, shape) | {"latency_ms": model.full_ms})
    names = dict.fromkeys(["macs", *(budget.cost for budget in budgets)])
    costs: list[LayerCosts] = [
        model.costs if name == "latency_ms" else layer_costs(supernet, shape, name) for name in names
    ]
    return BudgetedSpace(SearchSpace.of(supernet), costs, budgets)


def _searched(
    supernet: nn.Module, splits: Splits, experiment: Experiment, within: BudgetedSpace, show: OnProgress
) -> list[Configuration]:
    """Return the most accurate configurations within the budgets, on the validation split, the best first."""
    options = experiment.search
    evaluator = Evaluator(
        supernet.eval(),
        EvaluationOptions(form=options.form, precision=options.precision),
        normalisation=splits.validation.normalisation,
    )
    proposing = strategy(options.strategy, within, derive_seed(experiment.seed, "search") % 2**32)
    calibration = calibration_images(splits.train) if experiment.engine.recalibrate else None
    most = options.evaluations or within.space.size
    score = Score(options.score)
    board, evaluated = Scoreboard(score), 0
    while proposed := proposing.propose(min(ROUND, most - evaluated)):
        correct, loss = evaluator.evaluate(splits.validation.images, splits.validation.labels, proposed, calibration)
        totals = correct if score.of_accuracy else loss
        board.teach([proposing], board.add(proposed, totals.numpy()[:, None] / len(splits.validation)))
        evaluated += len(proposed)
        show("search", evaluated / most)
    scores = board.scores()
    ranked = sorted(scores, key=lambda one: (-scores[one], one))
    return ranked[: options.top]


def _alone(
    configuration: Configuration,
    base: nn.Module,
    bottlenecks: Mapping[str, Mapping[int, Bottleneck]],
    splits: Splits,
    experiment: Experiment,
    rates: dict[str, float],
    show: OnProgress,
) -> nn.Module:
    """Return one configuration, trained on its own from its decompositions, as a plain network."""
    chosen = dict(zip(bottlenecks, configuration, strict=True))
    series = {name: [bottlenecks[name][size]] if size != DENSE else [] for name, size in chosen.items()}
    own = build_supernet(base, series, [name for name, each in series.items() if not each])
    options = experiment.validation
    if options.trainable == "all":
        all_parameters(own)
    if any(series.values()):
        for name, training, schedule in (
            (f"{configuration}: reconstruct", partial(reconstruct, own, base), options.reconstruction),
            (f"{configuration}: finetune", partial(finetune, own, trainable=options.trainable), options.finetuning),
        ):
            rates[name] = _train(name, own, training, splits, schedule, experiment, show)
    if experiment.engine.recalibrate:
        images = in_format_of(own, splits.train)
        recalibrate(own, map(images.as_inputs, calibration_batches(calibration_images(images))))
    return extract(own, configuration).eval()


def _row(name: str, network: nn.Module, splits: Splits, shape: Sequence[int], latency_ms: float) -> dict[str, Any]:
    return {
        "network": name,
        "val_accuracy": accuracy(network, splits.validation),
        "test_accuracy": accuracy(network, splits.test),
        "macs": count_operations(network, shape).macs,
        "parameters": count_parameters(network),
        "latency_ms": latency_ms,
    }


def _card(
    configuration: Configuration,
    layers: Sequence[str],
    table: pd.DataFrame,
    splits: Splits,
    experiment: Experiment,
    model: LatencyModel,
) -> dict[str, Any]:
    (row,) = table[table["network"] == str(configuration)].to_dict("records")
    images, normalisation = splits.train.images, splits.train.normalisation
    where = {name: getattr(model, name) for name in CONDITIONS}
    fields = experiment.fields()
    return {
        "configuration": str(configuration),
        "layers": {layer: size or "dense" for layer, size in zip(layers, configuration, strict=True)},
        "accuracy": {"validation": row["val_accuracy"], "test": row["test_accuracy"]},
        "macs": int(row["macs"]),
        "parameters": int(row["parameters"]),
        "latency_ms": row["latency_ms"],
        "latency of": where | {"timed": "predicted", "full network, ms": model.full_ms},
        "input": {
            **({} if splits.sizes is None else {"each image": splits.sizes.preparation}),
            "shape": ["N", *images.shape[1:]],
            "mean": normalisation.mean,
            "std": normalisation.std,
        },
        "classes": list(splits.classes),
        "experiment": {name: fields[name] for name in fields if name not in _ELSEWHERE},
    }


_ELSEWHERE = ("model", "weights", "data.name")
"""Fields of an experiment that name what was passed to `compress` as objects."""


@contextmanager
def _shown(on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """Yield the callback, or by default one that shows a bar for each step, if tqdm is installed."""
    if on_progress is not None:
        yield on_progress
        return
    if importlib.util.find_spec("tqdm") is None:
        yield lambda step, share: None
        return
    from tqdm import tqdm

    with tqdm(total=1.0, bar_format="{desc}: {percentage:3.0f}% {elapsed}") as bar:

        def show(step: str, share: float) -> None:
            bar.set_description_str(step, refresh=False)
            bar.n = share
            bar.refresh()

        yield show
