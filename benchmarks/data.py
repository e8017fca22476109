"""More images than memory: files of images against memory, and against decoding in every epoch.

    python benchmarks/data.py [--gib 4] [--threads 2] [--folder FOLDER]

It makes a Parquet file of 224-pixel JPEGs in a temporary folder, which become `--gib` GiB of pixels, and prints

1. memory: by how much the process's anonymous memory (RssAnon) grows at most while the images are read into files, and
   while an epoch of batches is read from them; baseline: the pixels themselves;
2. training: images per second of four-conv on 32-pixel crops from files, without and with `--augment crop`; baseline:
   the same training with the images in memory, alternating;
3. reading, with no training: images per second from the files in a random order, from the page cache and from the disk;
   baseline: a DataLoader whose processes, one for each core, decode the same JPEGs with Pillow.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gross_ray.data.image_files import ImageFiles
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.models import build_model
from gross_ray.training.options import Schedule
from gross_ray.training.stages import train_network

SIZE, SMALL = 224, 32
"""Height and width of the JPEGs, and of the crops of which four-conv is trained."""
BATCH = 64
DIFFERENT = 500
"""How many different JPEGs there are; they are repeated."""
LOADED = 4000
"""How many images the baseline decodes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = round(options.gib * 2**30 / (3 * SIZE * SIZE))
    with TemporaryDirectory(dir=options.folder) as folder:
        jpegs = _write_jpegs(Path(folder, "images.parquet"), count)
        print(f"{count:,} JPEGs of {SIZE} pixels, {options.gib:g} GiB of pixels, {options.threads} threads")
        data = DataOptions(name=f"parquet:{folder}/images.parquet", image_size=str(SIZE), resize=SIZE, memory=1)
        splits = _memory(data, folder)
        _reading(splits.train, jpegs, options.threads)
        del splits
        _training(data, folder)


def _write_jpegs(path: Path, count: int) -> list[bytes]:
    """Write a Parquet file of `count` JPEGs, and return those that are different."""
    noise, jpegs = np.random.default_rng(0), []
    for _ in range(DIFFERENT):
        coarse = Image.fromarray(noise.integers(0, 256, (28, 28, 3), dtype=np.uint8)).resize((SIZE, SIZE))
        pixels = np.asarray(coarse) + noise.normal(0, 6, (SIZE, SIZE, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        jpegs.append(file.getvalue())
    images = [{"bytes": jpegs[number % DIFFERENT], "path": None} for number in range(count)]
    table = pa.table({"image": images, "label": [number % 10 for number in range(count)]})
    pq.write_table(table, path, row_group_size=100)
    return jpegs


def _memory(data: DataOptions, folder: str) -> Splits:
    pixels = {}
    with _growth(pixels, "read into files"):
        started = time.perf_counter()
        splits = load_dataset(data, root=folder)
        seconds = time.perf_counter() - started
    with _growth(pixels, "an epoch of batches"):
        for images, _ in splits.train.stream_to("cpu").batches(BATCH, torch.randperm(len(splits.train))):
            images.float()
    size = sum(part.stored.nbytes for part in (splits.train, splits.validation, splits.test))
    number = size / (3 * SIZE * SIZE)
    print(f"read into files, with their hashes: {seconds:.0f} s, {number / seconds:.0f} images/s")
    for what, grown in pixels.items():
        print(f"RssAnon grows by {grown / 2**30:.3f} GiB: {what}; ratio to the pixels: {grown / size:.3f}")
    return splits


@contextmanager
def _growth(found: dict[str, int], what: str) -> Iterator[None]:
    """Store under `what` by how many bytes the anonymous memory of this process grows at most while the block runs."""
    before, most, over = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], _anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        found[what] = most[0]


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class _Jpegs(Dataset[Tensor]):
    def __init__(self, jpegs: list[bytes]) -> None:
        self._jpegs = jpegs

    def __len__(self) -> int:
        return LOADED

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(io.BytesIO(self._jpegs[index % DIFFERENT])) as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _reading(images: ImageSet, jpegs: list[bytes], threads: int) -> None:
    streamed = images.stream_to("cpu")

    def from_files() -> int:
        return sum(len(batch) for batch, _ in streamed.batches(BATCH, torch.randperm(len(images))))

    def from_disk() -> int:
        _drop_pages(images)
        return from_files()

    def decoded() -> int:
        return sum(len(batch) for batch in DataLoader(_Jpegs(jpegs), BATCH, num_workers=threads))

    rates = _alternating({"files": from_files, "files, from the disk": from_disk, "DataLoader": decoded})
    _print_rates("reading alone", rates, "DataLoader")


def _drop_pages(images: ImageSet) -> None:
    assert images.mapped is not None
    file = ImageFiles(images.mapped.root, images.mapped.key).folder / f"{images.mapped.split}.u8"
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _training(data: DataOptions, folder: str) -> None:
    small = DataOptions(name=data.name, image_size=str(SMALL), memory=1)
    in_memory = DataOptions(name=data.name, image_size=str(SMALL), memory=2**40)
    files, resident = load_dataset(small, root=folder), load_dataset(in_memory, root=folder)
    files = Splits(files.name, files.train.stream_to("cpu"), files.validation, files.test, files.classes)
    for augment in ("none", "crop"):
        schedule = Schedule(epochs=1, lr=0.01, batch_size=128, augment=augment)

        def trained(splits: Splits, schedule: Schedule = schedule) -> int:
            network = build_model("four-conv", num_classes=10, generator=torch.Generator().manual_seed(0))
            train_network(network, splits, schedule, seed=0)
            return len(splits.train)

        rates = _alternating({"files": lambda: trained(files), "memory": lambda: trained(resident)})
        _print_rates(f"training four-conv, augment={augment}", rates, "memory")


def _alternating(works: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Return the median number of images a second of each work, done three times, alternating."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(3):
        for name, work in works.items():
            started = time.perf_counter()
            number = work()
            rates[name].append(number / (time.perf_counter() - started))
    return {name: statistics.median(each) for name, each in rates.items()}


def _print_rates(what: str, rates: dict[str, float], baseline: str) -> None:
    for name, rate in rates.items():
        ratio = "" if name == baseline else f", {rate / rates[baseline]:.2f} times the {baseline}"
        print(f"{what}: {name} {rate:,.0f} images/s{ratio}")


if __name__ == "__main__":
    main()
