"""The names of datasets."""

from gross_ray.errors import InvalidValueError

WITH_FILES = ("fashion-mnist", "cifar10", "cifar100", "svhn", "stl10")
"""The datasets with files in the data root, which can be downloaded."""
_KINDS = ("folder", "parquet", "hf")


def check_dataset_name(name: str) -> None:
    """Raise InvalidValueError unless `name` is that of a known dataset, a place, or package.module:function.

    It does not import a function: a stored experiment can be read on machines without the user's code.
    """
    if name not in ("sample", *WITH_FILES) and not is_place(name) and not is_function_name(name):
        rule = (
            f"must be sample, {', '.join(WITH_FILES)}, folder:PATH, like folder:/data/flowers, parquet:PATH, hf:NAME, "
            "or package.module:function, which returns torch datasets"
        )
        raise InvalidValueError(f"data.name = {name!r}: {rule}")


def is_place(name: str) -> bool:
    """Return whether `name` says where images are: folder:PATH, parquet:PATH or hf:NAME."""
    kind, _, place = name.partition(":")
    return kind in _KINDS and place != ""


def is_function_name(name: str) -> bool:
    """Return whether `name` has the form package.module:function."""
    module_name, _, attribute = name.partition(":")
    return module_name not in _KINDS and all(part.isidentifier() for part in [*module_name.split("."), attribute])
