import copy
import re
from math import sqrt
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from gross_ray import model_names
from gross_ray.errors import InvalidValueError
from gross_ray.models import (
    MODELS,
    build_model,
    check_model_name,
    four_conv,
    initialise,
    model_of,
    resnet18,
    small_resnet,
    vgg16,
)
from gross_ray.supernet.layers import decomposable_layers


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return vgg16(10).eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return resnet18(10).eval()


def test_four_conv_is_that_of_section_4_2() -> None:
    network = four_conv()
    for conv, (in_channels, out_channels) in zip(
        convolutions(network), [(3, 32), (32, 32), (32, 64), (64, 64)], strict=True
    ):
        assert (conv.in_channels, conv.out_channels) == (in_channels, out_channels)
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        assert conv.groups == 1
        assert conv.bias is not None
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert [(one.in_features, one.out_features) for one in linear] == [(256, 256), (256, 10)]
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.5]
    assert list(decomposable_layers(network)) == ["conv2", "conv3", "conv4"]


@pytest.mark.parametrize(("num_classes", "image_size"), [(10, 32), (3, 16), (7, 50)])
def test_four_conv_computes_what_section_4_2_says(num_classes: int, image_size: int) -> None:
    network = build_model("four-conv", num_classes=num_classes, image_size=image_size, generator=seeded(0)).eval()
    images = torch.randn(2, 3, image_size, image_size, generator=seeded(1))
    weights = network.state_dict()

    def layer(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    hidden = images
    for number in range(1, 5):
        hidden = torch.conv2d(hidden, *layer(f"conv{number}"), padding=1).clamp_min(0)
        hidden = hidden.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    hidden = torch.addmm(layer("fc1")[1], hidden.flatten(1), layer("fc1")[0].T).clamp_min(0)
    logits = torch.addmm(layer("fc2")[1], hidden, layer("fc2")[0].T)
    assert logits.shape == (2, num_classes)
    with torch.no_grad():
        torch.testing.assert_close(network(images), logits)


def test_four_conv_drops_out_between_the_linear_layers_only_in_training() -> None:
    network = build_model("four-conv", num_classes=10, generator=seeded(0))
    names = [name for name, _ in network.named_children()]
    assert names[names.index("dropout") - 2 : names.index("dropout") + 2] == ["fc1", "relu5", "dropout", "fc2"]
    images = torch.randn(2, 3, 32, 32, generator=seeded(1))
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


def test_pooling_before_the_relu_is_the_papers_order() -> None:
    ours = build_model("four-conv", num_classes=10, generator=seeded(0)).eval()
    swapped = {"relu": "pool", "pool": "relu"}
    names = [
        re.sub(r"^(relu|pool)(?=[1-4])", lambda match: swapped[match[0]], name) for name, _ in ours.named_children()
    ]
    assert names[:3] == ["conv1", "relu1", "pool1"]
    theirs = nn.Sequential(*(ours.get_submodule(name) for name in names))
    images = torch.randn(20, 3, 32, 32, generator=seeded(1))
    results = []
    for network in (ours, theirs):
        logits = network(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(network.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_four_conv_refuses_images_that_its_poolings_reduce_to_nothing() -> None:
    with pytest.raises(InvalidValueError, match="image_size = 15: four poolings need 16 pixels or more"):
        four_conv(image_size=15)


def test_weights_are_drawn_as_section_4_2_says() -> None:
    # Large layers, so that the standard deviation of n normal numbers, which has the error 1 / sqrt(2 n), is sharp.
    network = nn.Sequential(nn.Conv2d(200, 100, 3), nn.Conv2d(64, 128, 5, bias=False), nn.Linear(600, 300))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        initialise(network)
    expected = [sqrt(2 / (100 * 3 * 3)), sqrt(2 / (128 * 5 * 5)), sqrt(0.01)]
    for module, deviation in zip(network, expected, strict=True):
        weight = module.weight.detach().double()
        bound = 5 / sqrt(2 * weight.numel())
        assert abs(float(weight.std()) / deviation - 1) < bound
        assert abs(float(weight.mean()) / deviation) < 5 / sqrt(weight.numel())
        within = float((weight.abs() < deviation).double().mean())  # 68.27 % for a normal distribution, 57.7 % uniform
        assert abs(within - 0.6827) < 5 * sqrt(0.25 / weight.numel())
        if module.bias is not None:
            assert not module.bias.any()


def test_four_conv_has_this_initialisation() -> None:
    network = build_model("four-conv", num_classes=10, generator=seeded(0))
    again = copy.deepcopy(network)
    for module in (module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)):
        fan_out = module.weight[:, 0].numel()
        deviation = sqrt(2 / fan_out) if isinstance(module, nn.Conv2d) else 0.1
        assert abs(float(module.weight.detach().std()) / deviation - 1) < 5 / sqrt(2 * module.weight.numel())
        assert not module.bias.any()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        initialise(again)
    assert not torch.equal(again.conv1.weight, network.conv1.weight)


def test_vgg16_is_torchvisions_with_one_linear_layer(vgg: nn.Module) -> None:
    assert len(convolutions(vgg)) == 13
    assert len(decomposable_layers(vgg)) == 12
    channels = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert [conv.out_channels for conv in convolutions(vgg)] == channels
    assert [m.out_features for m in vgg.modules() if isinstance(m, nn.Linear)] == [10]
    for size in (32, 40):
        assert vgg(torch.zeros(1, 3, size, size)).shape == (1, 10)


def test_vgg16_is_initialised_as_torchvision_does(vgg: nn.Module) -> None:
    """It is built without drawing torchvision's classifier; no weight may stay uninitialised memory."""
    with torch.random.fork_rng(devices=[]):
        theirs = torchvision.models.vgg16_bn().features.state_dict()
    ours = vgg.features.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape and tensor.dtype == theirs[name].dtype
        if tensor.dim() == 4:
            assert abs(float(tensor.std() / theirs[name].std()) - 1) < 10 / sqrt(2 * tensor.numel())
            assert abs(float(tensor.mean())) < 5 * float(tensor.std()) / sqrt(tensor.numel())
        else:
            assert torch.equal(tensor, theirs[name]), name
    again = build_model("vgg16", num_classes=10, generator=seeded(3)).features[0].weight
    assert torch.equal(again, build_model("vgg16", num_classes=10, generator=seeded(3)).features[0].weight)
    assert not torch.equal(again, build_model("vgg16", num_classes=10, generator=seeded(4)).features[0].weight)


def test_resnet18_is_torchvisions_with_a_small_stem(resnet: nn.Module) -> None:
    chosen = decomposable_layers(resnet)
    assert len(chosen) == 16
    assert {conv.kernel_size for conv in chosen.values()} == {(3, 3)}
    assert "conv1" not in chosen
    assert len(convolutions(resnet)) == 20  # the first, the 16, and three 1x1 of the shortcuts
    assert resnet.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert resnet.layer1(resnet.maxpool(torch.zeros(1, 64, 32, 32))).shape == (1, 64, 32, 32)
    assert resnet(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_resnet18_keeps_torchvisions_stem_for_large_images() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = MODELS["resnet18"](5, 64)
        torch.manual_seed(0)
        theirs = torchvision.models.resnet18(num_classes=5)
    weights = theirs.state_dict()
    assert list(ours.state_dict()) == list(weights)
    assert all(torch.equal(weight, weights[name]) for name, weight in ours.state_dict().items())
    assert isinstance(ours.maxpool, nn.MaxPool2d)


def of_he(weights: dict[str, Tensor], blocks: int, images: Tensor) -> Tensor:
    """A ResNet for small images as section 4.2 of He et al. (2016) describes it, in functions."""

    def unit(x: Tensor, block: str, number: int, stride: int = 1) -> Tensor:
        norm = [weights[f"{block}bn{number}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(
            functional.conv2d(x, weights[f"{block}conv{number}.weight"], stride=stride, padding=1), *norm
        )

    x = unit(images, "", 1).relu()
    for stage in (1, 2, 3):
        for number in range(blocks):
            block, smaller = f"layer{stage}.{number}.", stage > 1 and number == 0
            around = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *[x.shape[1] // 2] * 2)) if smaller else x
            x = (unit(unit(x, block, 1, 2 if smaller else 1).relu(), block, 2) + around).relu()
    return functional.linear(x.mean((2, 3)), weights["linear.weight"], weights["linear.bias"])


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
@pytest.mark.parametrize("size", [32, 31])
def test_small_resnets_are_those_of_he_et_al(depth: int, parameters: int, size: int) -> None:
    """0.27, 0.46 and 0.85 million parameters in their Table 6."""
    network = build_model(f"resnet{depth}", num_classes=10, generator=seeded(0)).double().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(decomposable_layers(network)) == depth - 2
    assert {type(module).__module__.split(".")[0] for module in network.modules()} == {"torch", "torchvision"}
    generator = seeded(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                values.copy_(0.5 + torch.rand(values.shape, generator=generator))
    images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), of_he(network.state_dict(), (depth - 2) // 6, images))


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_a_small_resnet_has_a_multiple_of_six_and_two_layers(depth: int) -> None:
    with pytest.raises(InvalidValueError, match=f"depth = {depth}: must be 6n"):
        small_resnet(depth=depth)


@pytest.mark.parametrize("name", ["four-conv", "resnet18", "resnet20"])
def test_generator_alone_decides_the_weights(name: str) -> None:
    state = torch.get_rng_state()
    generator = seeded(3)
    first = build_model(name, num_classes=10, generator=generator).state_dict()
    second = build_model(name, num_classes=10, generator=generator).state_dict()
    torch.manual_seed(99)
    again = build_model(name, num_classes=10, generator=seeded(3)).state_dict()
    assert all(torch.equal(weight, again[key]) for key, weight in first.items())
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])
    torch.set_rng_state(state)
    build_model(name, num_classes=10, generator=seeded(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    for refuse in (check_model_name, lambda name: build_model(name, num_classes=10, generator=seeded(0))):
        with pytest.raises(InvalidValueError) as caught:
            refuse("bert")
        assert str(caught.value).startswith(
            "unknown model 'bert'; known models: four-conv, vgg16, resnet18, resnet20, resnet32, resnet56; or "
        )


def own_factory(num_classes: int, *, image_size: int) -> nn.Module:
    return nn.Linear(image_size, num_classes)


def no_network() -> int:
    return 3


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3))


def test_a_network_without_weights_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        InvalidValueError, match="its module '1' is a LazyConv2d without weights yet: run an image through it in"
    ):
        model_of(f"{__name__}:lazy", num_classes=2, image_size=32)


def of_two_lines() -> nn.Module:
    raise ValueError("of two\n  lines")


def test_a_users_factory_gets_the_arguments_that_it_names() -> None:
    own = model_of(f"{__name__}:own_factory", num_classes=7, image_size=40)
    assert (own.in_features, own.out_features) == (40, 7)
    theirs = model_of("torchvision.models:mobilenet_v2", num_classes=3, image_size=40)
    assert theirs.classifier[1].out_features == 3
    assert len(convolutions(model_of("vgg16", num_classes=3, image_size=32))) == 13


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nowhere.at_all:make", "model 'nowhere.at_all:make': No module named 'nowhere'; write package.module:factory"),
        (":make", "model ':make': .*write package.module:factory"),
        ("torch:nothing", "module 'torch' has no attribute 'nothing'; write"),
        ("torch:pi", "pi is not a function"),
        (f"{__name__}:no_network", "returned a int, must return an nn.Module"),
        (f"{__name__}:of_two_lines", "its factory fails: ValueError: of two lines$"),
        ("failing_model:make", "model 'failing_model:make': failing_model fails: NameError: name 'missing' is not"),
        ("torch.nn:Linear", "its factory fails: TypeError: .*in_features"),
        ("vgg", "unknown model 'vgg'; known models: four-conv, vgg16, resnet18"),
    ],
)
def test_an_unknown_model_or_factory_is_refused(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_model.py").write_text("missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidValueError, match=line):
        model_of(name, num_classes=2, image_size=32)


def test_the_names_that_are_checked_without_torch_are_the_built_in_networks() -> None:
    assert list(MODELS) == model_names.NAMES
