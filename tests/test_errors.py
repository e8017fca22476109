import inspect
import pickle

import pytest

from gross_ray import errors
from gross_ray.errors import GrossRayError, InvalidValueError

OURS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
KINDS = [kind for kind in OURS if not issubclass(kind, Warning)]


def test_the_kinds_were_found() -> None:
    assert {GrossRayError, InvalidValueError, errors.DivergedError} < set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives_pickling(kind: type[GrossRayError]) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(kind("lr = -1: must be above 0"), protocol))
        assert type(loaded) is kind
        assert str(loaded) == "lr = -1: must be above 0"
        assert isinstance(loaded, GrossRayError)


def test_a_users_mistake_is_a_value_error_too() -> None:
    assert issubclass(InvalidValueError, ValueError)
    assert not any(issubclass(kind, ValueError) for kind in KINDS if kind is not InvalidValueError)
