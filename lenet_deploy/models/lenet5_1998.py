"""LeNet-5 as published in 1998: trainable subsampling, the C3 table, scaled tanh, RBF output.

Source: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", section II.B.
The prototypes are this project's own drawings in the paper's 7x12 form; the paper's bitmaps are a figure only.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lenet_deploy.models.config import C3_CONNECTIONS, KERNEL, LeNet1998Config

# Twelve rows of seven pixels a digit: '#' is +1, '.' is -1.
PROTOTYPES = (
    ("..###..", ".#...#.", "#.....#", "#.....#", "#.....#", "#.....#", "#.....#", "#.....#", "#.....#", ".#...#.", "..###..", "......."),
    ("...#...", "..##...", ".#.#...", "...#...", "...#...", "...#...", "...#...", "...#...", "...#...", "...#...", ".#####.", "......."),
    (".#####.", "#.....#", "......#", "......#", ".....#.", "....#..", "...#...", "..#....", ".#.....", "#......", "#######", "......."),
    ("#######", ".....#.", "....#..", "...#...", "..###..", ".....#.", "......#", "......#", "......#", "#.....#", ".#####.", "......."),
    (".....#.", "....##.", "...#.#.", "..#..#.", ".#...#.", "#....#.", "#######", ".....#.", ".....#.", ".....#.", ".....#.", "......."),
    ("#######", "#......", "#......", "#......", "######.", "......#", "......#", "......#", "......#", "#.....#", ".#####.", "......."),
    ("..####.", ".#.....", "#......", "#......", "#.###..", "##...#.", "#.....#", "#.....#", "#.....#", ".#...#.", "..###..", "......."),
    ("#######", "......#", "......#", ".....#.", ".....#.", "....#..", "....#..", "...#...", "...#...", "..#....", "..#....", "......."),
    (".#####.", "#.....#", "#.....#", "#.....#", ".#####.", "#.....#", "#.....#", "#.....#", "#.....#", "#.....#", ".#####.", "......."),
    ("..###..", ".#...#.", "#.....#", "#.....#", "#.....#", ".#...##", "..###.#", "......#", "......#", ".....#.", ".####..", "......."),
)


def prototypes() -> Tensor:
    """The ten class prototypes, float32 (10, 84) of -1 and +1."""
    rows = [[1.0 if pixel == "#" else -1.0 for row in digit for pixel in row] for digit in PROTOTYPES]
    return torch.tensor(rows, dtype=torch.float32)


def connection_mask() -> Tensor:
    """1 where a C3 map sees an S2 map, else 0: float32 (16, 6, 1, 1)."""
    mask = torch.zeros(16, 6, 1, 1)
    for source, targets in enumerate(C3_CONNECTIONS):
        mask[list(targets), source] = 1.0
    return mask


def squash(x: Tensor) -> Tensor:
    """The paper's scaled tanh, 1.7159 tanh(2x/3), which maps +-1 to +-1 (appendix A)."""
    return 1.7159 * torch.tanh(x * (2.0 / 3.0))


class Subsampling(nn.Module):
    """Sum of each 2x2 block, times a trainable coefficient a map, plus a trainable bias a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.empty(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # The mean times four is the sum, exactly: four is a power of two.
        return functional.avg_pool2d(x, 2) * (4.0 * self.coefficient) + self.bias


class SparseConv(nn.Conv2d):
    """C3: a convolution whose weights outside the connection table are zero and stay zero.

    Keeping the dense weight makes every export one plain convolution; the mask in training stops the gradient
    of the absent connections, so an optimiser never moves them.
    """

    mask: Tensor

    def __init__(self) -> None:
        super().__init__(6, 16, KERNEL)
        self.register_buffer("mask", connection_mask(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.mask if self.training else self.weight
        return functional.conv2d(x, weight, self.bias)


class LeNet1998(nn.Module):
    """The 1998 network; scores are negated squared distances, so that argmax picks the nearest prototype.

    Input float32 (N, 1, 32, 32), background -0.1 and foreground 1.175; output float32 (N, 10).
    """

    prototypes: Tensor

    def __init__(self, config: LeNet1998Config) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(config.in_channels, 6, KERNEL)
        self.s2 = Subsampling(6)
        self.c3 = SparseConv()
        self.s4 = Subsampling(16)
        self.c5 = nn.Conv2d(16, 120, KERNEL)
        self.f6 = nn.Linear(120, 84)
        self.register_buffer("prototypes", prototypes())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights with variance 1 / fan-in (LeCun et al., "Efficient BackProp", 1998, eq. 16), biases zero.

        The squashing was made for it: unit variance stays unit variance. The network's own paper draws from
        +-2.4 / fan-in, whose signals fade layer by layer: on MNIST that reached 92 % where this reached 97 % in two epochs.
        """
        mask = connection_mask()
        c3_fan_in = mask.sum(dim=(1, 2, 3), keepdim=True) * (KERNEL * KERNEL)
        for layer, fan_in in ((self.c1, 25), (self.c3, 1), (self.c5, 400), (self.f6, 120)):
            bound = math.sqrt(3 / fan_in)
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # torch types bias as Optional
        with torch.no_grad():
            self.c3.weight.mul_(mask / c3_fan_in.sqrt())
        for subsampling in (self.s2, self.s4):
            nn.init.constant_(subsampling.coefficient, 1 / math.sqrt(4))  # a sum of four inputs

    def forward(self, image: Tensor) -> Tensor:
        x = squash(self.s2(squash(self.c1(image))))
        x = squash(self.s4(squash(self.c3(x))))
        x = squash(self.c5(x)).reshape(-1, 120)
        x = squash(self.f6(x))
        difference = x.unsqueeze(1) - self.prototypes
        return -(difference * difference).sum(dim=2)
