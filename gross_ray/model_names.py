"""The names of networks, checked without importing torch, which building a network needs."""

from __future__ import annotations

from gross_ray.errors import InvalidValueError

FORM = "package.module:factory"
"""Form of the name of a user's own network."""
NAMES = ["four-conv", "vgg16", "resnet18", "resnet20", "resnet32", "resnet56"]
"""The built-in networks: the keys of `gross_ray.models.MODELS`."""


def check_model_name(name: str) -> None:
    """Raise InvalidValueError unless `name` is a built-in network or has the form package.module:factory.

    The factory itself is not imported: stored experiments are also read on machines that do not have it.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        if not (all(part.isidentifier() for part in module_name.split(".")) and attribute.isidentifier()):
            raise InvalidValueError(f"model {name!r}: write {FORM}")
    elif name not in NAMES:
        raise InvalidValueError(
            f"unknown model {name!r}; known models: {', '.join(NAMES)}; or {FORM}, like torchvision.models:resnet50"
        )
