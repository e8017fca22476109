"""Presets: functions that return named experiments; a docstring's first line is the preset's description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gross_ray.errors import InvalidValueError
from gross_ray.experiment import (
    DataOptions,
    DecompositionOptions,
    EngineOptions,
    Experiment,
    FinetuningOptions,
    ReconstructionOptions,
    Schedule,
    SearchOptions,
    SupernetOptions,
    SweepOptions,
    TrainingOptions,
    ValidationOptions,
)


@dataclass(frozen=True)
class Preset:
    """A function that returns a named experiment, and the time that the experiment takes."""

    make: Callable[[], Experiment]
    cost: str

    @property
    def description(self) -> str:
        """First line of the function's docstring."""
        return (self.make.__doc__ or "").strip().splitlines()[0]


def quickstart() -> Experiment:
    """All stages on a small scale, on the embedded sample of Fashion-MNIST."""
    return Experiment(
        name="quickstart",
        data=DataOptions(name="sample", limit_train=3000, limit_validation=1000),
        training=TrainingOptions(epochs=4, lr=0.02, milestones=(3,), batch_size=32, augment="none", seeds=3),
        decomposition=DecompositionOptions(tolerance=1e-4),
        supernet=SupernetOptions(seeds=1),
        reconstruction=ReconstructionOptions(epochs=1, lr=1e-3, milestones=(), batch_size=64, augment="none"),
        finetuning=FinetuningOptions(epochs=2, lr=1e-3, milestones=(), batch_size=64, augment="none"),
        search=SearchOptions(budgets=(16, 4), top=1),
        sweep=SweepOptions(alphas=(0.0, 4.0), scalings=("normalised",), seeds=1),
        validation=ValidationOptions(
            fixed=(16, 4),
            seeds=2,
            reconstruction=Schedule(epochs=1, lr=1e-2, batch_size=64, augment="none"),
            finetuning=Schedule(epochs=1, lr=2e-3, batch_size=64, augment="none"),
        ),
    )


def fashion() -> Experiment:
    """Full Fashion-MNIST (40,000/10,000/10,000) with the paper's protocol, except for the learning rate and alpha."""
    return Experiment(
        name="fashion",
        data=DataOptions(name="fashion-mnist"),
        # With 0.1, the paper's rate for CIFAR-10, two of five networks fell to chance accuracy within two epochs; alpha
        # is 0 (docs/method.md).
        training=TrainingOptions(lr=0.05),
        engine=EngineOptions(capture=True),
        search=SearchOptions(score="median"),
    )


def fashion_short() -> Experiment:
    """Full Fashion-MNIST on two cores: the paper's protocol with fewer epochs at higher rates, and fewer supernets."""
    return Experiment(
        name="fashion-short",
        data=DataOptions(name="fashion-mnist"),
        training=TrainingOptions(epochs=20, lr=0.05, milestones=(12, 17), batch_size=128, seeds=5),
        decomposition=DecompositionOptions(tolerance=1e-5),
        supernet=SupernetOptions(seeds=3),
        reconstruction=ReconstructionOptions(epochs=1, lr=1e-3, milestones=(), batch_size=128),
        finetuning=FinetuningOptions(epochs=6, lr=1e-3, milestones=(4,), batch_size=128),
        search=SearchOptions(score="median"),
        sweep=SweepOptions(seeds=3),
        validation=ValidationOptions(
            seeds=5,
            reconstruction=Schedule(epochs=1, lr=1e-2, batch_size=128),
            finetuning=Schedule(epochs=5, lr=3e-3, milestones=(3,), batch_size=128),
        ),
    )


def cifar_short() -> Experiment:
    """CIFAR-10 on two cores: the paper's base networks, fewer epochs of the rest at higher rates, fewer supernets."""
    return Experiment(
        name="cifar-short",
        data=DataOptions(name="cifar10"),
        training=TrainingOptions(lr=0.05, batch_size=128),
        decomposition=DecompositionOptions(tolerance=1e-5),
        supernet=SupernetOptions(seeds=3),
        reconstruction=ReconstructionOptions(epochs=3, lr=1e-3, milestones=(2,), batch_size=128),
        finetuning=FinetuningOptions(epochs=30, lr=1e-3, milestones=(16, 24), batch_size=128),
        sweep=SweepOptions(alphas=()),
        validation=ValidationOptions(
            seeds=5,
            drawn=12,
            reconstruction=Schedule(epochs=1, lr=1e-2, batch_size=128),
            finetuning=Schedule(epochs=5, lr=3e-3, milestones=(3,), batch_size=128),
        ),
    )


def cifar_short_sweep() -> Experiment:
    """Sweep over alpha beside cifar-short (--reuse its run), with supernets of a third of the length."""
    whole = cifar_short()
    return replace(
        whole,
        name="cifar-short-sweep",
        supernet=SupernetOptions(seeds=2),
        reconstruction=replace(whole.reconstruction, epochs=1, milestones=()),
        finetuning=replace(whole.finetuning, epochs=10, milestones=(5, 8)),
        sweep=SweepOptions(alphas=(0.0, 2.0, 4.0), seeds=2),
    )


def vgg16_short() -> Experiment:
    """VGG-16 with batch-norm on Fashion-MNIST on two cores: 12 layers at 1, 4, 16, 32; 12,800 images per epoch."""
    per_epoch = 12_800
    return Experiment(
        name="vgg16-short",
        model="vgg16",
        data=DataOptions(name="fashion-mnist", limit_validation=2500),
        training=TrainingOptions(epochs=3, lr=0.05, milestones=(2,), batch_size=128, augment="none", seeds=1),
        decomposition=DecompositionOptions(tolerance=1e-4, group_sizes=(1, 4, 16, 32)),
        engine=EngineOptions(precision="bfloat16"),
        supernet=SupernetOptions(seeds=1),
        reconstruction=ReconstructionOptions(
            epochs=2, lr=1e-3, milestones=(1,), batch_size=64, augment="none", images=per_epoch
        ),
        finetuning=FinetuningOptions(
            epochs=3, lr=1e-3, milestones=(2,), batch_size=64, augment="none", images=per_epoch
        ),
        search=SearchOptions(top=1, score="median", strategy="surrogate", evaluations=160, precision="bfloat16"),
        sweep=SweepOptions(alphas=()),
        validation=ValidationOptions(
            fixed=(16, 4),
            seeds=2,
            reconstruction=Schedule(epochs=1, lr=3e-3, batch_size=64, augment="none", images=per_epoch),
            finetuning=Schedule(epochs=1, lr=1e-3, batch_size=64, augment="none", images=per_epoch),
        ),
    )


def paper() -> Experiment:
    """CIFAR-10 with the paper's protocol (docs/protocol.md): five repeats, alpha 0, 2, 4, 8, Eq. 8 as printed."""
    return Experiment(
        name="paper",
        data=DataOptions(name="cifar10"),
        engine=EngineOptions(capture=True),
        supernet=SupernetOptions(alpha=4.0, scaling="index"),
        search=SearchOptions(score="median"),
        sweep=SweepOptions(scalings=("index",)),
    )


PRESETS: dict[str, Preset] = {
    "quickstart": Preset(quickstart, "about 2 minutes on 2 cores"),
    "fashion": Preset(fashion, "days on 2 cores; about 35 minutes on an H200, from rates of single trainings"),
    "fashion-short": Preset(fashion_short, "about an hour and a half on 2 cores"),
    "cifar-short": Preset(cifar_short, "about five hours on 2 cores; downloads CIFAR-10 (170 MB)"),
    "cifar-short-sweep": Preset(cifar_short_sweep, "about 40 minutes on 2 cores, of `gross sweep-alpha`"),
    "vgg16-short": Preset(vgg16_short, "about an hour on 2 cores"),
    "paper": Preset(paper, "days on 2 cores; meant for a GPU; downloads CIFAR-10 (170 MB)"),
}


def preset(name: str) -> Experiment:
    """Return a named experiment; raises InvalidValueError for an unknown name, listing the known ones."""
    if name not in PRESETS:
        raise InvalidValueError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name].make()
