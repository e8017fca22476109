"""Make gross_ray/data/sample.parquet from Fashion-MNIST: 6,000 images to train, 2,000 to validate, 2,000 to test.

The images are the first ones of each split that `load_dataset` returns for fashion-mnist: balanced and interleaved.
"""

import argparse
import json
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from gross_ray.data.fashion_mnist import FASHION_PADDING, FASHION_SIZE
from gross_ray.data.identity import SPLITS
from gross_ray.data.images import load_dataset
from gross_ray.data.sample import SAMPLE_FILE, SAMPLE_SCHEMA
from gross_ray.experiment import DataOptions

METADATA = {
    "source": "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
    "licence": "MIT, Copyright (c) 2017 Zalando SE, https://tech.zalando.com; full text in NOTICE.md",
}


def main() -> None:
    """Read the full set and write the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root", type=Path, help="folder of Fashion-MNIST (default: ~/.cache/gross_ray, then Debian's)"
    )
    parser.add_argument("--download", action="store_true", help="download Fashion-MNIST if it is missing")
    parser.add_argument("--out", type=Path, default=SAMPLE_FILE, help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    table = make_sample(arguments.root, arguments.download)
    pq.write_table(table, arguments.out, compression="zstd", write_page_checksum=True)
    print(f"{arguments.out}: {table.num_rows} images, {arguments.out.stat().st_size / 1e6:.2f} MB")


def make_sample(root: Path | None, download: bool) -> pa.Table:
    """Return the sample as the table that `read_sample` reads."""
    options = DataOptions(name="fashion-mnist", limit_train=6000, limit_validation=2000, limit_test=2000)
    splits = load_dataset(options, root=root, download=download)
    columns: dict[str, list] = {"split": [], "label": [], "png": []}
    for split in SPLITS:
        members = getattr(splits, split)
        columns["split"] += [split] * len(members)
        columns["label"] += members.labels.tolist()
        columns["png"] += [png(image) for image in members.images]
    return pa.table(columns, SAMPLE_SCHEMA.with_metadata({**METADATA, "classes": json.dumps(splits.classes)}))


def png(image: Tensor) -> bytes:
    """Return the original 28x28 grey image of a padded (3, 32, 32) one, as PNG."""
    inside = slice(FASHION_PADDING, FASHION_PADDING + FASHION_SIZE)
    file = BytesIO()
    Image.fromarray(image[0, inside, inside].numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
