"""Exact accuracy of many configurations, with each shared prefix computed once."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gross_ray.data.normalisation import THE_PAPERS, Normalisation
from gross_ray.errors import InvalidValueError
from gross_ray.nn.batch_norm import calibration_batches, recalibrated, statistics_of, with_statistics
from gross_ray.nn.calls import output_of
from gross_ray.nn.memory_format import memory_format_of
from gross_ray.nn.modes import evaluating
from gross_ray.nn.precision import at_precision, products_at
from gross_ray.search.batch_plan import (
    BatchPlan,
    bytes_of_image,
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
from gross_ray.supernet.configure import get_configuration, largest_decomposed, series_layers, set_configuration
from gross_ray.supernet.series import SeriesConv2d

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far the traced network's logits may differ from the network's own, relative to the largest: float rounding."""
TIMED_MACS = 5e8
"""About how many MACs each timing of a layer's form runs."""


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
    """Return accuracy and loss of each configuration, equal to those of one forward pass per configuration.

    `images` are (N, 3, H, W), on any device: uint8, to which `normalisation` is applied, or floating point, used
    unchanged. `labels` are (N,), int64; `configurations` default to the whole space. With `calibration`, images like
    `images` (of the training split), each configuration gets batch-norm statistics of its own. The other arguments are
    those of `EvaluationOptions`. Columns: configuration (text), correct and total (images), accuracy, loss (mean
    cross-entropy), one row per configuration in their order. A network that torch.fx cannot trace is evaluated one
    configuration at a time, after a NotTraceableWarning with the cause. Raises InvalidValueError for a configuration
    outside the space, no images, images that the network cannot run, unknown labels, or an option outside its range.
    """
    options = EvaluationOptions(batch_size=batch_size, memory_budget=memory_budget, form=form, precision=precision)
    space = SearchSpace.of(supernet)
    chosen = list(space) if configurations is None else [space.check(sizes) for sizes in configurations]
    _check_images(supernet, images)
    _check_labels(images, labels, logits_of(output_of(supernet, images.shape[1:]), 1).shape[1])
    evaluator = Evaluator(supernet, options, normalisation=normalisation)
    correct, loss = evaluator.evaluate(images, labels, chosen, calibration)
    columns = {"configuration": list(map(str, chosen)), "correct": correct.numpy(), "total": len(labels)}
    return pd.DataFrame(columns).assign(accuracy=correct.numpy() / len(labels), loss=loss.numpy() / len(labels))


def _check_images(supernet: nn.Module, images: Tensor) -> None:
    dtype = next(supernet.parameters()).dtype
    if not isinstance(images, Tensor) or images.dtype not in (torch.uint8, dtype):
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InvalidValueError(f"images of {found}: must be a tensor (N, 3, H, W) of torch.uint8 or {dtype}")


def _check_labels(images: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InvalidValueError(f"labels of {found}: must be a tensor (N,) of torch.int64")
    if len(images) == 0 or len(images) != len(labels):
        raise InvalidValueError(f"{len(images)} images and {len(labels)} labels: give one image or more, each a label")
    if num_classes is not None and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise InvalidValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}: must be from 0 to {num_classes - 1}, because "
            f"the network has {num_classes} classes"
        )


class Evaluator:
    """Evaluates configurations of one supernet, and keeps what it derives from the weights between calls.

    It ignores later changes of the weights. `not_traceable` is the reason if the network cannot be traced: its
    configurations are then evaluated one by one, as bottlenecks, whatever the form. The same holds with calibration if
    a pass uses a batch-norm more than once (`why_one_by_one`).
    """

    def __init__(
        self,
        supernet: nn.Module,
        options: EvaluationOptions = EvaluationOptions(),  # noqa: B008 (frozen)
        *,
        forms: Mapping[str, LayerForm] | None = None,
        normalisation: Normalisation = THE_PAPERS,
        automatic_budget: int | None = None,
    ) -> None:
        """Prepare `supernet`; layers in `forms` (by name, see the property `forms`) use that form and are not timed.

        `automatic_budget` replaces `default_memory_budget`, for `options` without a memory budget.
        """
        self._supernet, self._options, self._normalisation = supernet, options, normalisation
        self._automatic_budget = automatic_budget
        self.memory_budget = options.memory_budget or 0
        """Bytes that a batch's live tensors may take; an automatic budget is known after the first evaluation."""
        self._space = SearchSpace.of(supernet)
        self._fixed_forms = dict(forms or {})
        self._walk: PrefixWalk | None = None
        self._memory_format = torch.channels_last
        """In which the network runs, decided by the first evaluation."""
        self._joined = True
        """Whether rows of several prefixes may share a batch: nothing in the network mixes rows."""
        self.not_traceable: str | None = None

    @property
    def forms(self) -> dict[str, LayerForm]:
        """The form of each decomposed layer that the forward pass calls, by name; empty before the first evaluation."""
        if self._walk is None:
            return {}
        layers = series_layers(self._supernet)
        return {name: self._walk.siblings[layer].form for name, layer in layers.items() if layer in self._walk.siblings}

    def why_one_by_one(self, *, calibrated: bool) -> str | None:
        """Return why configurations are evaluated in separate passes, or None; valid after the first evaluation."""
        if self._walk is None or not calibrated:
            return self.not_traceable
        uses = Counter(self._walk.norms.values())
        repeated = [node.target for node, norm in self._walk.norms.items() if uses[norm] > 1]
        return f"batch-norm {str(repeated[0])!r} is used more than once in a pass" if repeated else None

    def evaluate(
        self,
        images: Tensor,
        labels: Tensor,
        configurations: Sequence[Configuration],
        calibration: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return correct images (int64) and summed cross-entropy (float64) of each configuration, on the CPU.

        With `calibration`, images like `images`, each batch-norm uses the statistics of its configuration's responses
        to these images, as `recalibrate` computes them; their batches (`calibration_batches`) ignore `memory_budget`.
        """
        _check_labels(images, labels)
        parameter = next(self._supernet.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        labels = labels.to(self._device)
        correct = torch.zeros(len(configurations), dtype=torch.int64)
        loss = torch.zeros(len(configurations), dtype=torch.float64)
        if not configurations:
            return correct, loss
        if self._walk is None and self.not_traceable is None:
            self._memory_format = memory_format_of(self._supernet, images.shape[1:])
        with torch.inference_mode(), evaluation_mode(self._supernet, self._memory_format):
            plan = self._prepared_plan(images, configurations)
            counts, losses = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)
            with at_precision(self._options.precision, self._device):
                for batch in self._batches(plan, images, labels, configurations, calibration):
                    counts, losses = torch.cat(batch.correct) + counts, torch.cat(batch.loss) + losses
        for leaf, count, total in zip(batch.leaves, counts.tolist(), losses.tolist(), strict=True):
            correct[leaf.positions] = count
            loss[leaf.positions] = total
        return correct, loss

    def _prepared_plan(self, images: Tensor, configurations: Sequence[Configuration]) -> BatchPlan:
        """Return the batch plan; the first call also builds and checks the walk."""
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
        needed = 0
        for configuration in dict.fromkeys([largest_decomposed(self._supernet), self._space[-1]]):
            set_configuration(self._supernet, configuration)
            needed = max(needed, bytes_of_pass(self._supernet, self._batch(images[:1])))
        return BatchPlan(images_of_batch(needed, len(images), self._budget(needed), self._options.batch_size), ())

    def _batches(
        self,
        plan: BatchPlan,
        images: Tensor,
        labels: Tensor,
        configurations: Sequence[Configuration],
        calibration: Tensor | None,
    ) -> Iterator[_Totals]:
        """Evaluate batch after batch, each with the same leaves in the same order."""
        one_by_one = self.why_one_by_one(calibrated=calibration is not None)
        root = self._walk.tree(configurations) if self._walk and one_by_one is None else None
        statistics = None
        calibrated: dict[Configuration, list[dict[str, Tensor]]] = {}
        if self._walk is not None and root is not None and self._walk.norms and calibration is not None:
            statistics = self._statistics(self._walk, root, calibration)
        elif calibration is not None and root is None:
            calibrated = {name: self._calibrated(name, calibration) for name in configurations}
        for start in range(0, len(labels), plan.num_images):
            batch = self._batch(images[start : start + plan.num_images])
            totals = _Totals(labels[start : start + plan.num_images])
            if self._walk is not None and root is not None:
                with modules_out_of_place(self._supernet):
                    self._walk.run(
                        batch, root, totals.add, limits=plan.limits, apart=not self._joined, statistics=statistics
                    )
            else:
                for position, configuration in enumerate(configurations):
                    set_configuration(self._supernet, configuration)
                    own = calibrated.get(configuration, statistics_of(self._supernet))
                    with with_statistics(self._supernet, own):
                        totals.add([Prefix(configuration, [position])], self._supernet(batch.clone()))
            yield totals

    def _calibrated(self, configuration: Configuration, calibration: Tensor) -> list[dict[str, Tensor]]:
        """Return the batch-norm statistics of one configuration, from separate forward passes."""
        set_configuration(self._supernet, configuration)
        with recalibrated(self._supernet, map(self._batch, calibration_batches(calibration))):
            return statistics_of(self._supernet)

    def _statistics(self, walk: PrefixWalk, root: Prefix, calibration: Tensor) -> Statistics:
        """Return each batch-norm's statistics after each prefix: the mean over batches, as in `recalibrate`."""
        batches = calibration_batches(calibration)
        statistics: Statistics = {}
        for batch in batches:
            of_batch: Statistics = {}
            with modules_out_of_place(self._supernet), products_at("float32", batch.device):
                walk.run(
                    self._batch(batch),
                    root,
                    lambda *_: None,
                    limits=[1] * (walk.num_layers + 1),
                    apart=True,
                    statistics=of_batch,
                )
            for key, moments in of_batch.items():
                known = statistics.get(key)
                mean, variance = (moment / len(batches) for moment in moments)
                statistics[key] = (known[0] + mean, known[1] + variance) if known else (mean, variance)
        return statistics

    def _new_walk(self, images: Tensor) -> PrefixWalk:
        """Return the walk with each layer in its fixed form, or else in the fastest one, timed here."""
        try:
            traced = trace(self._supernet)
        except Exception as error:  # whatever the model's own code raises on symbolic values
            if is_of_the_machine(error):
                raise
            raise NotTraceableError(f"{type(error).__name__}: {error}") from None
        layers = series_layers(self._supernet)
        auto = self._options.form == "auto"
        default = "dense" if auto else self._options.form
        forms = {
            layer: self._fixed_forms.get(name, LayerForm.uniform(layer, default)) for name, layer in layers.items()
        }
        to_time = [layer for name, layer in layers.items() if auto and name not in self._fixed_forms]
        walk = PrefixWalk(self._supernet, traced)
        if to_time:
            bottlenecks = {layer: LayerForm.uniform(layer, "bottleneck") for layer in forms}
            walk.siblings = {layer: self._siblings(layer, form) for layer, form in bottlenecks.items()}

            def on_layer(layer: SeriesConv2d, inputs: Tensor) -> None:
                if layer in to_time:
                    rows = _typical_rows(layer, inputs, self._budget(), self._memory_format)
                    forms[layer] = fastest_form(layer, rows, self._memory_format)

            path, once = walk.tree([self._space[0]]), [1] * walk.num_layers
            with modules_out_of_place(self._supernet):
                walk.run(self._batch(images[:1]), path, lambda *_: None, limits=once, on_layer=on_layer)
        with torch.autocast(self._device.type, enabled=False):  # derive the kernels at the weights' own precision
            walk.siblings = {layer: self._siblings(layer, forms[layer]) for layer in walk.layers}
        return walk

    def _siblings(self, layer: SeriesConv2d, form: LayerForm) -> Siblings:
        return Siblings(layer, form, self._memory_format)

    def _budget(self, least: int = 0) -> int:
        """Return the memory budget; an automatic one is at least `least` bytes, which one image needs."""
        if self._options.memory_budget is None:
            self.memory_budget = max(self._automatic_budget or default_memory_budget(self._device), least)
        return self.memory_budget

    def _plan(self, walk: PrefixWalk, images: Tensor) -> BatchPlan:
        """Plan for a path on which every layer runs in the same form if it can, dense or bottleneck."""

        def group_size(layer: SeriesConv2d, form: str) -> int:
            by_size = walk.siblings[layer].form.by_size if layer in walk.siblings else {}
            return next((size for size in layer.group_sizes if by_size.get(size) == form), layer.group_sizes[0])

        layers = series_layers(self._supernet).values()
        paths = [walk.tree([Configuration([group_size(layer, form) for layer in layers])]) for form in FORMS]
        with modules_out_of_place(self._supernet), at_precision(self._options.precision, self._device):
            segments = measure_segments(walk, self._batch(images[:1]), paths)
        siblings = [len(layer.group_sizes) for layer in walk.layers]
        budget = self._budget(bytes_of_image(segments))
        return plan_batches(segments, siblings, len(images), budget, batch_size=self._options.batch_size)

    def _check(
        self, walk: PrefixWalk, plan: BatchPlan, images: Tensor, configurations: Sequence[Configuration]
    ) -> None:
        """Compare a few configurations with separate forward passes, and find out whether prefixes may share a batch.

        Raises NotTraceableError if the logits differ even when each prefix runs alone.
        """
        # A single configuration shares its batch with none: the first and last of the space show whether it may.
        few = list(dict.fromkeys([*configurations[:3], *configurations[-3:], self._space[0], self._space[-1]]))
        batch = self._batch(images[: min(2, plan.num_images)])
        expected = []
        for configuration in few:
            set_configuration(self._supernet, configuration)
            expected.append(self._supernet(batch.clone()))

        def fault(apart: bool) -> str:
            worst = 0.0

            def compare(leaves: list[Prefix], rows: Tensor) -> None:
                nonlocal worst
                for leaf, part in zip(leaves, rows.chunk(len(leaves)), strict=True):
                    worst = max(worst, _difference(part, expected[leaf.positions[0]]))

            try:
                with modules_out_of_place(self._supernet), graph_faults():
                    walk.run(batch, walk.tree(few), compare, limits=plan.limits, apart=apart)
            except (NotTraceableError, InvalidValueError) as error:
                return str(error)
            return f"its graph's logits differ by {worst:.1e}" if worst > TOLERANCE[self._dtype] else ""

        mixed = fault(apart=False)
        self._joined = not mixed
        if self._joined:
            return
        if reason := fault(apart=True):
            raise NotTraceableError(reason)
        warnings.warn(
            f"this network mixes the rows of a batch ({mixed}); configurations do not share batches after a "
            "decomposed layer, which is slower",
            RowsApartWarning,
            stacklevel=5,
        )

    def _batch(self, images: Tensor) -> Tensor:
        batch = images.to(self._device)
        if not batch.is_floating_point():
            batch = self._normalisation(batch).to(self._dtype)
        return batch.contiguous(memory_format=self._memory_format)


class _Totals:
    """Correct images (int64) and summed loss (float64) of one batch for each leaf, on the device, in walk order."""

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels
        self.leaves: list[Prefix] = []
        self.correct: list[Tensor] = []
        self.loss: list[Tensor] = []

    def add(self, leaves: list[Prefix], logits: Tensor) -> None:
        """Append the totals of these leaves; logits are (len(leaves) * N, classes)."""
        num, truth = len(leaves), self._labels.repeat(len(leaves))
        self.leaves += leaves
        self.correct.append((logits.argmax(dim=1) == truth).view(num, -1).sum(dim=1))
        losses = F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, truth, reduction="none")
        self.loss.append(losses.view(num, -1).sum(dim=1, dtype=torch.float64))


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest expected logit."""
    if found.shape != expected.shape:
        return math.inf
    scale = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    if math.isnan(difference):
        return 0.0 if torch.allclose(found, expected, equal_nan=True) else math.inf
    return difference / scale if scale else difference


def _typical_rows(
    layer: SeriesConv2d, inputs: Tensor, memory_budget: int, memory_format: torch.memory_format
) -> Tensor:
    """Return copies of one row, about TIMED_MACS of work for the layer, as far as they fit the memory."""
    kernel, sizes = layer.kernel_size[0] * layer.kernel_size[1], len(layer.group_sizes)
    macs = layer.in_channels * layer.out_channels * kernel * inputs.shape[2] * inputs.shape[3]
    channels = 3 * layer.in_channels + 2 * sizes * layer.out_channels
    needed = channels * inputs.shape[2] * inputs.shape[3] * inputs.element_size()
    rows = int(min(max(TIMED_MACS / macs / sizes, 8), 128, max(memory_budget // needed, 1)))
    return inputs[:1].repeat(rows, 1, 1, 1).contiguous(memory_format=memory_format)


@contextmanager
def evaluation_mode(supernet: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """Within the block, set evaluation mode and the format of weights; restore both and the configuration after it."""
    active = get_configuration(supernet)
    weights = {module: module.weight.data for module in supernet.modules() if isinstance(module, nn.Conv2d)}
    try:
        with evaluating(supernet):
            for conv, weight in weights.items():  # else each call would copy them
                conv.weight.data = weight.contiguous(memory_format=memory_format)
            yield
    finally:
        for conv, weight in weights.items():
            conv.weight.data = weight
        set_configuration(supernet, active)
