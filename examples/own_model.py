"""Compress your own network on your own images within a latency budget; export ONNX: python examples/own_model.py."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gross_ray as gr
from gross_ray.training.stages import train_network


def pictures() -> tuple[TensorDataset, TensorDataset]:
    """Return training and test images: stripes at one of eight angles, with noise."""
    drawn, labels = torch.Generator().manual_seed(0), torch.arange(3000) % 8
    angle, phase = labels[:, None, None] * torch.pi / 8, 6.3 * torch.rand(3000, 1, 1, generator=drawn)
    stripes = torch.sin(0.8 * torch.arange(32) * angle.cos() + 0.8 * torch.arange(32)[:, None] * angle.sin() + phase)
    images = (128 + 20 * stripes + 60 * torch.randn(3000, 32, 32, generator=drawn)).clamp(0, 255).byte()
    return TensorDataset(images[:2500], labels[:2500]), TensorDataset(images[2500:], labels[2500:])


class Residual(nn.Sequential):
    """Layers with a skip connection around them."""

    def forward(self, x: Tensor) -> Tensor:
        """Add the input to the output of the layers, and apply a ReLU."""
        return torch.relu(x + super().forward(x))


def small_resnet() -> nn.Module:
    """Return two residual blocks of 32 channels."""
    convs = (nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(4))
    blocks = (Residual(next(convs), nn.BatchNorm2d(32), nn.ReLU(), next(convs), nn.BatchNorm2d(32)) for _ in range(2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))
    return nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), *blocks, *head)


if __name__ == "__main__":
    torch.manual_seed(0)
    train, test = pictures()
    network = small_resnet()
    data = gr.load_dataset(gr.DataOptions(name="own_model:pictures"))
    train_network(network, data, gr.Schedule(epochs=3, lr=0.05, batch_size=64, augment="none"), seed=0)
    found = gr.compress(network, train, test, budget="latency_ms=90%", effort="quick", settings=["search.top=1"])
    print(found.table.to_string(index=False))
    gr.export_onnx(found.network, "own_model.onnx", (3, 32, 32))
