"""Run a training step as one CUDA graph: one launch instead of many small kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gross_ray.errors import InvalidValueError
from gross_ray.training.options import EngineOptions

WARM_UP = 2
"""Uncaptured steps of each shape before the capture: they create the state that later steps only change."""

Step = Callable[..., tuple[Tensor, ...]]
"""A step takes tensors, changes the trained parameters in place, and returns tensors."""


def captures(engine: EngineOptions, device: torch.device) -> bool:
    """Return whether steps on `device` are captured; a CPU has no CUDA graphs."""
    return engine.capture and device.type == "cuda"


class Graph:
    """A captured call, which replays on the same memory."""

    def __init__(
        self,
        call: Callable[[], tuple[Tensor, ...]],
        generators: Sequence[torch.Generator],
        stream: torch.cuda.Stream | None,
    ) -> None:
        """Capture `call` on `stream` without running it; each replay draws new numbers from `generators`.

        Raises InvalidValueError for a call that cannot be captured.
        """
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self._results = call()
        except RuntimeError as error:
            raise InvalidValueError(
                f"engine.capture = True: a step of this network cannot be captured ({str(error).splitlines()[0]}), "
                "for example because it reads a value from the device; set engine.capture=false"
            ) from error

    def replay(self) -> tuple[Tensor, ...]:
        """Run the call; the next replay overwrites the results."""
        self._graph.replay()
        return self._results


class CapturedStep:
    """A step that is captured once for each shape of its arguments, and replayed from then on.

    The step must not read values from the device and must take the same path through Python each time. What it reads
    besides tensors (the learning rate, a configuration) keeps its value of the capture until `forget`.
    """

    def __init__(self, step: Step, generators: Sequence[torch.Generator] = ()) -> None:
        """Prepare to capture `step`, which may draw only from `generators` and torch's global ones."""
        self._step, self._generators = step, generators
        # Autograd binds a parameter's AccumulateGrad to the stream of its first use: warm up on the capture's stream.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._done: Counter[tuple[torch.Size, ...]] = Counter()
        self._graphs: dict[tuple[torch.Size, ...], tuple[list[Tensor], Graph]] = {}

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Do one step; the results are copies."""
        shapes = tuple(argument.shape for argument in arguments)
        if self._done[shapes] < WARM_UP:
            self._done[shapes] += 1
            return self._warm_up(*arguments)
        if shapes not in self._graphs:
            own = [argument.clone() for argument in arguments]
            self._graphs[shapes] = own, Graph(lambda: self._step(*own), self._generators, self._stream)
        own, graph = self._graphs[shapes]
        for captured, argument in zip(own, arguments, strict=True):
            captured.copy_(argument)
        return tuple(result.clone() for result in graph.replay())

    def _warm_up(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        if self._stream is None:
            return self._step(*arguments)
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = self._step(*arguments)
        current.wait_stream(self._stream)
        return results

    def forget(self) -> None:
        """Delete the graphs and free their memory, because a value that they captured has changed."""
        self._graphs.clear()
