#!/usr/bin/python3 -B
"""embedding.txt: LoRA on an embedding in PyTorch, every scale rule at every rank, nested and frozen, with tokens that come again."""

import torch
from torch import nn
from torch.nn import functional as F

from reference import ALPHA, GoldenFile, alpha_over_max_rank, alpha_over_rank, alpha_over_sqrt_rank, draw, first, run


class Embedding(nn.Module):
    """Looks up its table, and the columns of A, which B makes into a change of what it found there."""

    def __init__(self, vocabulary, width, max_rank):
        super().__init__()
        self.weight = nn.Parameter(draw(vocabulary, width), requires_grad=False)
        self.lora_embedding_A = nn.Parameter(draw(max_rank, vocabulary))
        self.lora_embedding_B = nn.Parameter(draw(width, max_rank))
        self.max_rank = max_rank

    def forward(self, ids, rank, scale):
        change = F.embedding(ids, first(self.lora_embedding_A, rank).T) @ first(self.lora_embedding_B.T, rank)
        return F.embedding(ids, self.weight) + scale * change


def embedding():
    torch.manual_seed(5)
    layer = Embedding(7, 4, max_rank=3)
    ids = torch.tensor([2, 6, 2, 0, 2, 6])
    dy = draw(len(ids), 4)
    file = GoldenFile("embedding.txt")
    file.write("alpha", ALPHA)
    file.write("ids", ids)
    file.write_activations("dy", dy)
    file.write_parameters("", layer)
    for rule in alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank:
        for rank in range(1, layer.max_rank + 1):
            case = f"{rule.__name__}/{rank}"
            for mode, trainable_from in ("nested", 0), ("frozen", rank - 1):
                layer.zero_grad(set_to_none=True)
                y = layer(ids, (rank, trainable_from), rule(ALPHA, rank, layer.max_rank))
                y.backward(dy)
                file.write_gradients(f"{case}/{mode}/", layer)
            file.write_activations(f"{case}/y", y)


if __name__ == "__main__":
    run(embedding)
