"""Copies of files of images from the driver's machine to that of a worker, through Ray's object store."""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gross_ray.data.image_files import ImageFiles
from gross_ray.errors import DatasetError, one_line

CHUNK = 2**26
"""Bytes that are copied at a time."""
AHEAD = 3
"""How many chunks are on their way at a time."""


class Fetcher:
    """Copies files from one node of the cluster (a `pipelines.packing.Fetch`)."""

    def __init__(self, node: str) -> None:
        """`node` is Ray's id of the node that has the files."""
        self._node = node

    def __call__(self, files: ImageFiles) -> None:
        """Copy the folder of `files` to this machine; raises DatasetError if it cannot be copied."""
        there = ray.remote(num_cpus=0)(_sizes).options(scheduling_strategy=self._affinity())
        try:
            sizes = ray.get(there.remote(files))
            shutil.rmtree(files.folder, ignore_errors=True)
            files.folder.mkdir(parents=True)
            for name, size in sorted(sizes.items(), key=lambda file: file[0].endswith(".json")):
                self._copy(files, name, size)
        except (ray.exceptions.RayError, OSError) as error:
            cause = getattr(error, "cause", None) or error  # without the traceback of the other machine
            problem = f"the images cannot be copied from the driver's machine ({one_line(cause)})"
            raise DatasetError(f"{files.folder}: {problem}; look at that machine and the disk here") from error

    def _copy(self, files: ImageFiles, name: str, size: int) -> None:
        chunk = ray.remote(num_cpus=0)(_chunk).options(scheduling_strategy=self._affinity())
        under_way = deque[ray.ObjectRef]()
        with open(files.folder / name, "wb") as file:
            for start in range(0, size, CHUNK):
                under_way.append(chunk.remote(files, name, start, CHUNK))
                if len(under_way) == AHEAD:
                    file.write(ray.get(under_way.popleft()).data)
            while under_way:
                file.write(ray.get(under_way.popleft()).data)

    def _affinity(self) -> NodeAffinitySchedulingStrategy:
        return NodeAffinitySchedulingStrategy(self._node, soft=False)


def _sizes(files: ImageFiles) -> dict[str, int]:
    """Return the name and size of each file."""
    return {path.name: path.stat().st_size for path in Path(files.folder).iterdir()}


def _chunk(files: ImageFiles, name: str, start: int, size: int) -> np.ndarray:
    """Return up to `size` bytes of a file from `start` on."""
    with open(files.folder / name, "rb") as file:
        file.seek(start)
        return np.frombuffer(file.read(size), np.uint8)
