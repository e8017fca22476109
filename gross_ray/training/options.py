"""Options of every training: schedules, sampling of group-sizes, repeats, and how steps are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from gross_ray.fields import EARLIER, require, require_group_sizes, settle
from gross_ray.nn.precision import PRECISIONS

SCALINGS = ("index", "normalised")
"""The two readings of Eq. 8."""
TRAINABLE = ("series", "all")
"""What the fine-tuning of a configuration on its own trains."""
CUDNN_BENCHMARK, PRODUCTS = "cudnn-benchmark", "products"
KERNELS = ("fused-sgd", "epoch-crops", "contiguous", CUDNN_BENCHMARK, "composed", PRODUCTS)
"""Other ways to compute the same steps (`EngineOptions.kernels`)."""
STARTS = ("new", "weights")
"""What the training of a base network begins from."""
NONE, CROP, RESIZED_CROP = AUGMENTATIONS = ("none", "crop", "resized-crop")
"""How a training changes its images."""
EARLIER_AUGMENT = {"true": CROP, "false": NONE}
"""What earlier versions wrote as `augment` in JSON, and its name now."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A training by stochastic gradient descent with step decay."""

    epochs: int
    """Passes over the training split."""
    lr: float
    """Learning rate of the first epoch; 0: a range test finds it before the training (docs/method.md)."""
    milestones: tuple[int, ...] = ()
    """Epochs after which the learning rate is multiplied by `gamma`."""
    gamma: float = 0.1
    """Factor of the learning rate at a milestone."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-3
    """Weight decay (L2) of SGD."""
    batch_size: int = 256
    """Images per step."""
    images: int = 0
    """Images per epoch, drawn anew for each epoch; 0, or more than the training split has: every image once."""
    augment: str = field(default=CROP, metadata={EARLIER: EARLIER_AUGMENT})
    """none; crop: a random crop from the images' margin, or from a padding of 2 pixels, and a horizontal flip;
    resized-crop: one of random area and aspect ratio, resized, and a horizontal flip (docs/method.md)."""

    def __post_init__(self) -> None:
        settle(self, "")
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.lr >= 0, "lr", self.lr, "must be above 0, or 0: found by a range test")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be 1 or more")
        require(self.augment in AUGMENTATIONS, "augment", self.augment, f"must be one of {', '.join(AUGMENTATIONS)}")
        require(self.images >= 0, "images", self.images, "must be 0 (all images) or more")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "must be in (0, 1]")
        ordered = all(earlier < later for earlier, later in pairwise((0, *self.milestones)))
        require(ordered, "milestones", self.milestones, "must be positive and ascending")

    def images_of(self, num_images: int) -> int:
        """Return the number of images in an epoch, if the training split has `num_images`."""
        return min(self.images or num_images, num_images)

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of `epoch` (0 is the first).

        Raises InvalidValueError for a schedule whose rate is still to be found.
        """
        require(self.lr > 0, "lr", self.lr, "is not found yet; set a rate above 0, or call find_rate first")
        return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Schedule):
    """The base network (section 4.2 of the paper)."""

    epochs: int = 100
    lr: float = 0.1
    milestones: tuple[int, ...] = (50, 75)
    seeds: int = 5
    """How many networks are trained; the one with the median validation accuracy is decomposed."""
    start: str = "new"
    """new: begin from new weights, or train nothing if `weights` is set; weights: train the network of `weights` on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seeds >= 1, "training.seeds", self.seeds, "must be 1 or more")
        require(self.start in STARTS, "training.start", self.start, f"must be one of {', '.join(STARTS)}")


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions(Schedule):
    """Response reconstruction of the supernet (section 4.3)."""

    epochs: int = 30
    lr: float = 1e-4
    milestones: tuple[int, ...] = (20,)


@dataclass(frozen=True, kw_only=True)
class FinetuningOptions(Schedule):
    """Fine-tuning of the supernet (section 4.4)."""

    epochs: int = 150
    lr: float = 1e-4
    milestones: tuple[int, ...] = (80, 120)


@dataclass(frozen=True, kw_only=True)
class SupernetOptions:
    """The supernet whose configurations are searched."""

    seeds: int = 5
    """How many supernets are trained; a configuration's accuracy is their median."""
    alpha: float = 0.0
    """Temperature of the sampling of group-sizes (Eq. 8): 0 is uniform, the paper uses 4 (docs/method.md)."""
    scaling: str = "normalised"
    """"index" samples with exp(-alpha i), Eq. 8 as printed; "normalised" with exp(-alpha i / N)."""

    def __post_init__(self) -> None:
        settle(self, "supernet.")
        require(self.seeds >= 1, "supernet.seeds", self.seeds, "must be 1 or more")
        require(self.alpha >= 0, "supernet.alpha", self.alpha, "must be 0 or more")
        require(self.scaling in SCALINGS, "supernet.scaling", self.scaling, f"must be one of {', '.join(SCALINGS)}")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The sweep over sampling temperatures (section 5.2, Figure 1)."""

    alphas: tuple[float, ...] = (0.0, 2.0, 4.0, 8.0)
    """Temperatures to train supernets with."""
    scalings: tuple[str, ...] = SCALINGS
    """Ways to read Eq. 8 (see `supernet.scaling`)."""
    seeds: int = 5
    """How many supernets are trained for each temperature and scaling."""

    def __post_init__(self) -> None:
        settle(self, "sweep.")
        require(self.seeds >= 1, "sweep.seeds", self.seeds, "must be 1 or more")
        lawful = all(alpha >= 0 for alpha in self.alphas) and len(set(self.alphas)) == len(self.alphas)
        require(lawful, "sweep.alphas", self.alphas, "must be 0 or more, each named once")
        known = set(self.scalings) <= set(SCALINGS) and len(set(self.scalings)) == len(self.scalings)
        require(known, "sweep.scalings", self.scalings, f"must be among {', '.join(SCALINGS)}, each named once")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Fixed and selected configurations, decomposed and trained on their own (sections 4.5 and 5.1)."""

    fixed: tuple[int, ...] = (32, 16, 4, 1)
    """Group-sizes of the fixed configurations; those of `search.budgets` are always added."""
    seeds: int = 5
    """How often each configuration is decomposed and trained."""
    drawn: int = 0
    """Number of further configurations to train, drawn evenly over the MACs. They show whether supernets rank
    configurations correctly that no search has selected."""
    drawn_seeds: int = 2
    """How often each of these is trained."""
    trainable: str = "series"
    """What fine-tuning trains. series: only the series, as in the paper; all: every parameter of the network, dense
    layers too, with batch-norm in training mode."""
    reconstruction: Schedule = field(default_factory=lambda: Schedule(epochs=30, lr=0.01, milestones=(20,)))
    """Response reconstruction of one configuration."""
    finetuning: Schedule = field(default_factory=lambda: Schedule(epochs=100, lr=0.001, milestones=(80,)))
    """Fine-tuning of one configuration."""

    def __post_init__(self) -> None:
        settle(self, "validation.")
        require(self.seeds >= 1, "validation.seeds", self.seeds, "must be 1 or more")
        require(self.drawn >= 0, "validation.drawn", self.drawn, "must be 0 or more")
        require(self.drawn_seeds >= 1, "validation.drawn_seeds", self.drawn_seeds, "must be 1 or more")
        rule = f"must be one of {', '.join(TRAINABLE)}"
        require(self.trainable in TRAINABLE, "validation.trainable", self.trainable, rule)
        require_group_sizes("validation.fixed", self.fixed)


_OFF = {"parallel_seeds": "1", "compile": "false", "capture": "false"}
"""The options that stack supernets, with the value at which they do not."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How trainings compute, and whether evaluations recalibrate batch-norm."""

    precision: str = "float32"
    """Precision of trainings: float32, tf32 (CUDA only) or bfloat16 (autocast). The search has `search.precision`."""
    compile: bool = False
    """Compile losses with torch.compile, which needs a C++ compiler; a supernet becomes one graph."""
    capture: bool = False
    """On a GPU, replay each step as one CUDA graph; the network's control flow must not depend on data or chance."""
    parallel_seeds: int = 1
    """How many supernets are trained in one batched pass, to fill a GPU; equal to separate trainings up to rounding."""
    kernels: tuple[str, ...] = ()
    """Other ways to compute the same steps, equal up to rounding; which are faster depends on the device. fused-sgd:
    SGD in one kernel; epoch-crops: images of many steps cropped at once; contiguous: images and weights not
    channels-last; cudnn-benchmark: cuDNN chooses its algorithms by timing them; composed: a bottleneck as the dense
    convolution that it equals; products: convolutions of stacked supernets as products of matrices."""
    recalibrate: bool = True
    """Give each configuration batch-norm statistics of its own, computed from training images."""

    def __post_init__(self) -> None:
        settle(self, "engine.")
        known = self.precision in PRECISIONS
        require(known, "engine.precision", self.precision, f"must be one of {', '.join(PRECISIONS)}")
        lawful = set(self.kernels) <= set(KERNELS) and len(set(self.kernels)) == len(self.kernels)
        require(lawful, "engine.kernels", self.kernels, f"must be among {', '.join(KERNELS)}, each named once")
        require(self.parallel_seeds >= 1, "engine.parallel_seeds", self.parallel_seeds, "must be 1 or more")
        stacked = {"parallel_seeds": self.parallel_seeds > 1, "compile": self.compile, "capture": self.capture}
        for name, stacks in stacked.items():
            require(
                not stacks or self.precision != "bfloat16",
                "engine.precision",
                self.precision,
                f"must be float32 or tf32 with engine.{name} = {getattr(self, name)}, because torch.func.vmap, which "
                f"stacks supernets, has no autocast; set engine.{name}={_OFF[name]}, or another precision",
            )
