"""The command `gross inspect`: preview the decomposition of a network before any computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import torch

from gross_ray.models import model_of
from gross_ray.nn.batch_norm import as_if_trained
from gross_ray.nn.calls import input_channels
from gross_ray.report.inspection import inspection
from gross_ray.report.latency import dominated_sentences, extremes_table
from gross_ray.report.terminal import as_text
from gross_ray.search.latency import measure_latency
from gross_ray.search.options import LatencyOptions
from gross_ray.supernet.build import empty_supernet, made_up
from gross_ray.supernet.layers import choice_of
from gross_ray.supernet.options import parse_layer_group_sizes
from pipelines.commands.terminal import measuring_bar


def inspect(
    model: str,
    *,
    layers: Sequence[str],
    group_sizes: Sequence[int],
    layer_group_sizes: Sequence[str],
    keep_dense: bool,
    image_size: int,
    num_classes: int,
    timed: dict[str, Any] | None,
) -> None:
    """Print the layers of a network, the size of their space, and its cheapest and largest configuration.

    `timed` are fields of LatencyOptions: with them, also print the fastest, the slowest and the full network's time,
    with made-up weights in the bottlenecks.
    """
    network = model_of(model, num_classes=num_classes, image_size=image_size).eval()
    shape = (input_channels(network, image_size) or 3, image_size, image_size)
    by_layer = parse_layer_group_sizes(layer_group_sizes)
    choice = choice_of(network, layers, group_sizes, by_layer, keep_dense=keep_dense, input_shape=shape)
    network = choice.network
    click.echo("\n\n".join(map(as_text, inspection(network, choice, shape))))
    if timed is None:
        return
    generator = torch.Generator().manual_seed(0)
    supernet = made_up(empty_supernet(as_if_trained(network, generator), choice.group_sizes), generator)
    options = LatencyOptions(**timed)
    with measuring_bar(options.runtime, "cpu") as advance:
        measured = measure_latency(supernet, shape, options, generator=generator, on_part=advance)
    found = [as_text(extremes_table(measured, choice.group_sizes)), *dominated_sentences(measured)]
    click.echo("\n" + "\n\n".join(found))
