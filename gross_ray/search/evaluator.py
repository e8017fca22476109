"""Accuracy of many configurations at once, exact, each shared prefix computed once."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gross_ray.data.normalisation import THE_PAPERS, Normalisation
from gross_ray.errors import InvalidValueError
from gross_ray.nn.batch_norm import calibration_batches, recalibrated, statistics_of, with_statistics
from gross_ray.nn.calls import output_of
from gross_ray.nn.modes import evaluating
from gross_ray.nn.precision import at_precision, products_at
from gross_ray.search.batch_plan import (
    BatchPlan,
    bytes_of_pass,
    default_memory_budget,
    images_of_batch,
    measure_segments,
    plan_batches,
)
from gross_ray.search.graph import modules_out_of_place, trace
from gross_ray.search.layer_forms import LayerForm, Siblings, fastest_form
from gross_ray.search.options import FORMS, EvaluationOptions
from gross_ray.search.prefix_walk import Prefix, PrefixWalk, Statistics, logits_of
from gross_ray.search.traceability import (
    NotTraceableError,
    NotTraceableWarning,
    RowsApartWarning,
    graph_faults,
    is_of_the_machine,
)
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.configure import get_configuration, series_layers, set_configuration
from gross_ray.supernet.series import SeriesConv2d

COLUMNS = ("configuration", "correct", "total", "accuracy", "loss")
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far the logits of the traced network may be from its own, relative to the largest: float rounding."""
TIMED_MACS = 5e8
"""About how much of a layer's work is done each time that a form is timed."""


def evaluate_configurations(
    supernet: nn.Module,
    images: Tensor,
    labels: Tensor,
    configurations: Iterable[Sequence[int]] | None = None,
    *,
    batch_size: int | None = None,
    memory_budget: int | None = None,
    form: str = "auto",
    precision: str = "float32",
    calibration: Tensor | None = None,
    normalisation: Normalisation = THE_PAPERS,
) -> pd.DataFrame:
    """Return what a forward pass of each configuration over all images would give.

    `images` are uint8 (N, 3, H, W), brought to what a network takes by `normalisation`, or floating point, taken as
    they are; on the network's device, or elsewhere: they go to it batch after batch. `labels` are (N,), int64;
    `configurations` default to the whole space. `calibration`, images like `images` (of the training split), gives each
    configuration batch-norm statistics of its own. The other arguments are those of `EvaluationOptions`. Columns:
    configuration (text), correct and total (images), accuracy, loss (mean cross-entropy); rows in the order given. A
    network that torch.fx cannot trace is evaluated with one pass a configuration, after a NotTraceableWarning that
    names the cause. Raises InvalidValueError for a configuration outside the space, no images, images that the network
    cannot run, labels that it does not know, or an option outside its range.
    """
    options = EvaluationOptions(batch_size=batch_size, memory_budget=memory_budget, form=form, precision=precision)
    space = SearchSpace.of(supernet)
    chosen = list(space) if configurations is None else [space.check(one) for one in configurations]
    _check_images(supernet, images)
    _check_labels(images, labels, logits_of(output_of(supernet, images.shape[1:]), 1).shape[1])
    evaluator = Evaluator(supernet, options, normalisation=normalisation)
    correct, loss = evaluator.evaluate(images, labels, chosen, calibration)
    rows = [
        (str(one), count, len(labels), count / len(labels), total / len(labels))
        for one, count, total in zip(chosen, correct.tolist(), loss.tolist(), strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _check_images(supernet: nn.Module, images: Tensor) -> None:
    dtype = next(supernet.parameters()).dtype
    if not isinstance(images, Tensor) or images.dtype not in (torch.uint8, dtype):
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InvalidValueError(f"images of {found}: must be a tensor (N, 3, H, W) of torch.uint8, or {dtype} as given")


def _check_labels(images: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InvalidValueError(f"labels of {found}: must be a tensor (N,) of torch.int64")
    if len(images) == 0 or len(images) != len(labels):
        raise InvalidValueError(f"{len(images)} images and {len(labels)} labels: give one label for each, and some")
    if num_classes is not None and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise InvalidValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}: must be from 0 to {num_classes - 1}, for the "
            f"network tells {num_classes} classes apart"
        )


class Evaluator:
    """One supernet, ready to evaluate lists of its configurations: what is derived from its weights is kept.

    A later change of the weights is not seen. `not_traceable` says why the network cannot be traced, if it cannot:
    configurations are evaluated one by one then, as bottlenecks, whatever the form; so they are with calibration where
    a batch-norm is used more than once in a pass (`why_one_by_one`).
    """

    def __init__(
        self,
        supernet: nn.Module,
        options: EvaluationOptions = EvaluationOptions(),  # noqa: B008 (frozen)
        *,
        forms: Mapping[str, LayerForm] | None = None,
        normalisation: Normalisation = THE_PAPERS,
    ) -> None:
        """Take a supernet; `forms`, by layer name, are taken as given in place of timing them (see `forms`)."""
        self._supernet, self._options, self._normalisation = supernet, options, normalisation
        self._space = SearchSpace.of(supernet)
        self._given = dict(forms or {})
        self._walk: PrefixWalk | None = None
        self._joined = True
        """Whether rows of several prefixes may share a batch: nothing in the network mixes rows."""
        self.not_traceable: str | None = None

    @property
    def forms(self) -> dict[str, LayerForm]:
        """The form of each decomposed layer that the network uses, by name, once something was evaluated."""
        if self._walk is None:
            return {}
        layers = series_layers(self._supernet)
        return {name: self._walk.siblings[layer].form for name, layer in layers.items() if layer in self._walk.siblings}

    def why_one_by_one(self, *, calibrated: bool) -> str | None:
        """Return why configurations are evaluated in passes of their own, if they are, once something was evaluated."""
        if self._walk is None or not calibrated:
            return self.not_traceable
        uses = Counter(self._walk.norms.values())
        twice = [node.target for node, norm in self._walk.norms.items() if uses[norm] > 1]
        return f"batch-norm {str(twice[0])!r} is used more than once in a pass" if twice else None

    def evaluate(
        self,
        images: Tensor,
        labels: Tensor,
        configurations: Sequence[Configuration],
        calibration: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return correct images (int64) and summed cross-entropy (float64) of each configuration, on the CPU.

        With `calibration`, images like `images`, each batch-norm has the statistics of its configuration's responses to
        them in place of its own, as `recalibrate` takes them from `calibration_batches`, which run whatever
        `memory_budget` is.
        """
        _check_labels(images, labels)
        parameter = next(self._supernet.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        labels = labels.to(self._device)
        correct = torch.zeros(len(configurations), dtype=torch.int64)
        loss = torch.zeros(len(configurations), dtype=torch.float64)
        if not configurations:
            return correct, loss
        with torch.inference_mode(), evaluation_mode(self._supernet):
            plan = self._prepared_plan(images, configurations)
            totals = _Totals(labels, [])
            with at_precision(self._options.precision, self._device):
                for found in self._batches(plan, images, labels, configurations, calibration):
                    totals = found.joined(totals)
        for leaf, count, total in zip(totals.leaves, totals.correct.tolist(), totals.loss.tolist(), strict=True):
            correct[leaf.places] = count
            loss[leaf.places] = total
        return correct, loss

    def _prepared_plan(self, images: Tensor, configurations: Sequence[Configuration]) -> BatchPlan:
        """Prepare the walk, the first time, and return what runs together."""
        if self._walk is None and self.not_traceable is None:
            try:
                with graph_faults():
                    with at_precision(self._options.precision, self._device):
                        self._walk = self._new_walk(images)
                    plan = self._plan(self._walk, images)
                    with at_precision("float32", self._device):
                        self._check(self._walk, plan, images, configurations)
                return plan
            except NotTraceableError as error:
                self._walk, self.not_traceable = None, str(error)
                warnings.warn(
                    f"this network cannot be traced ({error}); evaluating one configuration at a time, as bottlenecks",
                    NotTraceableWarning,
                    stacklevel=4,
                )
        if self._walk is not None:
            return self._plan(self._walk, images)
        set_configuration(self._supernet, configurations[-1])
        needed = bytes_of_pass(self._supernet, self._batch(images[:1]))
        return BatchPlan(images_of_batch(needed, len(images), self._budget(), self._options.batch_size), ())

    def _batches(
        self,
        plan: BatchPlan,
        images: Tensor,
        labels: Tensor,
        configurations: Sequence[Configuration],
        calibration: Tensor | None,
    ) -> Iterator[_Totals]:
        """Evaluate batch after batch, each with the same leaves in the same order."""
        alone = self.why_one_by_one(calibrated=calibration is not None)
        root = self._walk.tree(configurations) if self._walk and alone is None else None
        statistics = None
        calibrated: dict[Configuration, list[dict[str, Tensor]]] = {}
        if self._walk is not None and root is not None and self._walk.norms and calibration is not None:
            statistics = self._statistics(self._walk, root, calibration)
        elif calibration is not None and root is None:
            calibrated = {one: self._calibrated(one, calibration) for one in configurations}
        for start in range(0, len(labels), plan.num_images):
            batch = self._batch(images[start : start + plan.num_images])
            found = _Totals(labels[start : start + plan.num_images], [])
            if self._walk is not None and root is not None:
                with modules_out_of_place(self._supernet):
                    self._walk.run(
                        batch, root, found.add, limits=plan.limits, apart=not self._joined, statistics=statistics
                    )
            else:
                for place, one in enumerate(configurations):
                    set_configuration(self._supernet, one)
                    with with_statistics(self._supernet, calibrated.get(one, statistics_of(self._supernet))):
                        found.add([Prefix(one, [place])], self._supernet(batch.clone()))
            yield found

    def _calibrated(self, configuration: Configuration, calibration: Tensor) -> list[dict[str, Tensor]]:
        """Return the statistics of one configuration, from forward passes of its own."""
        set_configuration(self._supernet, configuration)
        with recalibrated(self._supernet, map(self._batch, calibration_batches(calibration))):
            return statistics_of(self._supernet)

    def _statistics(self, walk: PrefixWalk, root: Prefix, calibration: Tensor) -> Statistics:
        """Return what each batch-norm is given behind each prefix: the mean over batches, as `recalibrate` takes it."""
        batches = calibration_batches(calibration)
        statistics: Statistics = {}
        for batch in batches:
            found: Statistics = {}
            with modules_out_of_place(self._supernet), products_at("float32", batch.device):
                walk.run(
                    self._batch(batch),
                    root,
                    lambda *_: None,
                    limits=[1] * (walk.num_layers + 1),
                    apart=True,
                    statistics=found,
                )
            for key, moments in found.items():
                known = statistics.get(key)
                mean, variance = (moment / len(batches) for moment in moments)
                statistics[key] = (known[0] + mean, known[1] + variance) if known else (mean, variance)
        return statistics

    def _new_walk(self, images: Tensor) -> PrefixWalk:
        """Return the walk with each layer in its form, timed where it is not given."""
        try:
            traced = trace(self._supernet)
        except Exception as error:  # torch.fx raises whatever the model's own code meets on symbolic values
            if is_of_the_machine(error):
                raise
            raise NotTraceableError(f"{type(error).__name__}: {error}") from None
        names = {layer: name for name, layer in series_layers(self._supernet).items()}
        forms: dict[SeriesConv2d, LayerForm] = {}
        default = "dense" if self._options.form == "auto" else self._options.form
        walk = PrefixWalk(self._supernet, traced, {})
        for layer, name in names.items():
            forms[layer] = self._given.get(name) or LayerForm.uniform(layer, default)
        to_time = [layer for layer, name in names.items() if self._options.form == "auto" and name not in self._given]
        if to_time:
            walk.siblings = {layer: Siblings(layer, LayerForm.uniform(layer, "bottleneck")) for layer in names}

            def on_layer(layer: SeriesConv2d, inputs: Tensor) -> None:
                if layer in to_time:
                    forms[layer] = fastest_form(layer, _typical_rows(layer, inputs, self._budget()))

            path, once = walk.tree([self._space[0]]), [1] * walk.num_layers
            with modules_out_of_place(self._supernet):
                walk.run(self._batch(images[:1]), path, lambda *_: None, limits=once, on_layer=on_layer)
        with torch.autocast(self._device.type, enabled=False):  # the kernels are as exact as the weights
            walk.siblings = {layer: Siblings(layer, forms[layer]) for layer in walk.layers}
        return walk

    def _budget(self) -> int:
        return self._options.memory_budget or default_memory_budget(self._device)

    def _plan(self, walk: PrefixWalk, images: Tensor) -> BatchPlan:
        names = {layer: name for name, layer in series_layers(self._supernet).items()}
        in_form = {
            form: {
                names[layer]: next((size for size in layer.group_sizes if siblings.form.by_size[size] == form), None)
                for layer, siblings in walk.siblings.items()
            }
            for form in FORMS
        }
        paths = [
            walk.tree(
                [
                    Configuration(
                        [sizes.get(name) or all_sizes[0] for name, all_sizes in self._space.group_sizes.items()]
                    )
                ]
            )
            for sizes in in_form.values()
        ]
        with modules_out_of_place(self._supernet), at_precision(self._options.precision, self._device):
            segments = measure_segments(walk, self._batch(images[:1]), paths)
        siblings = [len(layer.group_sizes) for layer in walk.layers]
        return plan_batches(segments, siblings, len(images), self._budget(), batch_size=self._options.batch_size)

    def _check(
        self, walk: PrefixWalk, plan: BatchPlan, images: Tensor, configurations: Sequence[Configuration]
    ) -> None:
        """Compare a few configurations with forward passes of their own, and see whether rows may share a batch."""
        # Of one configuration alone no two share a batch: those of the space show whether later ones may.
        few = list(dict.fromkeys([*configurations[:3], *configurations[-3:], self._space[0], self._space[-1]]))
        batch = self._batch(images[: min(2, plan.num_images)])
        alone = {}
        for one in few:
            set_configuration(self._supernet, one)
            alone[one] = self._supernet(batch.clone())

        def fault(apart: bool) -> str:
            worst = 0.0

            def compare(leaves: list[Prefix], rows: Tensor) -> None:
                nonlocal worst
                for leaf, part in zip(leaves, rows.chunk(len(leaves)), strict=True):
                    expected = alone[few[leaf.places[0]]]
                    worst = max(worst, _difference(part, expected))

            try:
                with modules_out_of_place(self._supernet), graph_faults():
                    walk.run(batch, walk.tree(few), compare, limits=plan.limits, apart=apart)
            except (NotTraceableError, InvalidValueError) as error:
                return str(error)
            return f"its graph gives other logits, by {worst:.1e}" if worst > TOLERANCE[self._dtype] else ""

        mixed = fault(apart=False)
        self._joined = not mixed
        if self._joined:
            return
        if reason := fault(apart=True):
            raise NotTraceableError(reason)
        warnings.warn(
            f"this network mixes the rows of a batch ({mixed}); configurations are evaluated apart behind each "
            "decomposed layer, which is slower",
            RowsApartWarning,
            stacklevel=5,
        )

    def _batch(self, images: Tensor) -> Tensor:
        batch = images.to(self._device)
        if not batch.is_floating_point():
            batch = self._normalisation(batch).to(self._dtype)
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch


@dataclass
class _Totals:
    """Correct images and summed loss of each leaf, on the device, in the order in which the walk meets the leaves."""

    labels: Tensor
    leaves: list[Prefix]
    _correct: list[Tensor] = field(default_factory=list)
    _loss: list[Tensor] = field(default_factory=list)

    def add(self, leaves: list[Prefix], logits: Tensor) -> None:
        """Count for some leaves; logits (len(leaves) * N, classes)."""
        num, truth = len(leaves), self.labels.repeat(len(leaves))
        self.leaves += leaves
        self._correct.append((logits.argmax(dim=1) == truth).view(num, -1).sum(dim=1))
        losses = F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, truth, reduction="none")
        self._loss.append(losses.view(num, -1).sum(dim=1, dtype=torch.float64))

    @property
    def correct(self) -> Tensor:
        """Correct images, (leaves,) int64."""
        return self._correct[0]

    @property
    def loss(self) -> Tensor:
        """Summed cross-entropy, (leaves,) float64."""
        return self._loss[0]

    def joined(self, earlier: _Totals) -> _Totals:
        """Return these totals of a batch, and those of the batches before it, as one."""
        correct, loss = torch.cat(self._correct), torch.cat(self._loss)
        if earlier.leaves:
            correct, loss = correct + earlier.correct, loss + earlier.loss
        return _Totals(self.labels, self.leaves, [correct], [loss])


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest logit."""
    if found.shape != expected.shape:
        return math.inf
    scale = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    if math.isnan(difference):
        return 0.0 if torch.allclose(found, expected, equal_nan=True) else math.inf
    return difference / scale if scale else difference


def _typical_rows(layer: SeriesConv2d, inputs: Tensor, memory_budget: int) -> Tensor:
    """Return as many copies of one row as give a form something to do, and fit the memory with all that it makes."""
    kernel, sizes = layer.kernel_size[0] * layer.kernel_size[1], len(layer.group_sizes)
    macs = layer.in_channels * layer.out_channels * kernel * inputs.shape[2] * inputs.shape[3]
    channels = 3 * layer.in_channels + 2 * sizes * layer.out_channels
    needed = channels * inputs.shape[2] * inputs.shape[3] * inputs.element_size()
    rows = int(min(max(TIMED_MACS / macs / sizes, 8), 128, max(memory_budget // needed, 1)))
    return inputs[:1].repeat(rows, 1, 1, 1).contiguous(memory_format=torch.channels_last)


@contextmanager
def evaluation_mode(supernet: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and weights as channels_last needs them; put all back at the end, the configuration too."""
    active = get_configuration(supernet)
    weights = {module: module.weight.data for module in supernet.modules() if isinstance(module, nn.Conv2d)}
    try:
        with evaluating(supernet):
            for conv, weight in weights.items():  # else each call would make that copy
                conv.weight.data = weight.contiguous(memory_format=torch.channels_last)
            yield
    finally:
        for conv, weight in weights.items():
            conv.weight.data = weight
        set_configuration(supernet, active)
