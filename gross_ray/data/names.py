"""How datasets are named."""

from gross_ray.errors import InvalidValueError

WITH_FILES = ("fashion-mnist", "cifar10")
"""The datasets whose files lie in the data root, and can be downloaded."""


def check_dataset_name(name: str) -> None:
    """Raise InvalidValueError unless `name` is sample, fashion-mnist, cifar10, folder:PATH or package.module:function.

    A function of one's own is not looked for: what is stored is read where it is not installed, too.
    """
    known = name in ("sample", *WITH_FILES) or (name.startswith("folder:") and name != "folder:")
    if not known and not is_function_name(name):
        rule = (
            "must be sample, fashion-mnist, cifar10, folder:PATH, like folder:/data/flowers, "
            "or package.module:function, which returns torch datasets"
        )
        raise InvalidValueError(f"data.name = {name!r}: {rule}")


def is_function_name(name: str) -> bool:
    """Return whether `name` is written like package.module:function."""
    module_name, separator, attribute = name.partition(":")
    written = bool(separator) and all(part.isidentifier() for part in [*module_name.split("."), attribute])
    return written and module_name != "folder"
