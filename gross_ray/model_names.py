"""How networks are named. Checks names without importing torch, which the networks themselves need."""

from __future__ import annotations

from gross_ray.errors import InvalidValueError

FORM = "package.module:factory"
"""How a network of the user's own is named."""
NAMES = ["four-conv", "vgg16", "resnet18"]
"""The built-in networks: the keys of `gross_ray.models.MODELS`."""


def check_model_name(name: str) -> None:
    """Raise InvalidValueError for an unknown network, listing those there are, and for no package.module:factory.

    A factory of one's own is not looked for: what is stored is read where it is not installed, too.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        if not (all(part.isidentifier() for part in module_name.split(".")) and attribute.isidentifier()):
            raise InvalidValueError(f"model {name!r}: write {FORM}")
    elif name not in NAMES:
        raise InvalidValueError(
            f"unknown model {name!r}; there are: {', '.join(NAMES)}; others by {FORM}, like torchvision.models:resnet50"
        )
