#!/usr/bin/python3 -B
"""conv2d.txt: LoRA on convolutions in PyTorch, as PEFT has it, at every rank, nested and frozen; and what loralib's layout adds to a weight."""

import torch
from torch import nn
from torch.nn import functional as F

from reference import ALPHA, GoldenFile, alpha_over_rank, backwards, draw, first, run

CASES = {  # input and output channels, image, kernel, max_rank, and how the convolution goes
    "strided": (2, 4, (5, 4), (3, 2), 3, {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": (1, 4, (4, 6), (2, 3), 3, {"padding": (2, 1), "dilation": (3, 2)}),
    "grouped": (4, 6, (4, 5), (2, 3), 2, {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}),
    "pointwise": (3, 3, (2, 2), (1, 1), 3, {}),
}


class Conv2d(nn.Module):
    """A convolution, and beside it one down to the rank of each group and a 1 x 1 convolution up; parameters as matrices, a pair per group."""

    def __init__(self, in_channels, out_channels, image, kernel, max_rank, geometry):
        super().__init__()
        self.geometry, self.groups, self.kernel = geometry, geometry.get("groups", 1), kernel
        self.weight = nn.Parameter(draw(out_channels, in_channels // self.groups, *kernel, size=0.5), requires_grad=False)
        self.bias = nn.Parameter(draw(out_channels, size=0.5), requires_grad=False)
        patch = self.weight[0].numel()
        self.lora_A = nn.ParameterList(nn.Parameter(draw(max_rank, patch, size=0.5)) for _ in range(self.groups))
        self.lora_B = nn.ParameterList(nn.Parameter(draw(out_channels // self.groups, max_rank, size=0.5)) for _ in range(self.groups))

    def forward(self, x, rank):
        down = torch.cat([first(A, rank) for A in self.lora_A]).reshape(-1, *self.weight.shape[1:])
        up = torch.cat([first(B.T, rank).T for B in self.lora_B])[:, :, None, None]
        change = F.conv2d(F.conv2d(x, down, **self.geometry), up, groups=self.groups)
        return F.conv2d(x, self.weight, self.bias, **self.geometry) + alpha_over_rank(ALPHA, rank[0], None) * change

    def write(self, file, prefix, value):
        for group in range(self.groups):
            name = prefix if self.groups == 1 else f"{prefix}{group}."
            file.write(f"{name}lora_A", value(self.lora_A[group]))
            file.write(f"{name}lora_B", value(self.lora_B[group]))


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def adapters(file):
    for case, (in_channels, out_channels, image, kernel, max_rank, geometry) in CASES.items():
        layer = Conv2d(in_channels, out_channels, image, kernel, max_rank, geometry)
        x = draw(2, in_channels, *image)
        dy = draw(*layer(x, (1, 0)).shape)
        for name, value in {"image": image, "kernel": kernel, "stride": 1, "padding": 0, "dilation": 1, **geometry}.items():
            file.write(f"{case}/{name}", value if name == "groups" else pair(value))
        file.write(f"{case}/weight", layer.weight.flatten(1))
        file.write(f"{case}/bias", layer.bias)
        layer.write(file, f"{case}/", lambda parameter: parameter)
        file.write_activations(f"{case}/x", x.flatten(1))
        file.write_activations(f"{case}/dy", dy.flatten(1))
        for rank in range(1, max_rank + 1):
            for mode, y, dx in backwards(layer, layer, x, dy, rank):
                layer.write(file, f"{case}/{rank}/{mode}/", lambda parameter: parameter.grad)
            file.write_activations(f"{case}/{rank}/y", y.flatten(1))
            file.write_activations(f"{case}/{rank}/dx", dx.flatten(1))


def loralib(file):
    in_channels, out_channels, kernel, max_rank = 4, 4, 2, 2
    for groups in 1, 2:
        case = f"loralib/{groups}"
        weight = draw(out_channels, in_channels // groups, kernel, kernel)
        A, B = draw(max_rank * kernel, in_channels * kernel), draw(out_channels // groups * kernel, max_rank * kernel)
        file.write(f"{case}/weight", weight.flatten(1))
        file.write(f"{case}/lora_A", A)
        file.write(f"{case}/lora_B", B)
        for rank in range(1, max_rank + 1):
            change = (B[:, :rank * kernel] @ A[:rank * kernel]).view(weight.shape)
            file.write(f"{case}/{rank}/merged", (weight + alpha_over_rank(ALPHA, rank, max_rank) * change).flatten(1))


def conv2d():
    torch.manual_seed(6)
    file = GoldenFile("conv2d.txt")
    file.write("alpha", ALPHA)
    adapters(file)
    loralib(file)


if __name__ == "__main__":
    run(conv2d)
