import pytest
import torch
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.nn.calls import network_calls


class Several(nn.Module):
    """A decomposed layer whose class does not belong to the library."""

    def __init__(self):
        super().__init__()
        self.group_sizes, self.group_size = (1, 2), 2

    def bottleneck(self, group_size):
        return group_size

    def forward(self, images):
        return images[:, :1]


def test_calls_are_those_of_convolutions_linears_and_decomposed_layers_in_order():
    conv, several, linear, last = nn.Conv2d(3, 2, 3), Several(), nn.Linear(4, 5), nn.Linear(5, 7)
    network = nn.Sequential(conv, nn.ReLU(), several, nn.Flatten(2), linear, last)
    calls = network_calls(network, (3, 4, 4))
    assert [call.module for call in calls] == [conv, several, linear, last]
    assert [call.input_size for call in calls] == [(1, 3, 4, 4), (1, 2, 2, 2), (1, 1, 4), (1, 1, 5)]
    assert [call.output_size for call in calls] == [(1, 2, 2, 2), (1, 1, 2, 2), (1, 1, 5), (1, 1, 7)]


def test_an_image_that_a_network_cannot_run_is_refused():
    with pytest.raises(InvalidValueError, match="the network cannot run an image of 1x4x4"):
        network_calls(nn.Conv2d(3, 2, 3), (1, 4, 4))


def test_no_hook_remains():
    conv = nn.Conv2d(3, 2, 3)
    network_calls(conv, (3, 4, 4))
    assert not conv._forward_hooks and torch.is_grad_enabled()
