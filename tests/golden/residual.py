#!/usr/bin/python3 -B
"""residual.txt: ResLoRA over three links with a tanh after each, every gradient by autograd."""

import torch
from torch import nn
from torch.nn import functional as F

from reference import ALPHA, GoldenFile, Linear, alpha_over_rank, backwards, draw, first, run


class Chain(nn.Module):
    """x_{n+1} = tanh(W x_n + bias + s B_n A_n (x_n + x_{n-1})), or a block or middle shortcut's sum over `reach` earlier links."""

    def __init__(self, features, links, max_rank):
        super().__init__()
        self.links = nn.ModuleList(Linear(features, features, max_rank) for _ in range(links))
        self.max_rank = max_rank

    def forward(self, x, rank, shortcut, reach):
        scale = alpha_over_rank(ALPHA, rank[0], self.max_rank)
        inputs = [x]
        for n, link in enumerate(self.links):
            earlier = range(max(0, n - reach), n + 1)
            A = [first(other.lora_A, rank).T for other in self.links]
            B = [first(other.lora_B.T, rank) for other in self.links]
            if shortcut == "input":
                delta = (inputs[n] + inputs[max(0, n - 1)]) @ A[n] @ B[n]
            elif shortcut == "block":
                delta = sum(inputs[n] @ A[q] @ B[q] for q in earlier)
            else:
                delta = sum(inputs[q] @ A[q] for q in earlier) @ B[n]
            inputs.append(torch.tanh(F.linear(inputs[n], link.weight, link.bias) + scale * delta))
        return inputs[-1]


def residual():
    """Every shortcut, reaching one link back or all, at every rank, nested and frozen."""
    torch.manual_seed(8)
    chain = Chain(3, links=3, max_rank=2)
    x, dy = draw(4, 3), draw(4, 3)
    file = GoldenFile("residual.txt")
    file.write("alpha", ALPHA)
    file.write_activations("x", x)
    file.write_activations("dy", dy)
    file.write_parameters("", chain)
    for shortcut, reach in ("input", 1), ("block", 1), ("block", 2), ("middle", 1), ("middle", 2):
        for rank in range(1, chain.max_rank + 1):
            case = f"{shortcut}/{reach}/{rank}"
            for mode, y, dx in backwards(chain, lambda leaf, slice: chain(leaf, slice, shortcut, reach), x, dy, rank):
                file.write_gradients(f"{case}/{mode}/", chain)
            file.write_activations(f"{case}/y", y)
            file.write_activations(f"{case}/dx", dx)


if __name__ == "__main__":
    run(residual)
