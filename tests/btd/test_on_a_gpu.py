"""Decompositions on a GPU; a file of its own, because TensorLy need not be there."""

from collections.abc import Callable

import pytest
from torch import Tensor

from gross_ray.btd.options import BTDOptions
from gross_ray.btd.solver import block_term_decomposition


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_gpu_reaches_the_same_error(trained_like_weight: Callable[..., Tensor], precision: str) -> None:
    weight = trained_like_weight(16, 16, 3, 3)
    on_gpu = block_term_decomposition(weight.cuda(), 4, options=BTDOptions(precision=precision))
    assert on_gpu.core.device.type == "cuda"
    distance = float((weight - on_gpu.reconstruct().cpu()).norm() / weight.norm())
    assert on_gpu.relative_error == pytest.approx(distance, abs=1e-9)
    assert on_gpu.relative_error == pytest.approx(block_term_decomposition(weight, 4).relative_error, abs=2e-3)
