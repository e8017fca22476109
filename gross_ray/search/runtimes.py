"""Runtimes: what runs a network where it is deployed, and so where its latency is measured."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gross_ray.errors import GrossRayError, InvalidValueError, first_line
from gross_ray.nn.calls import network_errors_as_invalid_value
from gross_ray.search.options import RUNTIMES
from gross_ray.search.timing import Clock, cpu_clock, cuda_clock
from gross_ray.search.timing import threads as torch_threads
from gross_ray.search.variants import Forms, Variants

Run = Callable[[], Tensor]
"""Runs a network on its images, and returns its logits (N, classes)."""


class Runtime(Protocol):
    """Runs networks on one device with a fixed number of threads."""

    name: str
    """As it is written in options and tables."""
    version: str
    """Version of its package."""

    def load(self, network: nn.Module, images: Tensor) -> Run:
        """Return a call that runs `network` in evaluation mode on `images` (N, C, H, W), which are on the CPU.

        Raises GrossRayError if the runtime cannot take the network.
        """

    def read(self, model: Path | bytes, images: Tensor) -> Run:
        """Return a call that runs an ONNX file on `images`, as `load` does.

        Raises InvalidValueError for a runtime that does not read ONNX, or cannot take this one.
        """

    def variants(self, variants: Variants, images: Tensor) -> Callable[[Forms], Run]:
        """Return a function that loads any of the variants, as `load` would."""

    def clock(self) -> Clock:
        """Return the clock that fits the device and the threads."""

    def settings(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which networks are loaded and run: settings of the whole process."""


def runtime_of(name: str, device: torch.device, threads: int) -> Runtime:
    """Return a runtime by its name in RUNTIMES.

    Raises InvalidValueError for another name, more threads than this machine has, a package that is not installed, and
    a device that it does not run on.
    """
    if name not in RUNTIMES:
        raise InvalidValueError(f"runtime = {name!r}: must be one of {', '.join(RUNTIMES)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads > cores:
        raise InvalidValueError(f"threads = {threads}: this machine has {cores}; ask for {cores} or fewer")
    return _RUNTIMES[name](device, threads)


def is_installed(name: str) -> bool:
    """Return whether the package of a runtime is installed."""
    return importlib.util.find_spec("torch" if name == "compiled" else name) is not None


def _imported(package: str, runtime: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise InvalidValueError(
            f"runtime {runtime} is not installed: pip install {package}, or choose another runtime: "
            f"{', '.join(name for name in RUNTIMES if name != runtime)}"
        ) from None


class Torch:
    """torch's eager mode."""

    name = "torch"

    def __init__(self, device: torch.device, threads: int) -> None:
        """Run on `device`, cpu or cuda; `threads` are the CPU's."""
        self.version = torch.__version__
        self._device, self._threads = device, threads

    def load(self, network: nn.Module, images: Tensor) -> Run:
        """Return a call of the network itself."""
        moved, batch = network.eval().to(self._device), images.to(self._device)
        return self._run(moved, batch)

    def read(self, model: Path | bytes, images: Tensor) -> Run:
        """Raise InvalidValueError: torch does not read ONNX."""
        raise InvalidValueError(f"runtime {self.name} does not read ONNX; choose onnxruntime or openvino")

    def variants(self, variants: Variants, images: Tensor) -> Callable[[Forms], Run]:
        """Return a function that exchanges modules."""
        return lambda forms: self.load(variants.network(forms), images)

    def clock(self) -> Clock:
        """Return CPU time for one thread, wall time for several, and CUDA's events."""
        return cuda_clock(self._device) if self._device.type == "cuda" else cpu_clock(self._threads)

    def settings(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which torch uses this number of threads."""
        return torch_threads(self._threads)

    @staticmethod
    def _run(network: Callable[[Tensor], Tensor], batch: Tensor) -> Run:
        def run() -> Tensor:
            with torch.inference_mode():
                return network(batch)

        with network_errors_as_invalid_value(batch.shape[1:]):
            run()
        return run


class Compiled(Torch):
    """torch.compile by Inductor, for images of fixed shape: seconds to minutes for each network."""

    name = "compiled"

    def load(self, network: nn.Module, images: Tensor) -> Run:
        """Trace the network, then compile it: torch.compile limits recompilations for each class, and all have one."""
        moved, batch = network.eval().to(self._device), images.to(self._device)
        try:
            with torch.no_grad():
                traced = torch.export.export(moved, (batch,)).module()
            return self._run(torch.compile(traced, fullgraph=True, dynamic=False), batch)
        except InvalidValueError as error:
            cause = error.__cause__ or error
            raise InvalidValueError(
                f"torch.compile cannot take the network: {first_line(cause)}; it needs a C++ compiler; "
                "choose another runtime"
            ) from error
        except Exception as error:  # of many kinds, all about the network
            raise InvalidValueError(f"torch.compile cannot trace the network: {first_line(error)}") from error


class _OfOnnx:
    """A runtime that reads ONNX."""

    name: str
    version: str

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device, self._threads = device, threads

    def load(self, network: nn.Module, images: Tensor) -> Run:
        """Read the network as `export_onnx` writes it."""
        from gross_ray.search.onnx_variants import exported

        with self._takes_the_network():
            model = exported(network.cpu(), tuple(images.shape[1:]))
        return self.read(model.SerializeToString(), images)

    def variants(self, variants: Variants, images: Tensor) -> Callable[[Forms], Run]:
        """Return a function that exchanges nodes of one export where it can, and otherwise exports each variant."""
        from gross_ray.search.onnx_variants import OnnxVariants

        with self._takes_the_network():
            models = OnnxVariants(variants)
        if not models.complete:
            warnings.warn(
                "each network is exported separately, which takes seconds: a layer pads with other values than zeros, "
                "or layers share a weight",
                stacklevel=2,
            )
            return lambda forms: self.load(variants.network(forms), images)
        return lambda forms: self.read(models.model(forms), images)

    def read(self, model: Path | bytes, images: Tensor) -> Run:
        """Return a call that runs an ONNX file on `images`; raises InvalidValueError if the runtime cannot take it."""
        raise NotImplementedError

    def clock(self) -> Clock:
        """Return CPU time for one thread, wall time for several or on a GPU (each call copies and waits)."""
        return cpu_clock(self._threads if self._device.type == "cpu" else 2)

    def settings(self) -> contextlib.AbstractContextManager[object]:
        """Return a context of no effect: the number of threads belongs to each session."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _takes_the_network(self) -> Iterator[None]:
        try:
            yield
        except InvalidValueError:
            raise
        except GrossRayError as error:
            raise InvalidValueError(
                f"{RUNTIMES[self.name]} reads ONNX: {first_line(error.__cause__ or error)}; choose --runtime torch"
            ) from error

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of kinds that the runtimes do not export
            raise InvalidValueError(
                f"{RUNTIMES[self.name]} cannot run the network: {first_line(error)}; choose another runtime or batch"
            ) from error


class OnnxRuntime(_OfOnnx):
    """ONNX Runtime: its CPU provider, or CUDA's."""

    name = "onnxruntime"

    def __init__(self, device: torch.device, threads: int) -> None:
        """Raise InvalidValueError if the package, or its part for the device, is not installed."""
        super().__init__(device, threads)
        self._package = _imported("onnxruntime", self.name)
        self.version = self._package.__version__
        self._provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
        if self._provider not in self._package.get_available_providers():
            raise InvalidValueError(
                f"device = {str(device)!r}: this ONNX Runtime has no {self._provider}; "
                "choose --device cpu or --runtime torch, or pip install onnxruntime-gpu"
            )

    def read(self, model: Path | bytes, images: Tensor) -> Run:
        """Return a call of a session; its input is an array, as a user would pass it."""
        options = self._package.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # else idle threads slow down the next call
        where = (self._provider, {"device_id": self._device.index or 0} if self._device.type == "cuda" else {})
        with self._one_line():
            session = self._package.InferenceSession(model, options, providers=[where])
            session.disable_fallback()
            feed = {session.get_inputs()[0].name: images.contiguous().numpy()}
            session.run(None, feed)
        if session.get_providers()[0] != self._provider:
            raise InvalidValueError(
                f"{RUNTIMES[self.name]} took {session.get_providers()[0]}, not {self._provider}: its libraries are "
                "missing; choose --device cpu or --runtime torch"
            )
        return lambda: torch.from_numpy(session.run(None, feed)[0])


class OpenVino(_OfOnnx):
    """OpenVINO on the CPU, for images of fixed shape and float32, as ONNX Runtime computes."""

    name = "openvino"

    def __init__(self, device: torch.device, threads: int) -> None:
        """Raise InvalidValueError if the package is not installed, and for a device other than cpu."""
        super().__init__(device, threads)
        if device.type != "cpu":
            raise InvalidValueError(f"device = {str(device)!r}: runtime openvino runs on cpu; choose --device cpu")
        self._package = _imported("openvino", self.name)
        self.version = self._package.__version__.partition("-")[0]
        self._core = self._package.Core()

    def read(self, model: Path | bytes, images: Tensor) -> Run:
        """Return a call of a compiled model with its batch fixed, as OpenVINO advises."""
        settings = {
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        with self._one_line():
            network = self._core.read_model(model)
            network.reshape(list(images.shape))
            request = self._core.compile_model(network, "CPU", settings).create_infer_request()
            batch = images.contiguous().numpy()  # the tensor shares its memory
            request.set_input_tensor(self._package.Tensor(batch, shared_memory=True))
            request.infer()
        output = request.get_output_tensor()

        def run() -> Tensor:
            request.infer()
            return torch.from_numpy(output.data)

        return run


READ_ONNX = ("onnxruntime", "openvino")
"""The runtimes that read ONNX files."""
_RUNTIMES: dict[str, Callable[[torch.device, int], Any]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "torch": Torch,
    "compiled": Compiled,
}
