"""Small networks for tests of quantisation, exported once each."""

from functools import cache

import torch
from torch import nn

from callbacks.onnx_export import export_onnx


class PreActivated(nn.Module):
    """A sum that a BatchNorm reads, a residual branch with a constant factor, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv1(x)
        x = x + 0.25 * self.conv2(torch.relu(self.bn1(x)))
        x = torch.relu(self.conv3(torch.relu(self.bn2(x))))
        return self.fc(x.mean((2, 3)))


class Plain(nn.Module):
    """Convolutions with BatchNorm behind, ReLU and ReLU6, a sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + nn.functional.relu6(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def network(kind):
    """A network with statistics and factors of its own, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = kind().eval()
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.3, 2)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.2)
        with torch.no_grad():  # so that all classes are answered
            made.fc.bias -= made(torch.from_numpy(images(200))).mean(0)
        return made


@cache
def exported(kind):
    """Its graph; to be copied before it is changed."""
    return export_onnx(network(kind), (3, 8, 8))


def images(number=48, seed=0):
    """Random images, `(N, 3, 8, 8)`."""
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).numpy()
