"""Find the parameters that several modules of a network share."""

from __future__ import annotations

from torch import nn

from gross_ray.errors import InvalidValueError


def shared_parameters(model: nn.Module) -> dict[nn.Module, str]:
    """Return what each module shares with another one, like "shares its weight with decoder.weight".

    Two parameters are one also if they are two objects over the same memory. A module that is registered under several
    names is one module, and shares nothing.
    """
    found: dict[nn.Module, str] = {}
    for owning in _owners(model).values():
        for module, name, _ in owning:
            others = [full for other, _, full in owning if other is not module]
            if others:
                found.setdefault(module, f"shares its {name} with {others[0]}")
    return found


def check_trainable(model: nn.Module) -> None:
    """Raise InvalidValueError, naming them, if two parameters are different objects over the same memory.

    torch gives each its own memory as soon as it moves them, and an optimizer treats them as two.
    """
    for owning in _owners(model).values():
        (first, name, full), *others = owning
        for other, same, other_full in others:
            if other._parameters[same] is not first._parameters[name]:
                raise InvalidValueError(
                    f"the parameters {full} and {other_full} share their memory, but are two objects, which training "
                    f"would separate; make them one: {other_full} = {full}"
                )


def _owners(model: nn.Module) -> dict[object, list[tuple[nn.Module, str, str]]]:
    """Return the modules that own each parameter, with its name in the module and in the network."""
    owners: dict[object, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append((module, name, f"{path}.{name}".lstrip(".")))
    return owners


def _memory(parameter: nn.Parameter) -> object:
    """Return what two parameters that are one have in common: the object, or the address of plain memory."""
    plain = type(parameter) is nn.Parameter  # a subclass, like a lazy one, may have no memory
    return (plain and parameter.data_ptr()) or id(parameter)
