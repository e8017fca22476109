"""The built-in networks: the paper's four-conv network, VGG-16 and ResNets for small images."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from gross_ray.errors import InvalidValueError, one_line
from gross_ray.model_names import FORM, check_model_name
from gross_ray.own_code import own_function
from gross_ray.own_network import accepted

MODELS: dict[str, Callable[[int, int], nn.Module]] = {}
"""Built-in networks by name, as functions of the number of classes and the image size in pixels."""


def build_model(name: str, *, num_classes: int, image_size: int = 32, generator: torch.Generator) -> nn.Module:
    """Return a freshly initialised network whose random weights depend only on `generator`.

    Raises InvalidValueError like `model_of`.
    """
    check_model_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return model_of(name, num_classes=num_classes, image_size=image_size)


def model_of(name: str, *, num_classes: int, image_size: int) -> nn.Module:
    """Return the built-in network `name`, or the result of the user's function `package.module:factory`.

    A factory gets those of the arguments num_classes and image_size that its signature names (num_classes also with
    **kwargs). Its network comes without wrappers and in float32 (`accepted`). Raises InvalidValueError for an unknown
    name or factory, for a factory that fails or returns no nn.Module, and for a network that `accepted` refuses.
    """
    factory = factory_of(name)
    if ":" not in name:
        try:
            return factory(num_classes, image_size)
        except RuntimeError as error:  # of torch, if memory is too small
            reason = str(error).splitlines()[0]
            raise InvalidValueError(f"model {name!r} for images of {image_size} pixels: {reason}") from None
    parameters = inspect.signature(factory).parameters.values()
    named = {"num_classes" if one.kind is one.VAR_KEYWORD else one.name for one in parameters}
    arguments = {"num_classes": num_classes, "image_size": image_size}
    try:
        network = factory(**{argument: value for argument, value in arguments.items() if argument in named})
    except Exception as error:  # of any kind: this is the user's own code
        raise InvalidValueError(f"model {name!r}: its factory fails: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise InvalidValueError(f"model {name!r}: returned a {type(network).__name__}, must return an nn.Module")
    return accepted(network, f"model {name!r}")


def factory_of(name: str) -> Callable[..., nn.Module]:
    """Return the function that builds the network `name`; raises InvalidValueError if there is none."""
    check_model_name(name)
    if ":" not in name:
        return MODELS[name]
    return own_function(name, FORM, lambda reason: InvalidValueError(f"model {name!r}: {reason}"))


def four_conv(num_classes: int = 10, image_size: int = 32) -> nn.Sequential:
    """Return the paper's network (section 4.2): four 3x3 convolutions of 32, 32, 64, 64 channels, two linear layers.

    Input (N, 3, image_size, image_size). A 2x2 max-pooling and a ReLU follow each convolution, with the same results
    as in the paper's order. Raises InvalidValueError for images under 16 pixels, which four poolings reduce to nothing.
    """
    if image_size < 16:
        raise InvalidValueError(f"image_size = {image_size}: four poolings need 16 pixels or more; use larger images")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = [3, 32, 32, 64, 64]
    for number in range(1, 5):
        layers[f"conv{number}"] = nn.Conv2d(channels[number - 1], channels[number], 3, padding=1)
        # The maximum of ReLUs is the ReLU of the maximum: pooling first leaves a quarter of the work.
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        layers[f"relu{number}"] = nn.ReLU()
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels[-1] * (image_size // 16) ** 2, 256)
    layers["relu5"] = nn.ReLU()
    layers["dropout"] = nn.Dropout(0.5)
    layers["fc2"] = nn.Linear(256, num_classes)
    network = nn.Sequential(layers)
    initialise(network)
    return network


def initialise(network: nn.Module) -> None:
    """Initialise as in section 4.2: He fan-out for convolutions, N(0, variance 0.01) for linear layers, biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def vgg16(num_classes: int = 10, image_size: int = 32) -> nn.Module:
    """Return torchvision's VGG-16 with batch-norm and one linear layer as classifier, for 32 pixels or more."""
    from torchvision.models import vgg16_bn

    with torch.device("meta"):  # do not draw the 120 million weights of the classifier that is replaced below
        network = vgg16_bn(num_classes=num_classes, init_weights=False)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Linear(512, num_classes)
    for module in network.features.to_empty(device="cpu"):
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    initialise(network.features)  # as torchvision does
    return network


def resnet18(num_classes: int = 10, image_size: int = 32) -> nn.Module:
    """Return torchvision's ResNet-18; below 64 pixels with a 3x3 stem of stride 1 and without the first pooling."""
    from torchvision.models import resnet18 as torchvision_resnet18

    network = torchvision_resnet18(num_classes=num_classes)
    if image_size < 64:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network


def small_resnet(num_classes: int = 10, image_size: int = 32, *, depth: int) -> nn.Sequential:
    """Return the ResNet of 6n + 2 = `depth` layers for 32x32 images of He et al. (2016, section 4.2).

    Input (N, 3, image_size, image_size), of any size. Three stages of n blocks with 16, 32 and 64 channels; their
    shortcuts have no weights (kind A): every second pixel, and channels padded with zeros. The names of the weights are
    those of the state dicts that Y. Idelbayev published. Raises InvalidValueError for a depth that is not 6n + 2.
    """
    from torchvision.models.resnet import BasicBlock

    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise InvalidValueError(f"depth = {depth}: must be 6n + 2, like 20, 32 or 56")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    layers["bn1"] = nn.BatchNorm2d(16)
    layers["relu"] = nn.ReLU()
    before = 16
    for number, channels in enumerate((16, 32, 64), start=1):
        stage: list[nn.Module] = []
        for _ in range(blocks):
            added, shortcut = channels - before, None
            if added:
                sides = (added // 2, added - added // 2)
                shortcut = nn.Sequential(nn.MaxPool2d(1, stride=2), nn.ConstantPad3d((0, 0, 0, 0, *sides), 0.0))
            stage.append(BasicBlock(before, channels, stride=2 if added else 1, downsample=shortcut))
            before = channels
        layers[f"layer{number}"] = nn.Sequential(*stage)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(before, num_classes)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return network


MODELS.update({"four-conv": four_conv, "vgg16": vgg16, "resnet18": resnet18})
MODELS.update({f"resnet{depth}": partial(small_resnet, depth=depth) for depth in (20, 32, 56)})
