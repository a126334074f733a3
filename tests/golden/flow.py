#!/usr/bin/python3 -B
"""LoRA-Flow: two projections of a block whose adapters share a gate, every gradient by autograd. Writes flow.txt."""

import torch
from torch import nn

from reference import GoldenFile, alpha_over_rank, alpha_over_sqrt_rank, draw, run

ADAPTERS = [(4, 2, alpha_over_rank), (2, 3, alpha_over_sqrt_rank), (3, 1, alpha_over_rank)]  # rank, alpha, scale
MIXED = [(2, 4), (1, 1), (2, 0), (2, 3)]  # tokens and their rank; at rank 0 they have no adapter


class Projection(nn.Module):
    """A frozen weight and bias with a frozen adapter for each of ADAPTERS."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.register_buffer("weight", draw(out_features, in_features, size=0.5))
        self.register_buffer("bias", draw(out_features, size=0.5))
        for i, (rank, _, _) in enumerate(ADAPTERS):
            self.register_buffer(f"lora_A_{i}", draw(rank, in_features, size=0.5))
            self.register_buffer(f"lora_B_{i}", draw(out_features, rank, size=0.5))

    def forward(self, x, omega, rank):
        outputs = [x @ self.weight.T + self.bias]
        for i, (components, alpha, scale) in enumerate(ADAPTERS if rank else []):
            b = min(rank, components)
            A, B = self.get_buffer(f"lora_A_{i}")[:b], self.get_buffer(f"lora_B_{i}")[:, :b]
            outputs.append(omega[:, i : i + 1] * (scale(alpha, b, components) * x @ A.T @ B.T))
        return torch.stack(outputs).sum(0)


class Gate(nn.Module):
    """softmax(W h), and the bias after it."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(draw(len(ADAPTERS), features))
        self.bias = nn.Parameter(draw(len(ADAPTERS)))

    def forward(self, h):
        return nn.functional.linear(h, self.weight).softmax(-1) + self.bias


def flow():
    """flow.txt: at every rank, and a batch of several."""
    torch.manual_seed(41)
    tokens, width, features = 7, 6, 5
    q, v = Projection(features, 4), Projection(features, 3)
    gate = Gate(width)
    h, x, dy_q, dy_v = draw(tokens, width), draw(tokens, features), draw(tokens, 4), draw(tokens, 3)
    file = GoldenFile("flow.txt")
    file.write("alpha", [alpha for _, alpha, _ in ADAPTERS])
    for name, values in {"h": h, "x": x, "dy_q": dy_q, "dy_v": dy_v}.items():
        file.write_activations(name, values)
    for name, projection in {"q": q, "v": v}.items():
        for buffer, values in projection.named_buffers():
            file.write(f"{name}/{buffer}", values)
    file.write_parameters("gate/", gate)
    for case in 1, 2, 3, 4, "mixed":
        runs = MIXED if case == "mixed" else [(tokens, case)]
        leaf_h, leaf_x = h.clone().requires_grad_(), x.clone().requires_grad_()
        gate.zero_grad(set_to_none=True)
        parts = list(zip(gate(leaf_h).split([n for n, _ in runs]), leaf_x.split([n for n, _ in runs]), runs))
        y_q, y_v = (torch.cat([projection(x, omega, rank) for omega, x, (_, rank) in parts]) for projection in (q, v))
        ((y_q * dy_q).sum() + (y_v * dy_v).sum()).backward()
        for name, values in {"y_q": y_q, "y_v": y_v, "dx": leaf_x.grad, "dh": leaf_h.grad}.items():
            file.write_activations(f"{case}/{name}", values)
        file.write_gradients(f"{case}/gate/", gate)


if __name__ == "__main__":
    run(flow)
