"""The command `gross inspect`: preview the decomposition of a network before any computation."""

from __future__ import annotations

from collections.abc import Sequence

import click

from gross_ray.models import model_of
from gross_ray.report.inspection import inspection
from gross_ray.report.terminal import as_text
from gross_ray.supernet.layers import choice_of
from gross_ray.supernet.options import parse_layer_group_sizes


def inspect(
    model: str,
    *,
    layers: Sequence[str],
    group_sizes: Sequence[int],
    layer_group_sizes: Sequence[str],
    keep_dense: bool,
    image_size: int,
    num_classes: int,
) -> None:
    """Print the layers of a network, the size of their space, and its cheapest and largest configuration."""
    network = model_of(model, num_classes=num_classes, image_size=image_size).eval()
    shape = (3, image_size, image_size)
    by_layer = parse_layer_group_sizes(layer_group_sizes)
    choice = choice_of(network, layers, group_sizes, by_layer, keep_dense=keep_dense, input_shape=shape)
    click.echo("\n\n".join(map(as_text, inspection(network, choice, shape))))
