#!/usr/bin/python3 -B
"""dora.txt: DoRA as a dense weight, every gradient by autograd."""

import torch
from torch import nn
from torch.nn import functional as F

from reference import ALPHA, GoldenFile, Linear, alpha_over_rank, backwards, draw, first, run

SEED = 77
DROPOUT = 0.25  # 1/4: its threshold and the gain 4/3 have no rounding of their own


class Dora(Linear):
    """diag(m / n) (W + s B A) in place of W, where the input of the difference may have been dropped."""

    def __init__(self, in_features, out_features, max_rank, magnitude):
        super().__init__(in_features, out_features, max_rank)
        shape = (out_features,) if magnitude == "shared" else (out_features, max_rank)
        self.lora_magnitude_vector = nn.Parameter(1 + draw(*shape, size=0.5))

    def forward(self, x, rank, mask, norm_gradient):
        scale = alpha_over_rank(ALPHA, rank[0], self.max_rank)
        corrected = self.weight + scale * first(self.lora_B.T, rank).T @ first(self.lora_A, rank)
        norm = torch.linalg.vector_norm(corrected, dim=1)
        if norm_gradient == "detached":
            norm = norm.detach()
        m = self.lora_magnitude_vector
        if m.dim() == 2:  # what each rank adds to the one below
            m = first(m.T, rank).sum(0)
        difference = (m / norm)[:, None] * corrected - self.weight
        return F.linear(x, self.weight, self.bias) + F.linear(mask * x, difference)


def dropout_mask(samples, features):
    """SplitMix64 from the seed, four elements to a word, lowest bits first."""
    state, bits, mask = SEED, [], []
    limit = 1 << 64
    for _ in range(samples * features):
        if not bits:
            state = (state + 0x9E3779B97F4A7C15) % limit
            z = state
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % limit
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % limit
            z ^= z >> 31
            bits = [z >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
        mask.append(0.0 if bits.pop(0) < DROPOUT * 65536 else 1 / (1 - DROPOUT))
    return torch.tensor(mask).reshape(samples, features)


def dora():
    """One magnitude for all ranks or one that each rank adds to, norms with a gradient or without, inputs dropped or not."""
    torch.manual_seed(6)
    x, dy = draw(4, 5), draw(4, 4)
    masks = {"all": torch.ones(4, 5), "dropped": dropout_mask(4, 5)}
    file = GoldenFile("dora.txt")
    file.write("alpha", ALPHA)
    file.write("seed", SEED)
    file.write("dropout", DROPOUT)
    file.write_activations("mask", masks["dropped"])
    file.write_activations("x", x)
    file.write_activations("dy", dy)
    for magnitude in "shared", "nested":
        layer = Dora(5, 4, 3, magnitude)
        file.write_parameters(f"{magnitude}/", layer)
        for dropout, mask in masks.items():
            for rank in range(1, layer.max_rank + 1):
                case = f"{magnitude}/{dropout}/{rank}"
                for norm_gradient in "detached", "exact":
                    for mode, y, dx in backwards(layer, lambda leaf, slice: layer(leaf, slice, mask, norm_gradient), x, dy, rank):
                        file.write_gradients(f"{case}/{norm_gradient}/{mode}/", layer)
                file.write_activations(f"{case}/y", y)
                file.write_activations(f"{case}/dx", dx)


if __name__ == "__main__":
    run(dora)
