"""How long a compression will take here: every stage is done in small, and its seconds are scaled to the whole.

The small run is a run like any other, in a temporary folder, by the same stages and executors, with a few images, two
short epochs of each training, a few rounds of the search, and a part of the networks that are timed and of the
decompositions. What depends on none of these, like the start of workers, counts as it was measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from gross_ray.btd.block_terms import BTDStatus
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.options import DataOptions
from gross_ray.errors import GrossRayError, UnitsFailedError
from gross_ray.experiment import Experiment
from gross_ray.models import build_model
from gross_ray.report.compressed import best_candidate
from gross_ray.report.page import write_page
from gross_ray.report.searched import Searched
from gross_ray.run.opened import Run, layer_choice
from gross_ray.run.store import RunStore
from gross_ray.search.cost import layer_costs
from gross_ray.search.latency import num_networks
from gross_ray.search.options import LatencyOptions
from gross_ray.search.timed_networks import BESIDE
from gross_ray.space import SearchSpace
from gross_ray.storage import Storage
from gross_ray.supernet.build import running_supernet
from gross_ray.training.loop import count_correct
from gross_ray.training.options import Schedule
from pipelines.capacity import Capacity
from pipelines.commands import exporting
from pipelines.commands.options import Place
from pipelines.commands.scaling import Done, Scaled, schedules_of, shape_of
from pipelines.driver import DataSource, Session
from pipelines.resources import Resources
from pipelines.stages import decompose, latencies, rounds, train
from pipelines.stages.pipeline import STAGES
from pipelines.units import Context, Job, Unit, Work
from pipelines.watching import StageProgress

STEPS = 10
"""Steps in each of the two epochs of a training; the second epoch is timed."""
PIXELS = 2**20
"""Most pixels of the validation and of the test split, 1,024 images of 32x32, but FEWEST images at the least."""
FEWEST = 100
EVALUATIONS = 2 * rounds.LEAST
"""Configurations that a strategy proposes, in two rounds."""
NETWORKS = 10
"""Networks whose latency is measured, in two groups."""
PASSES = 2
"""Passes of a measurement of latency, which takes one to three."""
SECONDS = 20.0
"""Decompositions are done, the cheapest first, until this time has passed."""
ANY_RATE = 1e-9
"""Learning rate of the trainings, which does not change their speed."""
LATENCY, END = "latency", "export and page"
S = TypeVar("S", bound=Schedule)


def estimate(
    experiment: Experiment,
    out: str,
    place: Place,
    device: str,
    timed: LatencyOptions,
    ending: str,
    on_part: Callable[[str, float], object],
) -> dict[str, float]:
    """Return the seconds of each stage of `experiment`, and of what `gross compress` does besides, in their order.

    `out` is the run folder, `device` and `timed` are those of the measurement of latency, and `ending` is that of the
    exported file. `on_part` is called after each stage with its name and the seconds of its small run.
    """
    splits = place.source().load(experiment.data)
    largest = max(schedule.batch_size for schedule in schedules_of(experiment).values())
    small, few = in_small(experiment, splits), FewImages(of=place.source(), train=STEPS * largest)
    watch, found = _Watch(), dict[str, tuple[list[Done], float]]()
    seconds: dict[str, float] = {}
    with nothing_is_stored(), TemporaryDirectory() as folder, small_folder(out, place.resources) as address:
        store, target = RunStore.create(address, small), Path(folder) / f"best{ending}"
        with Session.opened(store, place.resources, few, watch, in_process=place.in_process) as session:
            for name, stage in STAGES.items():
                driver, started = _TimedDriver(session, watch), time.perf_counter()
                stage.do(driver)
                took = time.perf_counter() - started
                found[name] = driver.done, took - sum(done.wall for done in driver.done)
                if driver.done:
                    on_part(name, took)
                if name == train.NAME:
                    seconds[LATENCY] = _latency(session.run, device, timed)
            run = Run(store)
        started = time.perf_counter()
        _finish(store, target, few)
        seconds[END] = time.perf_counter() - started
        images = few.load(experiment.data)
        scaled = Scaled(experiment, splits, run, images, _image(run, images.validation))
        stages = {name: scaled.stage(name, *each) for name, each in found.items() if each[0]}
    return {train.NAME: stages.pop(train.NAME), LATENCY: seconds[LATENCY], **stages, END: seconds[END]}


@contextmanager
def nothing_is_stored() -> Iterator[None]:
    """Within the block, let failures and interruptions say nothing of stored results."""
    try:
        yield
    except UnitsFailedError as error:
        raise GrossRayError(f"tried in small, {error.what}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("a dry run stores nothing") from None


@contextmanager
def small_folder(out: str, resources: Resources) -> Iterator[str]:
    """Yield the run folder of the small run, and delete it at the end.

    It is beside `out` if a cluster is joined, all nodes of which can reach only that.
    """
    if resources.joined_address is None:
        with TemporaryDirectory(prefix="gross-dry-run-") as folder:
            yield folder
        return
    storage = Storage(f"{out.rstrip('/')}.dry-run")
    try:
        yield str(storage)
    finally:
        storage.filesystem.delete_dir(storage.root)


def _finish(store: RunStore, target: Path, images: DataSource) -> None:
    """Export the best network of the small run and write its page, as `gross compress` does."""
    searched = Searched.of(store)
    with redirect_stdout(StringIO()):
        exporting.export(
            str(store.storage), best_candidate(store, searched), target, seed=None, objective=None, images=images
        )
    write_page(store, searched=searched)


def _latency(run: Run, device: str, timed: LatencyOptions) -> float:
    """Measure the latency of NETWORKS networks, and return the seconds of the whole measurement."""
    groups = [time.perf_counter()]
    small = replace(timed, num_sampled=min(NETWORKS, timed.num_sampled or NETWORKS))
    model = latencies.measure(run, device, small, lambda *_: groups.append(time.perf_counter()))
    latencies.put(run, model)
    forms = {layer: [*added] for layer, added in model.added_ms.items()}
    networks = num_networks(forms, timed) * (1 if timed.num_sampled else PASSES)
    networks = min(networks, prod(map(len, forms.values())) - 1)
    first, last = groups[1], groups[-1]
    each = (last - first) / max(1, model.num_sampled - BESIDE)
    return first - groups[0] + max(0, networks - BESIDE) * each


def in_small(experiment: Experiment, splits: Splits) -> Experiment:
    """Return the experiment of the small run.

    Its limit is half way between the costs of the cheapest and the full network, so that a configuration with
    bottlenecks is trained at the end.
    """
    shape = splits.train.images.shape[1:]
    network = build_model(
        experiment.model, num_classes=len(splits.classes), image_size=shape[-1], generator=torch.Generator()
    )
    choice = layer_choice(network, experiment.decomposition, shape)
    supernet = running_supernet(choice.network, choice.group_sizes, shape)
    macs = layer_costs(supernet, shape, "macs")
    limit = f"macs={(macs.minimum + macs.of_one(SearchSpace.of(supernet)[-1])) // 2:.0f}"
    options, own = experiment.search, experiment.validation
    return replace(
        experiment,
        training=_short(experiment.training) if experiment.trains_base else experiment.training,
        reconstruction=_short(experiment.reconstruction),
        finetuning=_short(experiment.finetuning),
        search=replace(
            options, limits=(limit,) * len(options.limits), evaluations=min(options.evaluations, EVALUATIONS)
        ),
        validation=replace(own, reconstruction=_short(own.reconstruction), finetuning=_short(own.finetuning)),
    )


def _short(schedule: S) -> S:
    return replace(schedule, epochs=2, images=STEPS * schedule.batch_size, milestones=(), lr=ANY_RATE)


def _image(run: Run, images: ImageSet) -> float:
    """Return the seconds in which the full network classifies an image, after it has done so once."""
    for _ in range(2):
        started = time.perf_counter()
        count_correct(run.base.network, images)
    return (time.perf_counter() - started) / len(images)


@dataclass(frozen=True, kw_only=True)
class FewImages(DataSource):
    """Finds the first images of each split."""

    of: DataSource
    train: int
    """Images of the training split."""

    def load(self, options: DataOptions) -> Splits:
        """Return the images; raises as `load_dataset` does."""
        splits = self.of.load(options)

        few = max(FEWEST, PIXELS // splits.train.images[0, 0].numel())

        def first(images: ImageSet, number: int) -> ImageSet:
            return images.first(min(number, len(images)))

        return replace(
            splits,
            train=first(splits.train, self.train),
            validation=first(splits.validation, few),
            test=first(splits.test, few),
        )


class _Watch:
    """Collects the seconds that units report as their results (a `ProgressReporter`)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[StageProgress]:
        """Forget the units of the stage before."""
        self.seconds.clear()
        yield _Collected(name, total, done, self.seconds)

    def note(self, text: str) -> None:
        """Do nothing."""


class _Collected(StageProgress):
    def __init__(self, name: str, total: int, done: int, seconds: dict[str, float]) -> None:
        super().__init__(name, total, done)
        self._seconds = seconds

    def unit_done(self, unit: str, text: str) -> None:
        super().unit_done(unit, text)
        self._seconds[unit] = float(text)


def timed_work(work: Work, context: Context, unit: Unit) -> str:
    """Do a unit, and return its seconds as the words about its result."""
    started = time.perf_counter()
    work(context, unit)
    return repr(time.perf_counter() - started)


class _TimedDriver:
    """Does the jobs of the stages by a session (a `Driver`), and records their seconds; of decompositions, a part."""

    def __init__(self, session: Session, watch: _Watch) -> None:
        self._session, self._watch = session, watch
        self.done: list[Done] = []

    @property
    def run(self) -> Run:
        """The small run."""
        return self._session.run

    @property
    def capacity(self) -> Capacity:
        """What can run at the same time."""
        return self._session.capacity

    def threads(self, kind: str, num_equal: int | None) -> int:
        """Return the threads of a unit."""
        return self._session.threads(kind, num_equal)

    def note(self, text: str) -> None:
        """Do nothing."""

    def do(self, job: Job) -> None:
        """Do a job."""
        if job.kind == decompose.NAME:
            self._decompose(job)
        else:
            self._do(job)

    def _do(self, job: Job) -> None:
        started = time.perf_counter()
        self._session.do(replace(job, work=partial(timed_work, job.work)))
        wall = time.perf_counter() - started
        seconds = dict(self._watch.seconds)
        self.done.append(Done(job, wall, seconds, self._slots(job) if seconds else 1))

    def _slots(self, job: Job) -> int:
        return self.capacity.slots(self.threads(job.kind, job.num_equal))

    def _decompose(self, job: Job) -> None:
        """Do one decomposition of each shape, the cheapest first, until SECONDS have passed; make up all others."""
        one_of: dict[tuple[Any, ...], Unit] = {}
        for unit in sorted(job.units, key=lambda unit: unit.cost):
            one_of.setdefault(shape_of(self.run, unit), unit)
        left, until = list(one_of.values()), time.perf_counter() + SECONDS
        number = self._slots(job)
        while left and time.perf_counter() < until:
            self._do(replace(job, units=left[:number]))
            left = left[number:]
        stored = job.done()
        for unit in job.units:
            if unit.name not in stored:
                _make_up(self.run, unit)
        self.run.changed()


def _make_up(run: Run, unit: Unit) -> None:
    """Store random terms as the decompositions of a unit."""
    assert isinstance(unit, decompose.Decomposition | decompose.Chain)
    for link in unit.links if isinstance(unit, decompose.Chain) else [unit]:
        out, channels, *kernel = run.base.choice.convs[link.layer].weight.shape
        size, groups = link.group_size, channels // link.group_size
        shapes = {
            "core": (groups, size, size, *kernel),
            "factor_in": (groups, channels, size),
            "factor_out": (groups, out, size),
        }
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
        }
        result = {"relative_error": 1.0, "cancellation": 1.0, "steps": 0, "status": BTDStatus.MAX_STEPS.value}
        run.store.save_checkpoint(decompose.NAME, link.name, tensors, result)
        row = {**link.values(), "groups": groups, **result, "seconds": 0.0}
        run.store.write_table("decompositions", link.name, [row])
