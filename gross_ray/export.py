"""A plain network, taken out of the framework."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from gross_ray.errors import GrossRayError, InvalidValueError


def export_onnx(model: nn.Module, path: str | Path, input_shape: Sequence[int]) -> None:
    """Write `model` as ONNX, for inputs (N, C, H, W) of any N; `input_shape` is (C, H, W).

    The file takes its place when it is whole. Needs the extra `gross-ray[onnx]`. Raises InvalidValueError for a
    supernet (extract a configuration first) and GrossRayError where the extra is not installed.
    """
    from gross_ray.decomposition.series import SeriesConv2d

    if any(isinstance(module, SeriesConv2d) for module in model.modules()):
        raise InvalidValueError("export_onnx of a supernet: take one configuration out of it first, with extract")
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise GrossRayError(f"export_onnx needs the package {package}; install gross-ray[onnx]")
    example = torch.zeros(2, *input_shape, device=next(model.parameters()).device)
    final = Path(path)
    partial = final.with_name(f".{final.name}.partial")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter speaks about its own internals
            torch.onnx.export(
                model,
                (example,),
                str(partial),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
        os.replace(partial, final)
    finally:
        for module, training in modes.items():
            module.training = training
        partial.unlink(missing_ok=True)
