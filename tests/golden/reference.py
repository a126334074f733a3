"""The layers, written for PyTorch from the papers' formulas; they share nothing with the library.

Activations are samples x features here, as PyTorch has them, and are transposed when written. A rank is the pair (active, trainable_from):
the components before trainable_from take part in the forward and pass gradient to the input, but are held constant themselves.
"""

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ALPHA = 2
NO_ADAPTER = (0, 0)


def draw(*shape, size=1.0):
    """Uniform in +-size, in multiples of 1/256: short to write, and the same number in float and double."""
    return torch.round(256 * size * (2 * torch.rand(*shape) - 1)) / 256


def alpha_over_rank(alpha, rank, max_rank):
    return alpha / rank


def alpha_over_sqrt_rank(alpha, rank, max_rank):
    return alpha / math.sqrt(rank)


def alpha_over_max_rank(alpha, rank, max_rank):
    return alpha / max_rank


def first(components, rank):
    active, trainable_from = rank
    return torch.stack([components[i] if i >= trainable_from else components[i].detach() for i in range(active)])


def add_adapter(y, x, A, B, rank, scale):
    """y + scale B[:, :b] A[:b] x. A holds the rows of A, B the columns of B: a tensor, or a list with a tensor per component."""
    return y + scale * (x @ first(A, rank).T) @ first(B, rank)


class Linear(nn.Module):
    """W x + bias, and an adapter if max_rank is not 0."""

    def __init__(self, in_features, out_features, max_rank=0):
        super().__init__()
        self.weight = nn.Parameter(draw(out_features, in_features, size=0.5), requires_grad=False)
        self.bias = nn.Parameter(draw(out_features, size=0.5), requires_grad=False)
        self.max_rank, self.scale = max_rank, alpha_over_rank
        if max_rank:
            self.lora_A = nn.Parameter(draw(max_rank, in_features, size=0.5))
            self.lora_B = nn.Parameter(draw(out_features, max_rank, size=0.5))

    def forward(self, x, rank):
        y = F.linear(x, self.weight, self.bias)
        if not self.max_rank or rank == NO_ADAPTER:
            return y
        return add_adapter(y, x, self.lora_A, self.lora_B.T, rank, self.scale(ALPHA, rank[0], self.max_rank))


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V, each sequence and head by itself; head h reads key/value head h // (heads / key_value_heads)."""

    def __init__(self, projections, heads, key_value_heads, causal):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections
        self.heads, self.key_value_heads, self.causal = heads, key_value_heads, causal

    def forward(self, x, lengths, rank):
        return torch.cat([self.attend(sequence, rank) for sequence in x.split(lengths)])

    def attend(self, x, rank):
        tokens, shared_by = len(x), self.heads // self.key_value_heads
        q = self.q_proj(x, rank).view(tokens, self.heads, -1).transpose(0, 1)
        k = self.k_proj(x, rank).view(tokens, self.key_value_heads, -1).transpose(0, 1).repeat_interleave(shared_by, 0)
        v = self.v_proj(x, rank).view(tokens, self.key_value_heads, -1).transpose(0, 1).repeat_interleave(shared_by, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
        if self.causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        return self.o_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(tokens, -1), rank)


def backwards(module, call, x, dy, rank):
    """For nested and then frozen mode: its name, call(x, rank) and dx of its inner product with dy, whose other gradients are in the module."""
    for mode, trainable_from in ("nested", 0), ("frozen", rank - 1):
        leaf = x.clone().requires_grad_()
        module.zero_grad(set_to_none=True)
        y = call(leaf, (rank, trainable_from))
        y.backward(dy)
        yield mode, y, leaf.grad


def run(*generators):
    """Calls them in float64 on one thread: the same sums on every machine."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    for generate in generators:
        generate()


class GoldenFile:
    """Tensors one after another: a line `name rows cols`, then a line per row. A vector is written as a column."""

    def __init__(self, name):
        self.file = open(Path(__file__).with_name(name), "w")

    def write(self, name, tensor):
        tensor = torch.as_tensor(tensor, dtype=torch.float64).detach()
        if tensor.dim() != 2:
            tensor = tensor.reshape(-1, 1)
        print(name, *tensor.shape, file=self.file)
        for row in tensor.tolist():
            print(*(f"{value:.17g}" for value in row), file=self.file)

    def write_activations(self, name, tensor):
        self.write(name, tensor.T)

    def write_parameters(self, prefix, module):
        for name, parameter in module.named_parameters():
            self.write(prefix + name, parameter)

    def write_gradients(self, prefix, module):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                self.write(prefix + name, parameter.grad)
