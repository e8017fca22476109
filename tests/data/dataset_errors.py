"""An assertion on errors of datasets, for several files of tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gross_ray.errors import DatasetError


def dataset_error(act: Callable[[], object], *parts: object) -> None:
    """Assert that `act` raises a DatasetError of one line with all `parts` in it."""
    with pytest.raises(DatasetError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
