from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gross_ray.errors import InvalidValueError
from gross_ray.models import four_conv
from gross_ray.search.batch_plan import SegmentMemory, default_memory_budget, plan_batches
from gross_ray.search.evaluator import Evaluator
from gross_ray.search.layer_forms import LayerForm
from gross_ray.search.options import EvaluationOptions
from gross_ray.space import SearchSpace
from gross_ray.supernet.layers import default_group_sizes

MIB = 2**20


def profiled_peak(work):
    """The oracle: the most bytes that torch's allocator had given out at once while `work` ran, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 5)

    def forward(self, images):
        hidden = F.max_pool2d(self.conv1(images), 2).relu()
        hidden = hidden + self.conv3(self.conv2(hidden).relu())
        return self.fc((hidden + self.conv4(hidden).relu()).mean(dim=(2, 3)))


class Narrow(nn.Sequential):
    """Layers whose bottlenecks are much wider than their outputs."""

    def __init__(self):
        convs = (nn.Conv2d(channels, 64 - channels, 3, padding=1) for channels in (56, 8, 56))
        names = OrderedDict(zip(("conv2", "conv3", "conv4"), convs, strict=True))
        super().__init__(OrderedDict(conv1=nn.Conv2d(3, 56, 1), **names))
        self.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)])


def _mixed(group_sizes):
    return LayerForm({size: "bottleneck" if size == group_sizes[-1] else "dense" for size in group_sizes})


CASES = {
    "four-conv": (lambda: four_conv(5), "dense", (2, 8, 32)),
    "four-conv, bottlenecks": (lambda: four_conv(5), "bottleneck", (4, 16)),
    "four-conv, mixed": (lambda: four_conv(5), "mixed", (4, 16)),
    "narrow, mixed": (Narrow, "mixed", (8, 32)),
    "residual": (Residual, "dense", (2, 8, 32)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("choice", ["whole space", "scattered"])
def test_the_memory_budget_is_kept_to_a_tenth(name, choice, random_supernet):
    make, form, budgets = CASES[name]
    torch.manual_seed(0)
    network = make()
    layers = ["conv2", "conv3", "conv4"]
    sizes = {layer: default_group_sizes(network.get_submodule(layer).in_channels)[-3:] for layer in layers}
    supernet = random_supernet(network, sizes).eval()
    space = list(SearchSpace.of(supernet))
    chosen = space if choice == "whole space" else space[::2] + space[3:9:3]
    images = torch.randint(256, (150, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(5, (150,))
    for mib in budgets:
        forms = None
        if form == "mixed":
            forms = {layer: _mixed(each) for layer, each in sizes.items()}
        options = EvaluationOptions(memory_budget=mib * MIB, form="auto" if form == "mixed" else form)
        evaluator = Evaluator(supernet, options, forms=forms)
        evaluator.evaluate(images[:1], labels[:1], chosen[:1])  # dense kernels are derived once
        peak = profiled_peak(lambda: evaluator.evaluate(images, labels, chosen))  # noqa: B023
        assert peak <= 1.1 * mib * MIB
        assert peak >= 0.4 * mib * MIB  # and it is used


segments = st.lists(st.builds(SegmentMemory, *(st.integers(1, 100) for _ in range(4))), min_size=2, max_size=5)


@given(segments, st.integers(1, 300), st.integers(1, 5), st.integers(1, 10**6))
def test_a_larger_budget_gives_no_smaller_batches(found, num_images, siblings, budget):
    def plan(budget):
        return plan_batches(found, [siblings] * (len(found) - 1), num_images, budget)

    needed = plan(10**9)
    assert needed.num_images == num_images
    assert needed.limits[-1] == siblings ** (len(found) - 1)
    try:
        small = plan(budget)
    except InvalidValueError as error:
        assert f"memory_budget = {budget}" in str(error)
        return
    assert 1 <= small.num_images <= num_images
    assert -(-num_images // small.num_images) >= -(-num_images // plan(2 * budget).num_images)
    assert list(small.limits) == sorted(small.limits)


def test_preparing_keeps_to_the_budget_too(random_supernet):
    torch.manual_seed(0)
    supernet = random_supernet(four_conv(5), {f"conv{n}": (8, 16, 32) for n in (2, 3, 4)})
    images, labels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.randint(5, (20,))
    space = list(SearchSpace.of(supernet))
    kernels = 4 * 3 * 9 * (32 * 32 + 32 * 64 + 64 * 64)  # the dense kernels of all three sizes, kept
    for form in ("auto", "dense"):
        evaluator = Evaluator(supernet, EvaluationOptions(memory_budget=MIB, form=form))
        peak = profiled_peak(lambda: evaluator.evaluate(images, labels, space))  # noqa: B023
        assert peak <= 1.1 * MIB + 3 * kernels  # while they are derived and timed, there are more of them


def test_one_image_that_does_not_fit_is_refused(random_supernet):
    supernet = random_supernet(four_conv(5), {"conv2": (1, 4)})
    images, labels = torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    space = list(SearchSpace.of(supernet))
    tight = Evaluator(supernet, EvaluationOptions(memory_budget=1000, form="dense"))
    with pytest.raises(InvalidValueError, match=r"memory_budget = 1000 bytes: 1 image need \d+; give at least that$"):
        tight.evaluate(images, labels, space)
    tight = Evaluator(supernet, EvaluationOptions(memory_budget=600_000, batch_size=3, form="dense"))
    with pytest.raises(InvalidValueError, match="3 images need .*, or a smaller batch_size"):
        tight.evaluate(images, labels, space)


def test_the_default_budget_is_a_cache():
    assert MIB // 4 <= default_memory_budget(torch.device("cpu")) <= 2**31
