"""A network in which nothing can be decomposed: the line says why for each convolution, and what helps."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import gross_ray
from gross_ray.errors import InvalidValueError

SHAPE = (3, 12, 12)


class Functional(nn.Module):
    """Has the weight of its convolution itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, channels, 3, 3))

    def forward(self, images: Tensor) -> Tensor:
        return torch.conv2d(images, self.weight)


class Bypassing(nn.Module):
    """Takes only the weight of one convolution, and calls the forward of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.spare = (nn.Conv2d(3 if i == 0 else 4, 4, 3) for i in range(4))

    def forward(self, images: Tensor) -> Tensor:
        return self.b.forward(F.conv2d(self.stem(images), self.a.weight, self.a.bias))


class Outermost(nn.Module):
    """Calls F.conv2d in the forward of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 3, 3))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight)


def stem_and(*others: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *others)


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    return conv


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)


FIRST = "the network's first convolution"
NAME = "(decomposition.layers, --layers)"
GROUPS_OF_1 = "choose a network that has convolutions with groups=1"
CASES = [
    (
        stem_and(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4)),
        f"1, 2 (1x1); 0 ({FIRST}); 3 (depthwise); name them to decompose them {NAME}",
    ),
    (stem_and(), f"0 ({FIRST}); name it to decompose it {NAME}"),
    (
        stem_and(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=2)),
        f"1, 2 (already grouped (2 groups)); 0 ({FIRST}); {GROUPS_OF_1}",
    ),
    (
        stem_and(*(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(10))),
        f"1, 2, 3, 4, 5, 6, 7, 8 and 2 more (depthwise); 0 ({FIRST}); {GROUPS_OF_1}",
    ),
    (
        stem_and(hooked(), hooked()),
        f"1, 2 (a Conv2d with hooks); 0 ({FIRST}); remove the hooks, and register them again on the compressed network",
    ),
    (
        stem_and(pruned(), pruned()),
        f"1, 2 (a Conv2d pruned by torch.nn.utils.prune); 0 ({FIRST}); make the pruning permanent first: "
        "torch.nn.utils.prune.remove(module, 'weight')",
    ),
    (
        stem_and(Functional(4), nn.Sequential(Functional(4))),
        f"1, 2.0 (calls F.conv2d itself, outside of any nn.Conv2d); 0 ({FIRST}); make its convolutions modules of "
        "nn.Conv2d",
    ),
    (
        Bypassing(),
        f"a, b (the forward pass uses its weight without calling it); stem ({FIRST}); spare (the forward pass never "
        "reaches it); call the module itself",
    ),
    (
        Outermost(),
        "(network) (calls F.conv2d itself, outside of any nn.Conv2d); make its convolutions modules of nn.Conv2d",
    ),
    (
        nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Flatten(2), nn.Conv1d(4, 4, 3)),
        "0 (a transposed convolution); 2 (a Conv1d, not a Conv2d); choose a network that has plain nn.Conv2d layers",
    ),
]


@pytest.mark.parametrize(("network", "line"), CASES)
def test_the_reasons_are_true_and_the_commonest_comes_first(network: nn.Module, line: str) -> None:
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
    expected = f"no convolution of this network can be decomposed: {line}"
    for layers in (None, ["*"]):
        with pytest.raises(InvalidValueError, match=f"^{re.escape(expected)}$"):
            gross_ray.decompose_model(network, layers=layers, input_shape=SHAPE)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()] == hooks


def test_the_remedies_help() -> None:
    def decomposed(network: nn.Module, **options: object) -> list[str]:
        return list(gross_ray.choice_of(network, input_shape=SHAPE, **options).convs)

    assert decomposed(CASES[0][0], names=["1", "2"]) == ["1", "2"]
    assert decomposed(CASES[1][0], names=["0"]) == ["0"]
    conv = pruned()
    assert decomposed(stem_and(prune.remove(conv, "weight"))) == ["1"]
    with_hooks = hooked()
    with_hooks._forward_hooks.clear()
    assert decomposed(stem_and(with_hooks)) == ["1"]


def test_functional_convolutions_beside_others_are_listed() -> None:
    network = stem_and(nn.Conv2d(4, 4, 3), Functional(4))
    choice = gross_ray.choice_of(network, input_shape=SHAPE)
    assert list(choice.convs) == ["1"]
    assert choice.left_alone == {"0": FIRST, "2": "calls F.conv2d itself, outside of any nn.Conv2d"}
    supernet = gross_ray.decompose_model(
        network, group_sizes=(1,), input_shape=SHAPE, options=gross_ray.BTDOptions(max_steps=2)
    )
    with pytest.raises(InvalidValueError) as again:  # a decomposed layer calls F.conv2d, too
        gross_ray.decompose_model(supernet, input_shape=SHAPE)
    assert "2 (calls F.conv2d itself" in str(again.value) and "1 (" not in str(again.value)


@pytest.mark.parametrize("shape", [None, SHAPE])
def test_without_any_convolution_there_is_nothing_to_decompose(shape: tuple[int, ...] | None) -> None:
    with pytest.raises(InvalidValueError, match="^nothing to decompose: this network has no convolution$"):
        gross_ray.decompose_model(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), input_shape=shape)
