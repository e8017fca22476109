import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gross_ray.data.normalisation import Normalisation
from gross_ray.errors import InvalidValueError
from gross_ray.models import four_conv
from gross_ray.search import evaluator
from gross_ray.search.evaluator import Evaluator, NotTraceableWarning, RowsApartWarning, evaluate_configurations
from gross_ray.search.folding import fold
from gross_ray.search.graph import trace
from gross_ray.search.latency import LatencyOptions, measure_latency
from gross_ray.search.layer_forms import LayerForm, Siblings
from gross_ray.search.options import EvaluationOptions
from gross_ray.search.prefix_walk import PrefixWalk
from gross_ray.search.traceability import is_of_the_machine
from gross_ray.space import SearchSpace
from gross_ray.supernet.configure import extract, get_configuration, series_layers, set_configuration

CLASSES = 5


class Block(nn.Module):
    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.down = nn.Conv2d(channels, out_channels, 1, stride) if stride > 1 else None

    def forward(self, images):
        identity = images
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(images)))))
        if self.down is not None:
            identity = self.down(images)
        out += identity
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images):
        return self.head(self.dropout(F.relu(self.blocks(self.stem(images)), inplace=True).mean(dim=(2, 3))))


class Small(nn.Module):
    """A stem, three convolutions and a head; the networks below differ in how they use them."""

    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(8, 8, 3, padding=1)  # named_modules meets it first, the forward pass last
        self.second = nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="circular")
        self.first = nn.Conv2d(8, 8, 3, padding=1, stride=(2, 1), bias=False)
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, CLASSES)
        self.relu = nn.LeakyReLU(0.3, inplace=True)  # twice is not once

    def forward(self, images):
        return self.head(self.body(self.stem(images).relu()).mean(dim=(2, 3)))


class Reordered(Small):
    def body(self, hidden):
        return self.third(self.second(self.first(hidden).relu()).relu())


class Concatenating(Small):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(16, 8, 3, padding=1)

    def body(self, hidden):
        hidden = torch.cat([self.first(hidden), self.second(hidden)], dim=1)
        return self.third(hidden.relu())


class Shared(Small):
    """`first` runs twice, before and after `second`; `third` never."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)

    def body(self, hidden):
        return self.first(self.second(self.first(hidden).relu()).relu())


class OverwritingMethods(Small):
    """Overwrites values by methods whose result it drops, and goes on with the overwritten."""

    def body(self, hidden):
        hidden = self.first(hidden)
        hidden.mul_(2).relu_()
        hidden = self.second(hidden)
        hidden.clamp_(-1, 1)
        third = self.third(hidden)
        third.add_(hidden)
        return third


class OverwritingModules(Small):
    """In-place modules: one overwrites a value from before a branch, once for each sibling."""

    def body(self, hidden):
        hidden = self.first(hidden)
        self.relu(hidden)
        out = self.second(hidden)
        self.relu(hidden)
        out = self.third(out) + hidden
        torch.tanh_(out)
        return F.relu(out, inplace=True)


class OverwritingFunctions(Small):
    def body(self, hidden):
        hidden = self.first(hidden)
        F.leaky_relu(hidden, 0.3, inplace=True)
        hidden = self.second(hidden)
        kept = hidden
        torch.relu_(hidden)
        return self.third(hidden) - 2 * kept


class Viewed(Small):
    """Overwrites a part of a value through a view of it, and the whole behind the back of an alias."""

    def body(self, hidden):
        hidden = self.first(hidden)
        hidden[:, :4].mul_(-2)
        return self.third(self.second(hidden))


class Chunked(Small):
    def body(self, hidden):
        hidden = self.first(hidden)
        one, _ = hidden.chunk(2, 1)
        one.relu_()
        return self.third(self.second(hidden))


class Aliased(Small):
    def __init__(self):
        super().__init__()
        self.same = nn.Identity()

    def body(self, hidden):
        hidden = self.first(hidden)
        same = self.same(hidden)
        self.relu(hidden)
        return self.third(self.second(hidden)) + same


class Filling(Small):
    def body(self, hidden):
        hidden = self.first(hidden)
        bias = hidden.mean(dim=1, keepdim=True)
        bias.fill_(0.3)
        return self.third(self.second(hidden + bias))


class ManyArguments(Small):
    def forward(self, *images, **options):
        return super().forward(images[0])

    body = Reordered.body


class ModeDependent(Small):
    """What a mode decides in the network's own code, in place of a module."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def body(self, hidden):
        hidden = F.batch_norm(self.first(hidden), self.mean, self.var, training=self.training)
        hidden = F.dropout(self.second(hidden), 0.5, self.training)
        if self.training:
            hidden = hidden * 3
        return self.third(hidden * torch.full((1,), 1.5, dtype=hidden.dtype))


class Keywords(Small):
    """Calls a plain convolution by keyword."""

    def forward(self, images):
        return self.head(self.body(self.stem(input=images).relu()).mean(dim=(2, 3)))

    body = Reordered.body


class Untraceable(Small):
    def body(self, hidden):
        hidden = self.first(hidden)
        if hidden.sum() > 0:
            hidden = self.second(hidden)
        return self.third(hidden)


class WithOptions(Small):
    """A second argument that has a default."""

    def forward(self, images, scale=2.0):
        return super().forward(images) * scale

    body = Reordered.body


NAMES = ("third", "second", "first")
CASES = {
    "four-conv": (
        lambda: four_conv(CLASSES, image_size=16),
        {"conv2": (1, 8, 32), "conv3": (4, 32), "conv4": (1, 16, 64)},
    ),
    "residual": (
        Residual,
        {"blocks.0.conv1": (1, 8), "blocks.0.conv2": (2, 4), "blocks.1.conv1": (1, 2, 4), "blocks.1.conv2": (1, 16)},
    ),
    "cat": (Concatenating, {name: (1, 2, 4) for name in NAMES}),
    "shared layer": (Shared, {"second": (1, 2, 8), "first": (1, 2, 4, 8)}),
    "a layer not used": (Shared, {"third": (1, 4), "second": (2, 4, 8), "first": (1, 2, 4)}),
    "other order": (Reordered, {name: (1, 4, 8) for name in NAMES}),
    "in-place methods": (OverwritingMethods, {name: (1, 4) for name in NAMES}),
    "in-place modules": (OverwritingModules, {name: (1, 2, 4) for name in NAMES}),
    "in-place functions": (OverwritingFunctions, {name: (1, 4) for name in NAMES}),
    "default argument": (WithOptions, {name: (1, 4) for name in NAMES}),
    "keyword argument": (Keywords, {name: (1, 4) for name in NAMES}),
}


def build(make, sizes, random_supernet):
    """A float64 supernet with lively batch-norms, images, and labels that no configuration gets all right."""
    torch.manual_seed(0)
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, mean=1, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
    supernet = random_supernet(model, sizes)
    images = torch.randn(30, 3, 16, 16, dtype=torch.float64) + 2 * torch.randn(30, 3, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        logits = [extract(supernet, configuration)(images.clone()) for configuration in SearchSpace.of(supernet)]
        choice = torch.randint(len(logits), (len(images),))
        labels = torch.stack(logits)[choice, torch.arange(len(images))].argmax(dim=1)
    return supernet, images, labels


def one_by_one(supernet, images, labels, configurations):
    """The oracle: the plain network of each configuration, one forward pass over all images."""
    rows = []
    with torch.no_grad():
        for configuration in configurations:
            logits = extract(supernet, configuration).eval()(images.clone())
            correct = int((logits.argmax(dim=1) == labels).sum())
            rows.append((str(configuration), correct, len(labels), float(F.cross_entropy(logits, labels))))
    return rows


def agrees(table, expected):
    assert list(table.columns) == ["configuration", "correct", "total", "accuracy", "loss"]
    counts = list(zip(table["configuration"], table["correct"], table["total"], strict=True))
    assert counts == [row[:3] for row in expected]
    assert table["accuracy"].tolist() == [correct / total for _, correct, total in counts]
    assert table["loss"].tolist() == pytest.approx([row[3] for row in expected], abs=1e-9)


@pytest.fixture(scope="module", params=CASES, ids=[name.replace(" ", "_") for name in CASES])
def case(request, random_supernet):
    supernet, images, labels = build(*CASES[request.param], random_supernet)
    expected = one_by_one(supernet, images, labels, SearchSpace.of(supernet))
    assert len({row[1] for row in expected}) > 2  # the counts tell the configurations apart
    return supernet, images, labels, expected


@pytest.mark.parametrize("batch_size", [7, 50])
def test_the_whole_space_is_as_one_pass_for_each(case, batch_size):
    supernet, images, labels, expected = case
    before = images.clone()
    agrees(evaluate_configurations(supernet, images, labels, batch_size=batch_size), expected)
    assert torch.equal(images, before)


def test_some_configurations_in_any_order(case):
    supernet, images, labels, expected = case
    space = list(SearchSpace.of(supernet))
    places = random.Random(1).sample(range(len(space)), len(space) // 2)
    places += places[:1]  # one of them twice
    table = evaluate_configurations(supernet, images, labels, [tuple(space[place]) for place in places])
    agrees(table, [expected[place] for place in places])


@pytest.mark.parametrize("limits", [(1, 1, 1), (2, 2, 6), (3, 6, 18)])
@pytest.mark.parametrize("apart", [False, True])
def test_a_prefix_is_computed_once(limits, apart, random_supernet):
    supernet, images, _ = build(*CASES["four-conv"], random_supernet)
    siblings = {layer: Siblings(layer, LayerForm.uniform(layer, "dense")) for layer in series_layers(supernet).values()}
    rows = {}
    for name, layer in series_layers(supernet).items():

        def counting(images, sizes, name=name, run=siblings[layer].run):
            rows[name] = rows.get(name, 0) + len(images) * len(sizes)
            return run(images, sizes)

        siblings[layer].run = counting
    walk = PrefixWalk(supernet, trace(supernet))
    walk.siblings = siblings
    leaves = []
    with torch.inference_mode():
        tree = walk.tree(list(SearchSpace.of(supernet)))
        walk.run(images, tree, lambda found, _: leaves.extend(found), limits=limits, apart=apart)
    # conv2 gives its three sizes for each image, conv3 its two for each of those, conv4 its three.
    assert rows == {"conv2": 30 * 3, "conv3": 30 * 3 * 2, "conv4": 30 * 3 * 2 * 3}
    assert len(leaves) == len({leaf.sizes for leaf in leaves}) == 18


class CentringRows(Small):
    """Rows of one batch change each other: what the images of other configurations may not do."""

    def body(self, hidden):
        hidden = self.first(hidden).relu()
        return self.third(self.second(hidden - hidden.mean(dim=0)))


class WritesDownTheBatch(Small):
    def body(self, hidden):
        num = hidden.size(0)
        hidden = self.third(self.second(self.first(hidden)))
        return hidden.reshape(num, 8, -1, 1)


@pytest.mark.parametrize("network", [CentringRows, WritesDownTheBatch])
def test_configurations_do_not_share_a_batch_where_rows_mix(network, random_supernet):
    supernet, images, labels = build(network, {name: (1, 4) for name in NAMES}, random_supernet)
    expected = one_by_one(supernet, images, labels, SearchSpace.of(supernet))
    with pytest.warns(RowsApartWarning, match="mixes the rows of a batch .* slower") as caught:
        agrees(evaluate_configurations(supernet, images, labels, batch_size=len(images)), expected)
    assert len(caught) == 1 and caught[0].filename == __file__
    evaluator = Evaluator(supernet, EvaluationOptions(form="dense"))
    with pytest.warns(RowsApartWarning):
        evaluator.evaluate(images, labels, list(SearchSpace.of(supernet)))
    evaluator.evaluate(images, labels, [SearchSpace.of(supernet)[1]])  # warned once: warnings are errors here


@pytest.mark.parametrize("form", ["dense", "bottleneck", "auto"])
@pytest.mark.parametrize("memory_budget", [10**6, 10**9])
def test_float32_agrees_in_every_form(form, memory_budget, random_supernet):
    make, sizes = CASES["residual"]
    supernet, images, labels = build(make, sizes, random_supernet)
    supernet, images = supernet.float(), images.float()
    expected = one_by_one(supernet, images, labels, SearchSpace.of(supernet))
    found = evaluate_configurations(supernet, images, labels, form=form, memory_budget=memory_budget)
    assert sum(abs(found["correct"] - [row[1] for row in expected])) == 0  # of 30 images; no ties among them
    assert found["loss"].tolist() == pytest.approx([row[3] for row in expected], abs=1e-5)


def test_an_evaluator_is_used_again_and_takes_forms_that_are_known(random_supernet, monkeypatch):
    supernet, images, labels = build(*CASES["residual"], random_supernet)
    space = list(SearchSpace.of(supernet))
    first = Evaluator(supernet)
    expected = [tensor.tolist() for tensor in first.evaluate(images, labels, space)]
    assert set(first.forms) == set(SearchSpace.of(supernet).layers)
    monkeypatch.setattr(evaluator, "fastest_form", lambda *_: pytest.fail("timed again"))
    again = Evaluator(supernet, forms=first.forms)
    correct, loss = first.evaluate(images, labels, space[3:9])
    assert correct.tolist() == expected[0][3:9]
    assert loss.tolist() == pytest.approx(expected[1][3:9], abs=1e-9)  # other rows share a batch: rounding differs
    assert [tensor.tolist() for tensor in again.evaluate(images, labels, space)] == expected
    assert again.forms == first.forms


def test_bfloat16_is_near(random_supernet):
    supernet, images, labels = build(*CASES["residual"], random_supernet)
    supernet, images = supernet.float(), images.float()
    exact = evaluate_configurations(supernet, images, labels)
    near = evaluate_configurations(supernet, images, labels, precision="bfloat16")
    differences = (near["loss"] - exact["loss"]).abs()
    assert 0 < differences.max() < 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_counts_the_same(name, random_supernet):
    supernet, images, labels = build(*CASES[name], random_supernet)
    expected = one_by_one(supernet, images, labels, SearchSpace.of(supernet))
    agrees(evaluate_configurations(supernet.cuda(), images.cuda(), labels.cuda()), expected)
    tf32 = evaluate_configurations(supernet.float(), images.float().cuda(), labels.cuda(), precision="tf32")
    assert tf32["loss"].tolist() == pytest.approx([row[3] for row in expected], abs=0.1)


class TwoOutputs(Small):
    def forward(self, images):
        logits = self.head(self.first(self.stem(images)).mean(dim=(2, 3)))
        return logits, logits


def test_a_network_without_plain_logits_is_refused(random_supernet):
    supernet = random_supernet(TwoOutputs().double(), {"first": (1, 4)})
    with pytest.raises(InvalidValueError, match=r"returns a tuple: .* logits \(N, classes\)"):
        evaluate_configurations(supernet, torch.randn(30, 3, 16, 16).double(), torch.zeros(30, dtype=torch.int64))


def test_an_untraceable_network_warns_and_counts_the_same(random_supernet):
    supernet, images, labels = build(Untraceable, {name: (1, 4) for name in NAMES}, random_supernet)
    supernet.train()
    set_configuration(supernet, (4, 1, 4))
    expected = one_by_one(supernet, images, labels, SearchSpace.of(supernet))
    with pytest.warns(NotTraceableWarning, match="TraceError: .*control flow") as caught:
        table = evaluate_configurations(supernet, images, labels, batch_size=len(images))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    agrees(table, expected)
    assert supernet.training and get_configuration(supernet) == (4, 1, 4)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Viewed, "its graph's logits differ by"),
        (Chunked, "its graph's logits differ by"),
        (Aliased, "its graph's logits differ by"),
        (Filling, "fill_ overwrites its input"),
        (ManyArguments, r"forward takes \*"),
    ],
)
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_a_graph_that_does_something_else_is_not_used(network, reason, form, random_supernet):
    supernet, images, labels = build(network, {name: (1, 4) for name in NAMES}, random_supernet)
    expected = one_by_one(supernet, images, labels, SearchSpace.of(supernet))
    with pytest.warns(NotTraceableWarning, match=reason):
        agrees(evaluate_configurations(supernet, images, labels, form=form), expected)


def test_the_training_mode_leaves_no_trace(random_supernet):
    supernet, images, labels = build(ModeDependent, {name: (1, 4) for name in NAMES}, random_supernet)
    expected = one_by_one(supernet, images, labels, SearchSpace.of(supernet))
    supernet.train()
    buffers, attributes = {n: b.clone() for n, b in supernet.named_buffers()}, set(vars(supernet))
    agrees(evaluate_configurations(supernet, images, labels), expected)
    assert supernet.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in supernet.named_buffers())
    assert set(vars(supernet)) == attributes


def test_a_network_evaluated_one_by_one_keeps_to_the_budget(random_supernet):
    supernet, images, labels = build(Untraceable, {name: (1, 4) for name in NAMES}, random_supernet)
    expected = one_by_one(supernet, images, labels, SearchSpace.of(supernet))
    supernet_of_one = pytest.warns(NotTraceableWarning)
    with supernet_of_one, pytest.raises(InvalidValueError, match="memory_budget = 1000 bytes: 1 image need"):
        evaluate_configurations(supernet, images, labels, memory_budget=1000)
    with pytest.warns(NotTraceableWarning):
        agrees(evaluate_configurations(supernet, images, labels, memory_budget=300_000), expected)


@pytest.mark.parametrize("name", ["residual", "in-place modules"])
def test_the_supernet_is_left_as_it_was(name, random_supernet):
    supernet, images, labels = build(*CASES[name], random_supernet)
    active = SearchSpace.of(supernet)[1]
    set_configuration(supernet, active)
    supernet.train()
    for module in supernet.modules():  # frozen batch-norms stay frozen
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

    def state():
        modules = {n: (m.training, getattr(m, "inplace", None)) for n, m in supernet.named_modules()}
        return modules, get_configuration(supernet), {n: t.clone() for n, t in supernet.state_dict().items()}

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_configurations(supernet, images, labels)
    after = state()
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][key], before[2][key]) for key in before[2])
    with pytest.raises((ValueError, IndexError, RuntimeError)):  # labels outside the classes, in the middle of the walk
        evaluate_configurations(supernet, images, labels + CLASSES)
    assert state()[:2] == before[:2]


def test_bytes_are_normalised_here(random_supernet, generator):
    supernet, _, labels = build(*CASES["other order"], random_supernet)
    images = torch.randint(256, (len(labels), 3, 16, 16), generator=generator).to(torch.uint8)
    supernet = supernet.float()
    pd_bytes = evaluate_configurations(supernet, images, labels, form="dense")
    pd_floats = evaluate_configurations(supernet, Normalisation()(images), labels, form="dense")
    in_double = evaluate_configurations(supernet.double(), images, labels)
    assert in_double["loss"].tolist() == pytest.approx(pd_floats["loss"].tolist(), abs=1e-5)
    assert pd_bytes.equals(pd_floats)
    assert pd_bytes["correct"].nunique() > 1


def test_no_configurations_give_no_rows(random_supernet):
    supernet, images, labels = build(*CASES["other order"], random_supernet)
    assert len(evaluate_configurations(supernet, images, labels, [])) == 0


def test_bad_values_are_refused(random_supernet):
    supernet, images, labels = build(*CASES["other order"], random_supernet)
    with pytest.raises(InvalidValueError, match="30 images and 29 labels"):
        evaluate_configurations(supernet, images, labels[1:])
    with pytest.raises(InvalidValueError, match="0 images and 0 labels"):
        evaluate_configurations(supernet, images[:0], labels[:0])
    with pytest.raises(InvalidValueError, match="group-size 3 .*second: 1, 4, 8"):
        evaluate_configurations(supernet, images, labels, [(1, 1, 1), (1, 3, 1)])
    for option in ({"batch_size": 0}, {"memory_budget": 0}, {"form": "sparse"}, {"precision": "tf32"}):
        ((name, value),) = option.items()
        with pytest.raises(InvalidValueError, match=f"{name} = '?{value}"):
            evaluate_configurations(supernet, images, labels, **option)
    with pytest.raises(InvalidValueError, match="decompose_model"):
        evaluate_configurations(Reordered(), images, labels)


def test_images_that_the_network_cannot_run_are_told(random_supernet):
    supernet = random_supernet(four_conv(num_classes=CLASSES, image_size=16), {"conv2": (1, 2)})
    for shape in ((4, 1, 16, 16), (4, 3, 9, 9), (4, 16)):
        told = f"the network cannot run an image of {'x'.join(map(str, shape[1:]))}: RuntimeError"
        with pytest.raises(InvalidValueError, match=told):
            evaluate_configurations(supernet, torch.zeros(shape), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (torch.zeros(2, 3, 16, 16), torch.tensor([0, CLASSES]), f"labels from 0 to {CLASSES}: must be from 0 to"),
        (torch.zeros(2, 3, 16, 16), torch.tensor([-1, 0]), "labels from -1 to 0: must be"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2), r"labels of torch.float32 \(2,\): must be a tensor \(N,\)"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, dtype=torch.int64), r"labels of torch.int64 \(2, 1\): must"),
        (torch.zeros(2, 3, 16, 16), [0, 1], "labels of list: must"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 0]), "images of torch.float64: must be a"),
        (torch.zeros(2, 3, 16, 16).numpy(), torch.tensor([0, 0]), "images of ndarray: must be a tensor"),
    ],
)
def test_images_and_labels_of_another_kind_are_told(random_supernet, images, labels, told):
    supernet = random_supernet(four_conv(num_classes=CLASSES, image_size=16), {"conv2": (1, 2)})
    with pytest.raises(InvalidValueError, match=told):
        evaluate_configurations(supernet, images, labels)


class Keyword(nn.Module):
    """Gives a convolution its images by name, as nn.Conv2d allows."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, images):
        return self.head(F.relu(self.conv(input=self.stem(images))).mean(dim=(2, 3)))


def test_a_layer_that_is_given_its_images_by_name(random_supernet):
    supernet = random_supernet(Keyword(), {"conv": (1, 2, 8)})
    images = torch.randn(20, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % CLASSES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = evaluate_configurations(supernet, images, labels)
    for text, correct in zip(table["configuration"], table["correct"], strict=True):
        plain = extract(supernet, (int(text),)).eval()
        assert int((plain(images).argmax(1) == labels).sum()) == correct
    options = LatencyOptions(repeats=2, num_sampled=2)
    model = measure_latency(supernet, (3, 9, 9), options, generator=torch.Generator().manual_seed(0))
    assert set(model.added_ms) == {"conv"}
    _, (folding,) = fold(plain, (3, 9, 9), objective="latency_ms", latency=options)
    assert folding.layer == "conv" and folding.bottleneck > 0


def of_the_cpus_memory():
    """Return the error of the installed torch, whose text may change, when the CPU's memory is too small."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


MACHINE_FAULTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    of_the_cpus_memory(),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(24, "Too many open files"),
]


def test_an_operation_that_a_device_lacks_is_of_the_network():
    lacks = "Could not run 'aten::own' with arguments from the 'CUDA' backend"
    assert not is_of_the_machine(NotImplementedError(lacks))
    assert all(map(is_of_the_machine, MACHINE_FAULTS))


@pytest.mark.parametrize("fault", MACHINE_FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("place", ["trace", "PrefixWalk.run"])
def test_a_fault_of_the_machine_is_no_network_that_cannot_be_traced(fault, place, random_supernet, monkeypatch):
    supernet, images, labels = build(Shared, {name: (1, 4) for name in NAMES}, random_supernet)

    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(f"gross_ray.search.evaluator.{place}", fail)
    with pytest.raises(type(fault)) as caught:
        evaluate_configurations(supernet, images, labels)
    assert caught.value is fault
