"""gpt2/: a folder as the Hugging Face hub has it for GPT-2, tiny and random, and gpt2.txt: what PyTorch makes of it with adapters.

The model's file is written here from the format's description, and kept as text: model.safetensors.hex.
"""

import json
import struct
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from reference import ALPHA, GoldenFile, add_adapter, draw

FOLDER = Path(__file__).with_name("gpt2")
CONTEXT, WIDTH, HEADS, LAYERS, MAX_RANK, EPSILON = 16, 8, 2, 2, 4, 1e-5
LENGTHS = [16, 9, 16]
PROJECTIONS = {"attn.c_attn": (WIDTH, 3 * WIDTH), "attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (WIDTH, 4 * WIDTH), "mlp.c_proj": (4 * WIDTH, WIDTH)}


def random_weights(vocabulary):
    weights = {"wte.weight": draw(vocabulary, WIDTH), "wpe.weight": draw(CONTEXT, WIDTH, size=0.5)}

    def norm(name):
        weights[name + ".weight"], weights[name + ".bias"] = 1 + draw(WIDTH, size=0.5), draw(WIDTH, size=0.5)

    for i in range(LAYERS):
        norm(f"h.{i}.ln_1")
        norm(f"h.{i}.ln_2")
        weights[f"h.{i}.attn.bias"] = torch.ones(CONTEXT, CONTEXT).tril().reshape(1, 1, CONTEXT, CONTEXT)  # the mask, which older files carry
        for name, (inputs, outputs) in PROJECTIONS.items():  # Conv1D: inputs x outputs
            weights[f"h.{i}.{name}.weight"], weights[f"h.{i}.{name}.bias"] = draw(inputs, outputs, size=0.5), draw(outputs, size=0.5)
    norm("ln_f")
    return weights


def safetensors(weights):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in weights.items():
        values = struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist())
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def forward(weights, adapters, rank, tokens):
    """Logits of sequences laid end to end. Adapters: name of the projection -> list of (A, B, first output): y[first:] += s B[:, :b] A[:b] x."""

    def project(x, name):
        y = x @ weights[name + ".weight"] + weights[name + ".bias"]
        for A, B, first in adapters.get(name, ()):
            last = first + len(B)
            part = add_adapter(y[:, first:last], x, A, B.T, (rank, 0), ALPHA / rank)
            y = torch.cat([y[:, :first], part, y[:, last:]], 1)
        return y

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), weights[name + ".weight"], weights[name + ".bias"], EPSILON)

    def attend(x, i):
        q, k, v = (part.view(len(x), HEADS, -1).transpose(0, 1) for part in project(x, f"h.{i}.attn.c_attn").split(WIDTH, 1))
        scores = (q @ k.transpose(1, 2) / (WIDTH // HEADS) ** 0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        return project((scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), WIDTH), f"h.{i}.attn.c_proj")

    logits = []
    for sequence in tokens.split(LENGTHS):
        x = weights["wte.weight"][sequence] + weights["wpe.weight"][: len(sequence)]
        for i in range(LAYERS):
            x = x + attend(norm(x, f"h.{i}.ln_1"), i)
            x = x + project(F.gelu(project(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh"), f"h.{i}.mlp.c_proj")
        logits.append(norm(x, "ln_f") @ weights["wte.weight"].T)
    return torch.cat(logits)


def generate():
    torch.manual_seed(6)
    vocabulary = len(json.loads(Path(__file__).with_name("tokenizer").joinpath("vocab.json").read_text()))
    weights = random_weights(vocabulary)
    FOLDER.mkdir(exist_ok=True)
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocabulary,
        "n_positions": CONTEXT,
        "n_ctx": CONTEXT,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": EPSILON,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }
    (FOLDER / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    digits = safetensors(weights).hex()
    (FOLDER / "model.safetensors.hex").write_text("".join(digits[i : i + 128] + "\n" for i in range(0, len(digits), 128)))

    tokens = torch.randint(vocabulary, (sum(LENGTHS),))
    targets = torch.randint(vocabulary, (sum(LENGTHS),))
    file = GoldenFile("gpt2.txt")
    file.write("lengths", LENGTHS)
    file.write("tokens", tokens)
    file.write("targets", targets)
    file.write("alpha", ALPHA)

    def pair(inputs, outputs):
        return nn.Parameter(draw(MAX_RANK, inputs, size=0.5)), nn.Parameter(draw(outputs, MAX_RANK, size=0.5))

    def slices(name):
        """One pair for a whole projection; for "qv", two for the queries and the values of c_attn."""
        inputs, outputs = PROJECTIONS[name]
        return {"whole": [(*pair(inputs, outputs), 0)], "qv": [(*pair(inputs, WIDTH), first) for first in (0, 2 * WIDTH)]}

    drawn = {f"h.{i}.{name}": slices(name) for i in range(LAYERS) for name in PROJECTIONS}
    cases = {
        "all": {name: parts["whole"] for name, parts in drawn.items()},
        "qv": {name: parts["qv"] for name, parts in drawn.items() if name.endswith("c_attn")},
    }
    for case, adapters in cases.items():
        parameters = {}
        for name, parts in adapters.items():
            for A, B, first in parts:
                parameters[f"{name}.{first // WIDTH}.lora_A"], parameters[f"{name}.{first // WIDTH}.lora_B"] = A, B
        for name, parameter in parameters.items():
            file.write(f"{case}/parameters/{name}", parameter)
        for rank in 1, MAX_RANK:
            for parameter in parameters.values():
                parameter.grad = None
            logits = forward(weights, adapters, rank, tokens)
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            file.write(f"{case}/{rank}/loss", loss)
            for name, parameter in parameters.items():
                file.write(f"{case}/{rank}/gradients/{name}", parameter.grad)
            if case == "all" and rank == MAX_RANK:
                file.write_activations("logits", logits[:, ::8])  # every eighth class


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    generate()
