"""Export a plain network as ONNX, as a program of torch.export, or as its weights; compare a file with its network."""

from __future__ import annotations

import importlib.util
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.errors import GrossRayError, InvalidValueError, first_line
from gross_ray.nn.calls import output_of, zero_images
from gross_ray.nn.copies import copied
from gross_ray.nn.modes import evaluating
from gross_ray.own_network import unwrapped
from gross_ray.supernet.configure import check_plain

TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest logit, between a file and its network: float32 rounding."""


def export_network(model: nn.Module, path: str | Path, input_shape: Sequence[int]) -> None:
    """Write `model` in the format of the ending of `path`: .onnx, .pt2 or .safetensors.

    Raises InvalidValueError for any other ending, and like `export_onnx`, `export_program` and `export_weights`.
    """
    check_format(path)
    FORMATS[Path(path).suffix](model, path, input_shape)


def check_format(path: str | Path) -> None:
    """Raise InvalidValueError if the ending of `path` is no known format, or its folder does not exist."""
    if Path(path).suffix not in FORMATS:
        raise InvalidValueError(f"{path}: must end in {', '.join(FORMATS)}; choose a format by the file's ending")
    _check_writable(path)


def _check_writable(path: str | Path) -> None:
    """Raise InvalidValueError if `path`, or the card beside it, cannot be written."""
    if not Path(path).absolute().parent.is_dir():
        raise InvalidValueError(f"{path}: there is no folder {Path(path).parent}; create it, or name another file")
    for file in (Path(path), card_path(path)):
        if file.is_dir():
            raise InvalidValueError(f"{file}: is a folder, must be a file; remove it, or name another file")


def card_path(path: str | Path) -> Path:
    """Return the path of an exported file's model card, beside it."""
    return Path(path).with_name(f"{Path(path).name}.json")


def export_onnx(model: nn.Module, path: str | Path, input_shape: Sequence[int]) -> None:
    """Write `model` as ONNX, for inputs (N, C, H, W) of any N; `input_shape` is (C, H, W).

    The file appears at `path` only when it is complete. Raises InvalidValueError for a supernet (extract a
    configuration first) and for an `input_shape` that the network cannot run, and GrossRayError if ONNX cannot
    represent the network for any N.
    """
    model = unwrapped(model)
    check_plain(model, "export_onnx")
    _check_writable(path)
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise GrossRayError(f"export_onnx needs the package {package}: pip install {package}")
    output_of(model, input_shape)
    with whole_or_not_at_all(path) as partial, evaluating(model), warnings.catch_warnings(), _one_line_error("ONNX"):
        warnings.simplefilter("ignore")  # of the exporter, about its own internals
        torch.onnx.export(
            _program(model, input_shape),  # given the network itself, it would silently fix the batch size
            (),
            str(partial),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def export_program(model: nn.Module, path: str | Path, input_shape: Sequence[int]) -> None:
    """Write `model` as a program of torch.export, for inputs (N, C, H, W) of any N: `torch.export.load(path).module()`.

    The program needs torch, but not gross_ray. The file appears at `path` only when it is complete. Raises
    InvalidValueError for a supernet and for an `input_shape` that the network cannot run, and GrossRayError if
    torch.export cannot trace the network.
    """
    model = unwrapped(model)
    check_plain(model, "export_program")
    _check_writable(path)
    output_of(model, input_shape)
    with whole_or_not_at_all(path) as partial, evaluating(model), _one_line_error("torch.export"):
        torch.export.save(_program(model, input_shape), partial)


def _program(model: nn.Module, input_shape: Sequence[int]) -> torch.export.ExportedProgram:
    of_images = {0: torch.export.Dim("batch")}
    first = next(iter(inspect.signature(model.forward).parameters.values()))
    shapes = ((of_images,),) if first.kind is first.VAR_POSITIONAL else (of_images,)  # of a forward with *args
    with torch.no_grad():
        return torch.export.export(model, (zero_images(model, 2, input_shape),), dynamic_shapes=shapes)


def export_weights(model: nn.Module, path: str | Path, _input_shape: Sequence[int] = ()) -> None:
    """Write the state dict of `model` as safetensors.

    The file appears at `path` only when it is complete. Raises InvalidValueError for a supernet.
    """
    model = unwrapped(model)
    check_plain(model, "export_weights")
    _check_writable(path)
    with whole_or_not_at_all(path) as partial:
        # Clones: shared modules give one memory two names, which safetensors refuses.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, partial)


def file_facts(path: str | Path, network: nn.Module) -> dict[str, Any]:
    """Return what a user of a written file has to know: its batch and precision, ONNX's opset, or the modules."""
    precision = str(next(network.parameters(), torch.empty(0)).dtype).removeprefix("torch.")
    facts: dict[str, Any] = {"batch": "any", "precision": precision}
    if Path(path).suffix == ".onnx":
        import onnx

        opsets = onnx.load(str(path), load_external_data=False).opset_import
        return facts | {"opset": max(one.version for one in opsets if not one.domain)}
    return facts if Path(path).suffix == ".pt2" else facts | {"network": str(network).splitlines()}


@dataclass(frozen=True, kw_only=True)
class ExportCheck:
    """How far the outputs of an exported file differ from those of its network."""

    runtime: str
    """What ran the file, with its version."""
    images: int
    """Number of images compared."""
    largest_difference: float
    """Largest absolute difference of a logit."""
    largest_logit: float
    """Largest absolute logit of the network."""
    predictions_that_differ: int
    """Images for which the most likely class differs."""

    def __str__(self) -> str:
        return (
            f"checked in {self.runtime} on {self.images:,} images: logits up to {self.largest_logit:.3g} differ by "
            f"{self.largest_difference:.2g} at most, and {self.predictions_that_differ:,} predictions differ"
        )


def check_export(path: str | Path, network: nn.Module, batches: Iterable[Tensor]) -> ExportCheck:
    """Compare an exported file with its network on batches of inputs (N, C, H, W) on the CPU.

    ONNX runs in ONNX Runtime, the other formats in torch. Raises GrossRayError if ONNX Runtime is not installed or
    cannot run the file, and if logits differ by more than TOLERANCE of the largest one.
    """
    check_format(path)
    runtime, run = _RUNNERS[Path(path).suffix](Path(path), network)
    images = differing = 0
    difference = largest = 0.0
    with evaluating(network), torch.inference_mode():
        for batch in batches:
            inputs = batch.contiguous()  # as the network was traced: a program may depend on the memory format
            expected, found = network(inputs), run(inputs)
            images += len(inputs)
            differing += int((found.argmax(1) != expected.argmax(1)).sum())
            largest = max(largest, float(expected.abs().max()))
            worst = float((found - expected).abs().max())
            difference = worst if math.isnan(worst) else max(difference, worst)
            if math.isnan(difference):
                break
    check = ExportCheck(
        runtime=runtime,
        images=images,
        largest_difference=difference,
        largest_logit=largest,
        predictions_that_differ=differing,
    )
    if not difference <= TOLERANCE * largest:
        raise GrossRayError(f"the file does not compute what its network does: {check}; choose another format")
    return check


def _onnx_runner(path: Path, _: nn.Module) -> tuple[str, Callable[[Tensor], Tensor]]:
    try:
        import onnxruntime
    except ImportError:
        raise GrossRayError("checking an ONNX file needs the package onnxruntime: pip install onnxruntime") from None
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # of kinds that onnxruntime does not export
        raise GrossRayError(f"ONNX Runtime cannot run the file: {first_line(error)}") from error
    name = session.get_inputs()[0].name
    return (
        f"ONNX Runtime {onnxruntime.__version__}",
        lambda inputs: torch.from_numpy(session.run(None, {name: inputs.contiguous().numpy()})[0]),
    )


def _program_runner(path: Path, _: nn.Module) -> tuple[str, Callable[[Tensor], Tensor]]:
    return f"torch.export {torch.__version__}", torch.export.load(path).module()


def _weights_runner(path: Path, network: nn.Module) -> tuple[str, Callable[[Tensor], Tensor]]:
    loaded = copied(network)
    loaded.load_state_dict(load_file(path))
    return f"torch {torch.__version__}", loaded.eval()


@contextmanager
def _one_line_error(exporter: str) -> Iterator[None]:
    """Re-raise an exporter's exception, which may be pages long, as a GrossRayError of one line."""
    try:
        yield
    except OSError:  # of the disk
        raise
    except Exception as error:  # of many kinds, all about the network
        first: BaseException = error
        while first.__cause__ is not None:  # the others describe the exporter's own steps
            first = first.__cause__
        raise GrossRayError(
            f"{exporter} cannot trace this network: {first_line(first)}; write its weights instead "
            "(--to FILE.safetensors, export_weights)"
        ) from error


_RUNNERS: dict[str, Callable[[Path, nn.Module], tuple[str, Callable[[Tensor], Tensor]]]] = {
    ".onnx": _onnx_runner,
    ".pt2": _program_runner,
    ".safetensors": _weights_runner,
}
FORMATS: dict[str, Callable[[nn.Module, str | Path, Sequence[int]], None]] = {
    ".onnx": export_onnx,
    ".pt2": export_program,
    ".safetensors": export_weights,
}
"""The function that writes each format, by the file's ending."""
