"""The networks that `benchmarks/peers.py` compares, each cut by one number: pruned, Tucker-2, narrower, uniform, ours.

`ratio` is how much is cut: 0 leaves the function of the network unchanged, and more costs less. Networks of all methods
are plain modules, which are trained whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import tensorly as tl
import torch
import torch.nn.functional as F
import torch_pruning as tp
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from gross_ray.btd.options import BTDOptions
from gross_ray.btd.solver import block_term_decomposition
from gross_ray.data.image_set import ImageSet
from gross_ray.models import initialise
from gross_ray.nn.calls import zero_images
from gross_ray.nn.copies import copied
from gross_ray.nn.replace import replace_modules
from gross_ray.search.forms import fold_layers
from gross_ray.space import DENSE, Configuration
from gross_ray.supernet.build import build_supernet
from gross_ray.supernet.configure import extract
from gross_ray.supernet.layers import LayerChoice

Cut = Callable[[float, int], nn.Module]
"""Takes a ratio and a number, and returns a network whose channels or ranks are multiples of the number if possible."""
TAYLOR_IMAGES = 1024
"""Training images whose gradients the Taylor importance uses."""


def pruned(
    network: nn.Module, shape: Sequence[int], importance: tp.importance.Importance, *, evenly: bool = False
) -> Cut:
    """Return a cut by Torch-Pruning, which removes the channels of the lowest importance in the whole network.

    With `evenly`, each layer loses the same share of its channels instead. `shape` is (C, H, W). The last layer
    keeps its outputs. The importance may use the gradients of `network`.
    """
    source = with_convolved_shortcuts(network)
    gradients = {name: parameter.grad for name, parameter in source.named_parameters()}

    def cut(ratio: float, round_to: int) -> nn.Module:
        own = copied(source).eval().requires_grad_()
        for name, parameter in own.named_parameters():
            parameter.grad = None if (gradient := gradients[name]) is None else gradient.clone()
        last = [module for module in own.modules() if isinstance(module, nn.Linear)][-1]
        tp.pruner.BasePruner(
            own,
            zero_images(own, 1, shape),
            importance,
            global_pruning=not evenly,
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=[last],
        ).step()
        own.zero_grad()
        return own

    return cut


def with_convolved_shortcuts(network: nn.Module) -> nn.Module:
    """Return a copy in which each shortcut of kind A (He et al. 2016) is the 1x1 convolution that it equals.

    Such a shortcut takes every second pixel and pads the channels with zeros, which Torch-Pruning cannot follow. The
    convolutions have weights of 0 and 1, count as MACs (0.6 % of ResNet-20) and are trained like all others.
    """
    convolutions: dict[str, nn.Module] = {}
    for name, block in network.named_modules():
        if isinstance(block, BasicBlock) and isinstance(block.downsample, nn.Sequential):
            if not isinstance(block.downsample[-1], nn.ConstantPad3d):
                continue  # kind B: a convolution already
            before, after = block.conv1.in_channels, block.conv1.out_channels
            conv = nn.Conv2d(before, after, 1, stride=block.stride, bias=False)
            kept = torch.arange(before)
            with torch.no_grad():
                conv.weight.zero_()[(after - before) // 2 + kept, kept] = 1
            convolutions[f"{name}.downsample"] = conv
    return replace_modules(network, convolutions) if convolutions else network


def with_gradients(network: nn.Module, images: ImageSet) -> nn.Module:
    """Return a copy for `pruned`, with the gradients of the loss on the first TAYLOR_IMAGES images."""
    own = copied(with_convolved_shortcuts(network)).eval().requires_grad_()
    some = images.first(min(TAYLOR_IMAGES, len(images)))
    for batch, labels in some.batches(128):
        (F.cross_entropy(own(images.as_inputs(batch)), labels, reduction="sum") / len(some)).backward()
    return own


def tucker(network: nn.Module) -> Cut:
    """Return a cut by Tucker-2, which replaces each spatial convolution by a 1x1, a core and a 1x1.

    `ratio` is the share of the energy that may be lost in each mode of each kernel: a rank is the smallest that keeps
    the rest of the sum of the squared singular values of the unfolded kernel. A layer that would need no fewer MACs
    stays dense.
    """
    convs = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.weight[0, 0].numel() > 1
    }
    spectra = {
        name: [torch.linalg.svdvals(_unfolded(conv.weight.detach(), mode)).square() for mode in (0, 1)]
        for name, conv in convs.items()
    }

    def cut(ratio: float, round_to: int) -> nn.Module:
        replaced = {}
        for name, conv in convs.items():
            ranks = [_rank(spectrum, ratio, round_to) for spectrum in spectra[name]]
            if _pays(conv, *ranks):
                replaced[name] = tucker_layer(conv, *ranks)
        return replace_modules(network, replaced).requires_grad_()

    return cut


def _unfolded(weight: Tensor, mode: int) -> Tensor:
    """Return the unfolding of a kernel (O, I, H, W) along a mode, as TensorLy does it, in float64."""
    return weight.double().movedim(mode, 0).flatten(1)


def _rank(spectrum: Tensor, lost: float, round_to: int) -> int:
    """Return the smallest multiple of `round_to` that loses at most this share of the energy, or all ranks."""
    left = spectrum.flip(0).cumsum(0).flip(0)  # left[r] is lost by rank r
    rank = max(1, int((left > lost * left[0]).sum()))
    return min(-(-rank // round_to) * round_to, len(spectrum))


def _pays(conv: nn.Conv2d, rank_out: int, rank_in: int) -> bool:
    """Return whether the three convolutions need fewer MACs than the convolution, for each of its outputs."""
    kernel, inputs = conv.weight[0, 0].numel(), conv.stride[0] * conv.stride[1]
    cost = inputs * conv.in_channels * rank_in + kernel * rank_in * rank_out + rank_out * conv.out_channels
    return cost < kernel * conv.in_channels * conv.out_channels


def tucker_layer(conv: nn.Conv2d, rank_out: int, rank_in: int) -> nn.Sequential:
    """Return a convolution (stride and padding of zeros in the core) as 1x1, core, 1x1 of these ranks, by TensorLy."""
    with tl.backend_context("pytorch", local_threadsafe=True):
        (core, (out, into)), _ = partial_tucker(conv.weight.detach().double(), (rank_out, rank_in), modes=[0, 1])
    first = nn.Conv2d(conv.in_channels, rank_in, 1, bias=False)
    middle = nn.Conv2d(rank_in, rank_out, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False)
    last = nn.Conv2d(rank_out, conv.out_channels, 1, bias=conv.bias is not None)
    with torch.no_grad():
        first.weight.copy_(into.T[..., None, None])
        middle.weight.copy_(core)
        last.weight.copy_(out[..., None, None])
        if last.bias is not None and conv.bias is not None:
            last.bias.copy_(conv.bias)
    return nn.Sequential(first, middle, last)


def narrower(network: nn.Module, shape: Sequence[int], seed: int) -> Cut:
    """Return a cut that removes the same share of each layer but the last, and draws new weights by `seed`."""
    cut_evenly = pruned(network, shape, tp.importance.MagnitudeImportance(), evenly=True)

    def cut(ratio: float, round_to: int) -> nn.Module:
        own = cut_evenly(ratio, round_to)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            initialise(own)
        return own

    return cut


def uniform_configurations(choice: LayerChoice) -> list[Configuration]:
    """Return the configurations of one group-size in all layers, the largest first.

    A layer that has no such bottleneck, or for which it needs no fewer MACs or parameters, stays dense.
    """
    sizes = sorted({size for each in choice.group_sizes.values() for size in each} - {DENSE}, reverse=True)
    return [Configuration([size if size in each else DENSE for each in choice.group_sizes.values()]) for size in sizes]


def decomposed(
    network: nn.Module, configuration: Mapping[str, int], folded: Sequence[str], options: BTDOptions, seed: int
) -> nn.Module:
    """Return a configuration as a plain network, decomposed and not trained, its layers `folded` as dense ones."""
    bottlenecks = {
        layer: []
        if size == DENSE
        else [
            block_term_decomposition(
                network.get_submodule(layer).weight.detach(), size, options=options, seed=seed
            ).to_bottleneck()
        ]
        for layer, size in configuration.items()
    }
    dense = [layer for layer, size in configuration.items() if size == DENSE]
    plain = extract(build_supernet(network, bottlenecks, dense), list(configuration.values()))
    return fold_layers(plain, folded).requires_grad_()
