"""Random numbers: one generator for each unit of work, derived from the experiment's seed and the unit's name."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *parts: object) -> int:
    """Return a seed in [0, 2^63) that depends on `seed` and every part (without slashes), equal in every process."""
    text = "/".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derived_generator(seed: int, *parts: object) -> torch.Generator:
    """Return a CPU generator with the seed of `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))
