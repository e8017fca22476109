from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gross_ray.data.image_set import ImageSet
from gross_ray.data.images import load_dataset
from gross_ray.data.names import WITH_FILES, check_dataset_name
from gross_ray.data.splitting import balanced_split
from gross_ray.errors import InvalidValueError
from gross_ray.experiment import DataOptions

# --- ImageSet, names


def test_image_set() -> None:
    images = ImageSet(torch.arange(5 * 12, dtype=torch.uint8).reshape(5, 3, 2, 2), torch.arange(5))
    assert len(images) == 5
    assert len(images.first(0)) == 5
    assert torch.equal(images.first(2).images, images.images[:2])
    assert torch.equal(images.first(2).labels, images.labels[:2])
    moved = images.to("meta")
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    for n in (6, -1):
        with pytest.raises(InvalidValueError, match=f"n = {n}: .* 5"):
            images.first(n)
    with pytest.raises(FrozenInstanceError):
        images.labels = torch.zeros(5)  # type: ignore[misc]


@pytest.mark.parametrize(
    "name",
    ["sample", *WITH_FILES, "folder:x", "folder:/a b/c", "parquet:x.parquet", "hf:me/flowers@small"],
)
def test_known_names(name: str) -> None:
    check_dataset_name(name)


@pytest.mark.parametrize("name", ["mnist", "Sample", "folder", "folder:", "parquet:", "hf:", ""])
def test_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(
        InvalidValueError, match="sample, fashion-mnist, cifar10, cifar100, svhn, stl10, folder:PATH, like"
    ) as caught:
        check_dataset_name(name)
    assert repr(name) in str(caught.value)


def test_load_dataset_checks_the_name() -> None:
    with pytest.raises(InvalidValueError, match="'mnist'"):
        load_dataset(DataOptions(name="mnist"))


# --- the split


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    proportions=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**32),
)
def test_balanced_split_shares_every_image_out_in_proportion(
    counts: list[int], proportions: tuple[int, ...], seed: int
) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    parts = balanced_split(labels, proportions, torch.Generator().manual_seed(seed))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    for part, proportion in zip(parts, proportions, strict=True):
        share = proportion / sum(proportions)
        assert abs(len(part) - share * len(labels)) <= 1
        for label, count in enumerate(counts):
            assert abs(int((labels[part] == label).sum()) - share * count) < 3
        # In every prefix a class falls behind another only once it has no images left.
        seen = torch.zeros(len(counts), dtype=torch.int64)
        total = torch.bincount(labels[part], minlength=len(counts))
        for label in labels[part].tolist():
            seen[label] += 1
            assert (seen >= torch.minimum(total, seen.max() - 1)).all()


def test_balanced_split_follows_its_generator() -> None:
    labels = torch.arange(200) % 4
    first, again, other = (balanced_split(labels, (1, 1), torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first.sort().values, other.sort().values)
