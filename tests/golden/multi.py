#!/usr/bin/python3 -B
"""multi.txt: MultiLoRA as a sum over modules that know nothing of each other, every gradient by autograd."""

import torch
from torch import nn
from torch.nn import functional as F

from reference import ALPHA, GoldenFile, Linear, alpha_over_rank, backwards, draw, first, run


class Module(nn.Module):
    def __init__(self, in_features, out_features, max_rank, outputs_with_a_gain):
        super().__init__()
        self.A = nn.Parameter(draw(max_rank, in_features, size=0.5))
        self.B = nn.Parameter(draw(out_features, max_rank, size=0.5))
        self.gain = nn.Parameter(draw(outputs_with_a_gain))

    def forward(self, x, rank):
        return self.gain * ((x @ first(self.A, rank).T) @ first(self.B.T, rank))


class MultiLora(Linear):
    def __init__(self, in_features, out_features, max_rank, modules, gain):
        super().__init__(in_features, out_features)
        outputs = out_features if gain == "per_output" else 1
        self.parallel = nn.ModuleList(Module(in_features, out_features, max_rank, outputs) for _ in range(modules))
        self.max_rank = max_rank

    def forward(self, x, rank):
        scale = alpha_over_rank(ALPHA, rank[0], self.max_rank)
        return F.linear(x, self.weight, self.bias) + scale * sum(module(x, rank) for module in self.parallel)

    def write(self, file, prefix, of):
        """The parameters, or their gradients, as the library lays them out: components together, module beside (or under) module."""
        file.write(prefix + "multilora_A", torch.cat([of(module.A) for module in self.parallel], 1))
        file.write(prefix + "multilora_B", torch.cat([of(module.B) for module in self.parallel], 0))
        file.write(prefix + "multilora_gain", torch.stack([of(module.gain) for module in self.parallel], 1))


def multi():
    """Three modules at every rank, nested and frozen, with a gain for each output or one for each module."""
    torch.manual_seed(8)
    x, dy = draw(4, 6), draw(4, 5)
    file = GoldenFile("multi.txt")
    file.write("alpha", ALPHA)
    file.write_activations("x", x)
    file.write_activations("dy", dy)
    for gain in "per_output", "scalar":
        layer = MultiLora(6, 5, 3, 3, gain)
        file.write(f"{gain}/weight", layer.weight)
        file.write(f"{gain}/bias", layer.bias)
        layer.write(file, f"{gain}/", lambda parameter: parameter)
        for rank in range(1, layer.max_rank + 1):
            for mode, y, dx in backwards(layer, layer, x, dy, rank):
                layer.write(file, f"{gain}/{rank}/{mode}/", lambda parameter: parameter.grad)
            file.write_activations(f"{gain}/{rank}/y", y)
            file.write_activations(f"{gain}/{rank}/dx", dx)


if __name__ == "__main__":
    run(multi)
