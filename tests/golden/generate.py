#!/usr/bin/python3 -B
"""Golden numbers from PyTorch, in float64, every gradient by autograd, and tokens from plain Python.

Run this to rewrite all the text files beside it and in tokenizer/."""

import torch
from torch import nn
from torch.nn import functional as F

import conv2d
import dora
import embedding
import flow
import gpt
import multi
import residual
import tokenizer
from reference import (ALPHA, Attention, GoldenFile, Linear, add_adapter, alpha_over_max_rank, alpha_over_rank, alpha_over_sqrt_rank,
                       backwards, draw, run)


def write_backward(file, case, module, rank, call, x, dy):
    """call(x, rank), and the gradients of its inner product with dy: that of x is the same in both modes, those of the adapters are not."""
    results = []
    for mode, y, dx in backwards(module, call, x, dy, rank):
        results.append((y, dx))
        file.write_gradients(f"{case}/{mode}/", module)
    (y, dx), frozen = results
    assert torch.equal(y, frozen[0]) and torch.allclose(dx, frozen[1], rtol=0, atol=1e-13)
    file.write_activations(f"{case}/y", y)
    file.write_activations(f"{case}/dx", dx)


def linear():
    """linear.txt: every scale rule at every rank, nested and frozen."""
    torch.manual_seed(1)
    layer = Linear(7, 5, max_rank=4)
    x, dy = draw(6, 7), draw(6, 5)
    file = GoldenFile("linear.txt")
    file.write("alpha", ALPHA)
    file.write_activations("x", x)
    file.write_activations("dy", dy)
    file.write_parameters("", layer)
    for layer.scale in alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank:
        for rank in range(1, layer.max_rank + 1):
            write_backward(file, f"{layer.scale.__name__}/{rank}", layer, rank, layer, x, dy)


def attention():
    """attention.txt: heads that share keys and values, causal or not, adapters on all projections or on q and v, short and long sequences."""
    torch.manual_seed(2)
    width, heads, head_dim, out_features, max_rank = 5, 4, 3, 4, 3
    batches = {"short": [1, 9, 2, 5], "long": [70, 3, 131, 1]}  # the library works in tiles of 64 tokens
    file = GoldenFile("attention.txt")
    file.write("alpha", ALPHA)
    inputs = {}
    for batch, lengths in batches.items():
        inputs[batch] = draw(sum(lengths), width), draw(sum(lengths), out_features)
        inputs[batch][1][9] = 0  # of the short batch, the end of a sequence: no gradient reaches it if causal
        file.write(f"{batch}/lengths", lengths)
        file.write_activations(f"{batch}/x", inputs[batch][0])
        file.write_activations(f"{batch}/dy", inputs[batch][1])

    for key_value_heads in 4, 2, 1:
        q = Linear(width, heads * head_dim, max_rank)
        k, v = (Linear(width, key_value_heads * head_dim, max_rank) for _ in range(2))
        o = Linear(heads * head_dim, out_features, max_rank)
        layer = Attention((q, k, v, o), heads, key_value_heads, causal=True)
        file.write_parameters(f"{key_value_heads}/", layer)
        for layer.causal in True, False:
            for adapted in "qkvo", "qv":
                for name, projection in zip("qkvo", (q, k, v, o)):
                    projection.max_rank = max_rank if name in adapted else 0

                def write(batch, rank):
                    case = f"{key_value_heads}/{'causal' if layer.causal else 'full'}/{adapted}/{batch}/{rank}"
                    write_backward(file, case, layer, rank, lambda x, rank: layer(x, batches[batch], rank), *inputs[batch])

                write("short", 1)
                write("short", 3)
                if key_value_heads == 2 and adapted == "qkvo":
                    write("long", 2)


def optimizers():
    """optimizers.txt: a small layer and mean squared error, trained for 20 steps at ranks that change from step to step."""
    torch.manual_seed(3)
    layer = Linear(6, 5, max_rank=4)
    x, target = draw(7, 6), draw(7, 5)
    options = {"lr": 0.02, "momentum": 0.8, "beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.1, "max_norm": 0.45}
    ranks = [3, 1, 2, 1, 4, 2, 2, 3, 1, 4, 1, 1, 3, 2, 4, 3, 2, 1, 4, 2]
    micro_batches = {  # of each step
        "nested": [[(b, 0)] for b in ranks],
        "frozen": [[(b, b - 1)] for b in ranks],
        "accumulated": [[(b, b - 1), (c, c - 1)] for b, c in zip(ranks, ranks[7:] + ranks[:7])],
    }
    file = GoldenFile("optimizers.txt")
    for name, value in {**options, "alpha": ALPHA}.items():
        file.write(name, value)
    file.write_activations("x", x)
    file.write_activations("target", target)
    file.write_parameters("", layer)

    def adamw(parameters):
        betas = options["beta1"], options["beta2"]
        return torch.optim.AdamW(parameters, lr=options["lr"], betas=betas, eps=options["eps"], weight_decay=options["weight_decay"])

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=options["lr"], momentum=options["momentum"])

    def train(case, make_optimizer, update, steps):
        A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().T.clone()
        if update == "active_only":  # a parameter per component: one that takes no part has no gradient, and PyTorch passes it over
            A, B = [row.clone() for row in A], [column.clone() for column in B]
        parameters = [A, B] if update == "dense" else A + B
        optimizer = make_optimizer([parameter.requires_grad_() for parameter in parameters])
        for step, slices in enumerate(steps, 1):
            optimizer.zero_grad(set_to_none=True)
            for rank in slices:
                y = add_adapter(F.linear(x, layer.weight, layer.bias), x, A, B, rank, alpha_over_rank(ALPHA, rank[0], layer.max_rank))
                (F.mse_loss(y, target) / len(slices)).backward()
            nn.utils.clip_grad_norm_(parameters, options["max_norm"])
            if make_optimizer is sgd:  # decoupled decay, which torch.optim.SGD does not have
                with torch.no_grad():
                    for parameter in parameters:
                        if parameter.grad is not None:
                            parameter *= 1 - options["lr"] * options["weight_decay"]
            optimizer.step()
            if step in (1, 2, 10, 20):
                file.write(f"{case}/{step}/lora_A", torch.stack(list(A)))
                file.write(f"{case}/{step}/lora_B", torch.stack(list(B)).T)

    for name, steps in micro_batches.items():
        file.write(f"{name}/micro_batches", [[step, *rank] for step, slices in enumerate(steps, 1) for rank in slices])
        for make_optimizer in adamw, sgd:
            for update in "active_only", "dense":
                train(f"{name}/{make_optimizer.__name__}/{update}", make_optimizer, update, steps)

    # Clipping where it begins: PyTorch adds 1e-6 to the norm before it compares.
    gradient = draw(2, 3, size=1e-2)
    file.write("clip/gradient", gradient)
    for name, distance in {"above": -1e-5, "at": 5e-7, "below": 1e-5}.items():
        parameter = nn.Parameter(torch.zeros(2, 3))
        parameter.grad = gradient.clone()
        max_norm = gradient.norm().item() + distance
        nn.utils.clip_grad_norm_([parameter], max_norm)
        file.write(f"clip/{name}/max_norm", max_norm)
        file.write(f"clip/{name}/clipped", parameter.grad)


def losses():
    """losses.txt"""
    torch.manual_seed(4)
    file = GoldenFile("losses.txt")

    def write(case, loss, y):
        loss.backward()
        file.write(f"{case}/loss", loss)
        file.write_activations(f"{case}/gradient", y.grad)

    y, target = draw(6, 5, size=2).requires_grad_(), draw(6, 5, size=2)
    file.write_activations("mse/y", y)
    file.write_activations("mse/target", target)
    write("mse", F.mse_loss(y, target), y)

    cases = {  # classes, ignore_index, range of the logits, targets
        "cross_entropy/all": (5, -100, (-3, 3), [0, 4, 2, 2, 1, 3, 0]),
        "cross_entropy/some_ignored": (5, -100, (-3, 3), [0, -100, 2, -100, 1, 3, -100]),
        "cross_entropy/class_ignored": (5, 2, (-3, 3), [0, 4, 2, 2, 1, 3, 0]),
        "cross_entropy/many_classes": (130, -100, (-20, 20), [129, 0, 64, 63, -100, 100]),
        "cross_entropy/large_logits": (5, -100, (800, 1400), [0, 4, 1, 2]),
    }
    for case, (classes, ignore_index, (low, high), targets) in cases.items():
        logits = ((low + high) / 2 + draw(len(targets), classes, size=(high - low) / 2)).requires_grad_()
        file.write_activations(f"{case}/logits", logits)
        file.write(f"{case}/targets", targets)
        file.write(f"{case}/ignore_index", ignore_index)
        write(case, F.cross_entropy(logits, torch.tensor(targets), ignore_index=ignore_index), logits)


if __name__ == "__main__":
    run(linear, attention, optimizers, losses, dora.dora, embedding.embedding, conv2d.conv2d, residual.residual, multi.multi, flow.flow,
        gpt.generate, tokenizer.generate)
