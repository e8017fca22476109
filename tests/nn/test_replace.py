import torch
from torch import nn

from gross_ray.nn.replace import replace_modules


class Listed(nn.Module):
    """Uses its layers from plain containers too, one of them twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.again = nn.Sequential(self.a, nn.ReLU())
        self.plain = [self.a, {"b": (self.b,)}]

    def forward(self, images):
        return self.plain[1]["b"][0](self.again(self.plain[0](self.a(images))))


def test_a_module_is_replaced_everywhere_and_only_in_the_copy():
    network = Listed()
    network.a.eval()
    before, old = list(network.plain), network.a
    copied = replace_modules(network, {"a": nn.Conv2d(3, 3, 3, padding=1)})
    assert copied.a is copied.again[0] is copied.plain[0]
    assert copied.a.kernel_size == (3, 3) and not copied.a.training
    assert copied.plain[1]["b"][0] is copied.b and copied.b is not network.b
    assert network.plain == before and network.a is network.again[0] is old
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = copied.b(torch.relu(copied.a(copied.a(copied.a(images)))))
    torch.testing.assert_close(copied(images), expected)


def test_the_network_itself_is_replaced():
    replacement = nn.Identity()
    assert replace_modules(nn.Linear(2, 2), {"": replacement}) is replacement


def test_weights_are_shared_on_request():
    network = Listed()
    own = replace_modules(network, {"b": nn.Identity()})
    shared = replace_modules(network, {"b": nn.Identity()}, share_weights=True)
    assert shared.a.weight is network.a.weight
    assert own.a.weight is not network.a.weight and torch.equal(own.a.weight, network.a.weight)
