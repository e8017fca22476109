"""What a user can do about a convolution that is left alone, by the reason for it."""

from __future__ import annotations

_REMEDIES = (
    ("known only with an input", "pass input_shape=(C, H, W), so that its forward can be run once"),
    ("the same weight", "give each convolution a weight of its own"),
    ("overrides the forward", "use nn.Conv2d, or compute the weight by torch.nn.utils.parametrize"),
    ("torch.nn.utils.prune", "make the pruning permanent first: torch.nn.utils.prune.remove(module, 'weight')"),
    ("torch.nn.utils.weight_norm", "use torch.nn.utils.parametrizations.weight_norm"),
    ("torch.nn.utils.spectral_norm", "use torch.nn.utils.parametrizations.spectral_norm"),
    ("hooks", "remove the hooks, and register them again on the compressed network"),
    ("without calling", "call the module itself"),
    ("calls F.conv2d itself", "make its convolutions modules of nn.Conv2d"),
    ("never reaches it", "decompose a network whose forward pass calls its convolutions"),
    ("depthwise", "choose a network that has convolutions with groups=1"),
    ("grouped", "choose a network that has convolutions with groups=1"),
    ("1x1", "name them to decompose them (decomposition.layers, --layers)"),
    ("the network's first convolution", "name it to decompose it (decomposition.layers, --layers)"),
)
"""Remedies by a part of the reason's text; the first that fits counts."""


def remedy_for(reason: str) -> str:
    """Return what a user can do so that a convolution that was left alone for `reason` is decomposed."""
    return next(
        (remedy for part, remedy in _REMEDIES if part in reason),
        "choose a network that has plain nn.Conv2d layers",  # a transposed one, or of another number of dimensions
    )
