"""The names of datasets."""

from gross_ray.errors import InvalidValueError

WITH_FILES = ("fashion-mnist", "cifar10")
"""The datasets with files in the data root, which can be downloaded."""


def check_dataset_name(name: str) -> None:
    """Raise InvalidValueError unless `name` is sample, fashion-mnist, cifar10, folder:PATH or package.module:function.

    It does not import a function: a stored experiment can be read on machines without the user's code.
    """
    known = name in ("sample", *WITH_FILES) or (name.startswith("folder:") and name != "folder:")
    if not known and not is_function_name(name):
        rule = (
            "must be sample, fashion-mnist, cifar10, folder:PATH, like folder:/data/flowers, "
            "or package.module:function, which returns torch datasets"
        )
        raise InvalidValueError(f"data.name = {name!r}: {rule}")


def is_function_name(name: str) -> bool:
    """Return whether `name` has the form package.module:function."""
    module_name, _, attribute = name.partition(":")
    return module_name != "folder" and all(part.isidentifier() for part in [*module_name.split("."), attribute])
