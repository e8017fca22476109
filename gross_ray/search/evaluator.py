"""Accuracy of many configurations at once, exact, each shared prefix computed once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gross_ray.data.augment import normalise
from gross_ray.decomposition.series import SeriesConv2d
from gross_ray.decomposition.surgery import get_configuration, series_layers, set_configuration
from gross_ray.errors import InvalidValueError
from gross_ray.search.batch_plan import BatchPlan, default_memory_budget, measure_segments, plan_batches
from gross_ray.search.evaluation_options import EvaluationOptions, at_precision
from gross_ray.search.graph import modules_out_of_place, trace
from gross_ray.search.layer_forms import LayerForm, Siblings, fastest_form
from gross_ray.search.prefix_walk import Prefix, PrefixWalk
from gross_ray.space import Configuration, SearchSpace

COLUMNS = ("configuration", "correct", "total", "accuracy", "loss")
ONE_BY_ONE_BATCH = 100
"""Images of a batch where a network cannot be traced and no batch size is given."""
TIMED_MACS = 5e8
"""About how much of a layer's work is done each time that a form is timed."""


class NotTraceableWarning(UserWarning):
    """A network cannot be traced, so that configurations are evaluated one by one."""


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
) -> pd.DataFrame:
    """Return what a forward pass of each configuration over all images would give.

    `images` are uint8 (N, 3, H, W), normalised here, or floating point, taken as they are; `labels` (N,) int64;
    `configurations` default to the whole space; the other arguments are those of `EvaluationOptions`. Columns:
    configuration (text), correct and total (images), accuracy, loss (mean cross-entropy); rows in the order given. A
    network that torch.fx cannot trace is evaluated with one pass a configuration, after a NotTraceableWarning that
    names the cause. Raises InvalidValueError for a configuration outside the space, no images, or an option outside
    its range.
    """
    options = EvaluationOptions(batch_size=batch_size, memory_budget=memory_budget, form=form, precision=precision)
    space = SearchSpace.of(supernet)
    chosen = list(space) if configurations is None else [space.check(one) for one in configurations]
    correct, loss = Evaluator(supernet, options).evaluate(images, labels, chosen)
    rows = [
        (str(one), count, len(labels), count / len(labels), total / len(labels))
        for one, count, total in zip(chosen, correct.tolist(), loss.tolist(), strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


class Evaluator:
    """One supernet, ready to evaluate lists of its configurations: what is derived from its weights is kept.

    A later change of the weights is not seen.
    """

    def __init__(
        self,
        supernet: nn.Module,
        options: EvaluationOptions = EvaluationOptions(),  # noqa: B008 (frozen)
        *,
        forms: Mapping[str, LayerForm] | None = None,
    ) -> None:
        """Trace `supernet`; `forms`, by layer name, are taken as given in place of timing them (see `forms`)."""
        self._supernet, self._options = supernet, options
        self._space = SearchSpace.of(supernet)
        self._given = dict(forms or {})
        self._graph = _traced(supernet)
        self._walk: PrefixWalk | None = None
        self._joined = True
        """Whether rows of several prefixes may share a batch: nothing in the network mixes rows."""

    @property
    def forms(self) -> dict[str, LayerForm]:
        """The form of each decomposed layer that the network uses, by name, once something was evaluated."""
        if self._walk is None:
            return {}
        layers = series_layers(self._supernet)
        return {name: self._walk.siblings[layer].form for name, layer in layers.items() if layer in self._walk.siblings}

    def evaluate(
        self, images: Tensor, labels: Tensor, configurations: Sequence[Configuration]
    ) -> tuple[Tensor, Tensor]:
        """Return correct images (int64) and summed cross-entropy (float64) of each configuration, on the CPU."""
        if len(images) == 0 or len(images) != len(labels):
            raise InvalidValueError(f"{len(images)} images and {len(labels)} labels: give one label for each, and some")
        correct = torch.zeros(len(configurations), dtype=torch.int64)
        loss = torch.zeros(len(configurations), dtype=torch.float64)
        if not configurations:
            return correct, loss
        with torch.inference_mode(), _evaluating(self._supernet), at_precision(self._options.precision, images.device):
            if self._graph is None:
                return self._one_by_one(images, labels, configurations)
            with modules_out_of_place(self._supernet):
                return self._by_prefix(images, labels, configurations, correct, loss)

    def _by_prefix(
        self, images: Tensor, labels: Tensor, configurations: Sequence[Configuration], correct: Tensor, loss: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self._walk is None:
            self._walk = self._prepared(images)
        walk, root = self._walk, None
        root = walk.tree(configurations)
        plan = self._plan(walk, images, configurations)
        if max(plan.limits, default=1) > 1:
            self._joined = self._joined and _rows_are_independent(walk, _batch(images[:2]), configurations)
        totals: _Totals | None = None
        for start in range(0, len(labels), plan.num_images):
            found = _Totals(labels[start : start + plan.num_images])
            walk.run(
                _batch(images[start : start + plan.num_images]),
                root,
                found.add,
                limits=plan.limits,
                apart=not self._joined,
            )
            totals = found.joined(totals)
        assert totals is not None
        for leaf, count, total in zip(totals.leaves, totals.correct.tolist(), totals.loss.tolist(), strict=True):
            correct[leaf.places] = count
            loss[leaf.places] = total
        return correct, loss

    def _prepared(self, images: Tensor) -> PrefixWalk:
        """Return the walk with each layer in its form, timed where it is not given."""
        assert self._graph is not None
        names = {layer: name for name, layer in series_layers(self._supernet).items()}
        forms: dict[SeriesConv2d, LayerForm] = {}
        default = "dense" if self._options.form == "auto" else self._options.form
        walk = PrefixWalk(self._supernet, self._graph, {})
        for layer, name in names.items():
            forms[layer] = self._given.get(name) or LayerForm.uniform(layer, default)
        to_time = [layer for layer, name in names.items() if self._options.form == "auto" and name not in self._given]
        if to_time:
            walk.siblings = {layer: Siblings(layer, LayerForm.uniform(layer, "bottleneck")) for layer in names}

            def on_layer(layer: SeriesConv2d, inputs: Tensor) -> None:
                if layer in to_time:
                    forms[layer] = fastest_form(layer, _typical_rows(layer, inputs))

            path = walk.tree([self._space[0]])
            walk.run(_batch(images[:1]), path, lambda *_: None, limits=[1] * walk.num_layers, on_layer=on_layer)
        walk.siblings = {layer: Siblings(layer, forms[layer]) for layer in walk.layers}
        return walk

    def _plan(self, walk: PrefixWalk, images: Tensor, configurations: Sequence[Configuration]) -> BatchPlan:
        options = self._options
        budget = options.memory_budget or default_memory_budget(images.device)
        segments = measure_segments(walk, _batch(images[:1]), walk.tree(configurations[:1]))
        siblings = [len(layer.group_sizes) for layer in walk.layers]
        return plan_batches(segments, siblings, len(images), budget, batch_size=options.batch_size)

    def _one_by_one(
        self, images: Tensor, labels: Tensor, configurations: Sequence[Configuration]
    ) -> tuple[Tensor, Tensor]:
        size = self._options.batch_size or ONE_BY_ONE_BATCH
        totals: _Totals | None = None
        for start in range(0, len(labels), size):
            batch, found = _batch(images[start : start + size]), _Totals(labels[start : start + size])
            for configuration in configurations:
                set_configuration(self._supernet, configuration)
                found.add([Prefix(configuration)], self._supernet(batch))
            totals = found.joined(totals)
        assert totals is not None
        return totals.correct.cpu(), totals.loss.cpu()


@dataclass
class _Totals:
    """Correct images and summed loss of each leaf, on the device, in the order in which the walk meets the leaves."""

    labels: Tensor
    leaves: list[Prefix] = field(default_factory=list)
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

    def joined(self, earlier: _Totals | None) -> _Totals:
        """Return these totals of a batch, and those of the batches before it, as one."""
        correct, loss = torch.cat(self._correct), torch.cat(self._loss)
        if earlier is not None:
            correct, loss = correct + earlier.correct, loss + earlier.loss
        return _Totals(self.labels, self.leaves, [correct], [loss])


def _batch(images: Tensor) -> Tensor:
    batch = images if images.is_floating_point() else normalise(images)
    return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch


def _typical_rows(layer: SeriesConv2d, inputs: Tensor) -> Tensor:
    """Return as many copies of one row as give a form something to do."""
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    macs = layer.in_channels * layer.out_channels * kernel * inputs.shape[2] * inputs.shape[3]
    rows = int(min(max(TIMED_MACS / macs / len(layer.group_sizes), 8), 128))
    return inputs[:1].repeat(rows, 1, 1, 1).contiguous(memory_format=torch.channels_last)


def _rows_are_independent(walk: PrefixWalk, batch: Tensor, configurations: Sequence[Configuration]) -> bool:
    """Return whether a few configurations give the same logits together as each for itself."""
    few = [*configurations[:3], *configurations[-3:]]
    found: list[dict[tuple[int, ...], Tensor]] = []
    for together in (True, False):
        logits: dict[tuple[int, ...], Tensor] = {}

        def add(leaves: list[Prefix], rows: Tensor, logits: dict[tuple[int, ...], Tensor] = logits) -> None:
            logits.update({leaf.sizes: part for leaf, part in zip(leaves, rows.chunk(len(leaves)), strict=True)})

        try:
            walk.run(batch, walk.tree(few), add, limits=[len(few)] * walk.num_layers, apart=not together)
        except (RuntimeError, InvalidValueError):
            if not together:
                raise
            return False  # a size written down while tracing, for one
        found.append(logits)
    tolerance = 1e-2 if batch.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return all(
        torch.allclose(rows, found[1][sizes], rtol=tolerance, atol=tolerance) for sizes, rows in found[0].items()
    )


def _traced(supernet: nn.Module) -> fx.Graph | None:
    try:
        return trace(supernet)
    except Exception as error:  # torch.fx raises whatever the model's own code meets on symbolic values
        warnings.warn(
            f"this network cannot be traced ({type(error).__name__}: {error}); evaluating one configuration at a time",
            NotTraceableWarning,
            stacklevel=4,
        )
        return None


@contextmanager
def _evaluating(supernet: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and weights as channels_last needs them; put all back at the end, the configuration too."""
    active, modes = get_configuration(supernet), {module: module.training for module in supernet.modules()}
    weights = {module: module.weight.data for module in modes if isinstance(module, nn.Conv2d)}
    supernet.eval()
    try:
        for conv, weight in weights.items():  # else each call would make that copy
            conv.weight.data = weight.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for conv, weight in weights.items():
            conv.weight.data = weight
        for module, training in modes.items():  # one by one: a frozen batch-norm stays frozen
            module.training = training
        set_configuration(supernet, active)
