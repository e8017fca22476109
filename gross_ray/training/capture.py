"""A training step as one CUDA graph: the many small kernels of a small network become a single launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gross_ray.errors import InvalidValueError
from gross_ray.training.options import EngineOptions

WARM_UP = 2
"""Steps of one shape that are done as they are before it is captured: they make what later steps only change."""

Step = Callable[..., tuple[Tensor, ...]]
"""Takes tensors, changes what it trains in place, and returns tensors."""


def captures(engine: EngineOptions, device: torch.device) -> bool:
    """Return whether steps on `device` are captured: graphs are CUDA's, so on a CPU nothing is."""
    return engine.capture and device.type == "cuda"


class Graph:
    """One captured call, replayed on the same memory."""

    def __init__(
        self,
        call: Callable[[], tuple[Tensor, ...]],
        generators: Sequence[torch.Generator],
        stream: torch.cuda.Stream | None,
    ) -> None:
        """Capture `call` on `stream`, without running it; random numbers of `generators` go on with each replay.

        Raises InvalidValueError for a call that no graph can hold.
        """
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self._results = call()
        except RuntimeError as error:
            raise InvalidValueError(
                f"engine.capture = True: a step of this network cannot be captured ({str(error).splitlines()[0]}); "
                "it waits for a number on the device, say: set engine.capture=false"
            ) from error

    def replay(self) -> tuple[Tensor, ...]:
        """Run it; the results are overwritten by the next replay."""
        self._graph.replay()
        return self._results


class CapturedStep:
    """A step whose calls are replays of a graph, one for each shape of its arguments.

    The step must not look at any number on the device, and takes the same path through Python each time: what it reads
    that is no tensor (the learning rate, a configuration) is that of the capture, until `forget`.
    """

    def __init__(self, step: Step, generators: Sequence[torch.Generator] = ()) -> None:
        """Prepare to capture `step`, which draws from `generators`, and from torch's own, alone."""
        self._step, self._generators = step, generators
        # Autograd ties what it keeps of a parameter to the stream of its first use: the warm-up is on the capture's.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._done: Counter[tuple[torch.Size, ...]] = Counter()
        self._graphs: dict[tuple[torch.Size, ...], tuple[list[Tensor], Graph]] = {}

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Do one step; the results are the caller's own."""
        shapes = tuple(argument.shape for argument in arguments)
        if self._done[shapes] < WARM_UP:
            self._done[shapes] += 1
            return self._warm_up(*arguments)
        if shapes not in self._graphs:
            own = [argument.clone() for argument in arguments]
            self._graphs[shapes] = own, Graph(lambda: self._step(*own), self._generators, self._stream)
        own, graph = self._graphs[shapes]
        for place, argument in zip(own, arguments, strict=True):
            place.copy_(argument)
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
        """Drop the graphs, and their memory: something that they were captured with is another now."""
        self._graphs.clear()
