"""Networks that several tests of the search use."""

import torch
from torch import nn


class Twice(nn.Module):
    """A decomposed layer that runs twice, at two sizes, its output overwritten in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.shared = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        hidden = self.shared(torch.relu_(self.shared(self.stem(images))))
        return self.head(hidden.mean(dim=(2, 3)))
