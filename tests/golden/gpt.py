"""gpt.txt and gpt_base.txt: a tiny GPT-2, its adapters' gradients over a frozen base, and the base's own without adapters."""

import torch
from torch import nn
from torch.nn import functional as F

from reference import ALPHA, NO_ADAPTER, Attention, GoldenFile, Linear, draw

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS, MAX_RANK = 11, 8, 12, 3, 2, 4
LENGTHS = [8, 5, 8]


class LayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + draw(WIDTH, size=0.5), requires_grad=False)
        self.bias = nn.Parameter(draw(WIDTH, size=0.5), requires_grad=False)

    def forward(self, x):
        return F.layer_norm(x, (WIDTH,), self.weight, self.bias, eps=1e-5)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = Linear(WIDTH, 4 * WIDTH, MAX_RANK)
        self.c_proj = Linear(4 * WIDTH, WIDTH, MAX_RANK)

    def forward(self, x, rank):
        return self.c_proj(F.gelu(self.c_fc(x, rank), approximate="tanh"), rank)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = LayerNorm()
        self.attn = Attention([Linear(WIDTH, WIDTH, MAX_RANK) for _ in range(4)], HEADS, HEADS, causal=True)
        self.ln_2 = LayerNorm()
        self.mlp = Mlp()

    def forward(self, x, rank):
        x = x + self.attn(self.ln_1(x), LENGTHS, rank)
        return x + self.mlp(self.ln_2(x), rank)


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding.from_pretrained(draw(VOCABULARY, WIDTH))
        self.wpe = nn.Embedding.from_pretrained(draw(CONTEXT, WIDTH, size=0.5))
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = LayerNorm()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = nn.Parameter(draw(VOCABULARY, WIDTH), requires_grad=False)
        self.tied = False

    def forward(self, tokens, rank):
        x = self.wte(tokens) + self.wpe(torch.cat([torch.arange(length) for length in LENGTHS]))
        for block in self.h:
            x = block(x, rank)
        return F.linear(self.ln_f(x), self.wte.weight if self.tied else self.lm_head.weight)

    def adapt(self, suffixes):
        """Adapters on the projections with these names and on no other."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.max_rank = MAX_RANK if name.endswith(suffixes) else 0


def is_adapter(name):
    return "lora_" in name


def generate():
    torch.manual_seed(5)
    model = Gpt()
    tokens = torch.randint(VOCABULARY, (sum(LENGTHS),))
    targets = torch.randint(VOCABULARY, (sum(LENGTHS),))  # any will do; the last token of a sequence has none, and one more is ignored
    for ignored in *(torch.tensor(LENGTHS).cumsum(0) - 1).tolist(), 10:
        targets[ignored] = -100

    def evaluate(file, case, rank):
        model.zero_grad(set_to_none=True)
        logits = model(tokens, rank)
        loss = F.cross_entropy(logits, targets, ignore_index=-100)
        loss.backward()
        file.write(f"{case}/loss", loss)
        file.write_activations(f"{case}/logits", logits)

    file = GoldenFile("gpt.txt")
    file.write("lengths", LENGTHS)
    file.write("tokens", tokens)
    file.write("targets", targets)
    file.write("alpha", ALPHA)
    file.write_parameters("", model)
    for model.tied in True, False:
        for adapted, suffixes in {"all": ("_proj", "c_fc"), "qv": ("q_proj", "v_proj")}.items():
            model.adapt(suffixes)
            for rank in 1, 2, 4:
                case = f"{'tied' if model.tied else 'untied'}/{adapted}/{rank}"
                evaluate(file, case, (rank, 0))
                file.write_gradients(f"{case}/nested/", model)
                model.zero_grad(set_to_none=True)
                F.cross_entropy(model(tokens, (rank, rank - 1)), targets, ignore_index=-100).backward()
                file.write_gradients(f"{case}/frozen/", model)

    file = GoldenFile("gpt_base.txt")  # of the same parameters, which are not repeated
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_adapter(name))
    for model.tied in True, False:
        case = "tied" if model.tied else "untied"
        evaluate(file, case, NO_ADAPTER)
        file.write_gradients(f"{case}/gradients/", model)
