"""A plain network, taken out of the framework: ONNX, a program of torch.export, or its weights."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.errors import GrossRayError, InvalidValueError, first_line
from gross_ray.nn.calls import output_of, zero_images
from gross_ray.nn.modes import evaluating
from gross_ray.supernet.configure import check_plain


def export_network(model: nn.Module, path: str | Path, input_shape: Sequence[int]) -> None:
    """Write `model` in the format that the ending of `path` names: .onnx, .pt2 or .safetensors.

    Raises InvalidValueError for any other ending, and as `export_onnx`, `export_program` and `export_weights` do.
    """
    check_format(path)
    FORMATS[Path(path).suffix](model, path, input_shape)


def check_format(path: str | Path) -> None:
    """Raise InvalidValueError where the ending of `path` names no format, or its folder is not there."""
    if Path(path).suffix not in FORMATS:
        raise InvalidValueError(f"{path}: the formats are {', '.join(FORMATS)}; choose one by the file's ending")
    _check_place(path)


def _check_place(path: str | Path) -> None:
    """Raise InvalidValueError where no file can be at `path`, or no card beside it."""
    if not Path(path).absolute().parent.is_dir():
        raise InvalidValueError(f"{path}: there is no folder {Path(path).parent}; make it, or name another file")
    for file in (Path(path), card_path(path)):
        if file.is_dir():
            raise InvalidValueError(f"{file}: is a folder; remove it, or name another file")


def card_path(path: str | Path) -> Path:
    """Return where the model card of an exported file is: beside it."""
    return Path(path).with_name(f"{Path(path).name}.json")


def export_onnx(model: nn.Module, path: str | Path, input_shape: Sequence[int]) -> None:
    """Write `model` as ONNX, for inputs (N, C, H, W) of any N; `input_shape` is (C, H, W).

    The file takes its place when it is whole. Needs the extra `gross-ray[onnx]`. Raises InvalidValueError for a
    supernet (extract a configuration first) and an `input_shape` that it cannot run, and GrossRayError where the extra
    is not installed or ONNX cannot hold the network for any N.
    """
    check_plain(model, "export_onnx")
    _check_place(path)
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise GrossRayError(f"export_onnx needs the package {package}; install gross-ray[onnx]")
    output_of(model, input_shape)
    with whole_or_not_at_all(path) as partial, evaluating(model), warnings.catch_warnings(), _told("ONNX"):
        warnings.simplefilter("ignore")  # the exporter speaks about its own internals
        torch.onnx.export(
            _program(model, input_shape),  # of the network itself it would fix a batch's size without a word
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

    It runs where torch is, without gross_ray. The file takes its place when it is whole. Raises InvalidValueError for
    a supernet and an `input_shape` that it cannot run, and GrossRayError where torch.export cannot follow the network.
    """
    check_plain(model, "export_program")
    _check_place(path)
    output_of(model, input_shape)
    with whole_or_not_at_all(path) as partial, evaluating(model), _told("torch.export"):
        torch.export.save(_program(model, input_shape), partial)


def _program(model: nn.Module, input_shape: Sequence[int]) -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        return torch.export.export(model, (zero_images(model, 2, input_shape),), dynamic_shapes=batch)


def export_weights(model: nn.Module, path: str | Path, _input_shape: Sequence[int] = ()) -> None:
    """Write the state dict of `model` as safetensors, which `export_program` and `extract` give the network for.

    The file takes its place when it is whole. Raises InvalidValueError for a supernet.
    """
    check_plain(model, "export_weights")
    _check_place(path)
    with whole_or_not_at_all(path) as partial:
        # Clones: a file takes no two names of one memory, as shared modules give them.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, partial)


@contextmanager
def _told(exporter: str) -> Iterator[None]:
    """Turn what an exporter raises, pages at times, into one line."""
    try:
        yield
    except OSError:  # the disk's
        raise
    except Exception as error:  # of many kinds, all about the network
        first: BaseException = error
        while first.__cause__ is not None:  # those above it tell of the exporter's own steps
            first = first.__cause__
        raise GrossRayError(
            f"{exporter} cannot follow this network: {first_line(first)}; write its weights instead "
            "(--to FILE.safetensors, export_weights)"
        ) from error


FORMATS: dict[str, Callable[[nn.Module, str | Path, Sequence[int]], None]] = {
    ".onnx": export_onnx,
    ".pt2": export_program,
    ".safetensors": export_weights,
}
"""What writes each format, by the file's ending."""
