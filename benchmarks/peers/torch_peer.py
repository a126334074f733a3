#!/usr/bin/python3 -B
"""The work of the benchmarks in PyTorch: a request per line on standard input, a reply per line on standard output, both JSON.

    {"do": "linear", "in": 64, "out": 128, "tokens": 32, "rank": 8, "threads": 1, "seed": 1}    {"id": 0, "how": "...", "norms": {...}}
    {"do": "repeat", "id": 0, "seconds": 0.02}                                                  {"seconds": 1e-5}, those of one call
    {"do": "gpt", "width": 128, "layers": 3, ..., "threads": 2, "seed": 1}                      {"id": 1, "how": "..."}
    {"do": "train", "id": 1, "ranks": [3, 8]}                                                   {"seconds": 0.05, "losses": [5.6, 5.5]}
    {"do": "memory", "width": 128, ...}                                                         {"bytes": 3e8}

What is set up under an id uses at most the given threads, in the fastest of the plausible ways: `how` says which. The numbers are drawn as
dylora::Rng draws them, so that both sides can be seen to do the same work.
"""

import ctypes
import glob
import itertools
import json
import math
import os
import statistics
import sys
import time

with open("/proc/cpuinfo") as processors:  # OpenBLAS goes by the processor's name, and falls back to narrow vectors on one made after it
    if "avx512vl" in processors.read():
        os.environ["OPENBLAS_CORETYPE"] = "SKYLAKEX"
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"  # its waiting threads, left to spin, would hold the cores that PyTorch's own need
for library in glob.glob("/usr/lib/*/openblas-openmp/libopenblas.so.0"):  # best where it is: it shares PyTorch's threads
    ctypes.CDLL(library)

try:
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    sys.exit(1)

ALPHA = 16


def find_openblas():
    """The OpenBLAS in this process, if there is one: it has a number of threads of its own, which PyTorch does not set."""
    with open("/proc/self/maps") as maps:
        for path in {line.split()[-1] for line in maps if "openblas" in line}:
            library = ctypes.CDLL(path)
            if hasattr(library, "openblas_set_num_threads"):
                return library
    return None


openblas = find_openblas()


class Rng:
    """dylora::Rng, many numbers at a time."""

    def __init__(self, seed):
        self.state = np.uint64(seed)

    def uniform(self, count):
        word = np.uint64
        z = self.state + word(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=word)
        self.state = z[-1]
        z = (z ^ (z >> word(30))) * word(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> word(27))) * word(0x94D049BB133111EB)
        return ((z ^ (z >> word(31))) >> word(11)) * 2.0**-53

    def matrix(self, rows, cols, bound):
        """Column by column."""
        return self.rows(cols, rows, bound).T.contiguous()

    def rows(self, rows, cols, bound):
        return torch.from_numpy(bound * (2 * self.uniform(rows * cols) - 1)).float().view(rows, cols)

    def below(self, end, count):
        return torch.from_numpy((self.uniform(count) * end).astype(np.int64))


# y = W x + bias + s B A x in the forms that people write.
def separate(x, W, bias, A, B, scale):
    return F.linear(x, W, bias) + F.linear(F.linear(x, A), B) * scale


def scaled_early(x, W, bias, A, B, scale):
    return F.linear(x, W, bias) + F.linear(F.linear(x, A) * scale, B)


def added_in_place(x, W, bias, A, B, scale):
    return F.linear(x, W, bias).addmm_(F.linear(x, A), B.T, alpha=scale)


FORMS = separate, scaled_early, added_in_place


class LinearStep:
    """A forward and a backward of one adapted layer."""

    def __init__(self, request):
        rows, cols, tokens, self.rank = (request[key] for key in ("out", "in", "tokens", "rank"))
        rng = Rng(request["seed"])
        self.W = rng.matrix(rows, cols, 0.5)
        self.A = rng.rows(self.rank, cols, 1 / math.sqrt(cols)).requires_grad_()
        self.B = rng.matrix(rows, self.rank, 0.5).requires_grad_()
        self.x = rng.rows(tokens, cols, 0.5).requires_grad_()
        self.dy = rng.rows(tokens, rows, 0.5)

    def __call__(self, form):
        self.x.grad = self.A.grad = self.B.grad = None
        self.y = form(self.x, self.W, None, self.A, self.B, ALPHA / self.rank)
        self.y.backward(self.dy)

    def norms(self):
        results = {"y": self.y, "dx": self.x.grad, "dA": self.A.grad, "dB": self.B.grad}
        return {name: result.double().norm().item() for name, result in results.items()}


class Projection(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(len(weight)), requires_grad=False)

    def adapt(self, A, B):
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x, rank, form):
        return form(x, self.weight, self.bias, self.A[:rank], self.B[:, :rank], ALPHA / rank)


class Block(nn.Module):
    def __init__(self, width, heads, layers, rng):
        super().__init__()
        bound = 0.02 * math.sqrt(3)
        into_residual = bound / math.sqrt(2 * layers)
        self.heads = heads
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(width).requires_grad_(False) for _ in range(2))
        self.q, self.k, self.v = (Projection(rng.matrix(width, width, bound)) for _ in range(3))
        self.o = Projection(rng.matrix(width, width, into_residual))
        self.fc = Projection(rng.matrix(4 * width, width, bound))
        self.proj = Projection(rng.matrix(width, 4 * width, into_residual))

    def forward(self, x, mask, rank, form):
        x = x + self.attend(self.attention_norm(x), mask, rank, form)
        hidden = F.gelu(self.fc(self.mlp_norm(x), rank, form), approximate="tanh")
        return x + self.proj(hidden, rank, form)

    def attend(self, x, mask, rank, form):
        context, head_dim = len(mask), x.shape[1] // self.heads

        def split(y):
            return y.view(-1, context, self.heads, head_dim).transpose(1, 2).reshape(-1, context, head_dim)

        q, k, v = (split(projection(x, rank, form)) for projection in (self.q, self.k, self.v))
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=head_dim**-0.5)
        y = torch.bmm(scores.softmax(-1), v)
        return self.o(y.view(-1, self.heads, context, head_dim).transpose(1, 2).reshape(x.shape), rank, form)


class Gpt(nn.Module):
    """examples/gpt with adapters on all projections; B is drawn, too, since A has no gradient while B is zero."""

    def __init__(self, request, rng):
        super().__init__()
        vocabulary, context, width, layers, heads, max_rank = (
            request[key] for key in ("vocabulary", "context", "width", "layers", "heads", "max_rank"))
        bound = 0.02 * math.sqrt(3)
        self.token_embedding = nn.Parameter(rng.rows(vocabulary, width, bound), requires_grad=False)
        self.position_embedding = nn.Parameter(rng.rows(context, width, bound), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, layers, rng) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width).requires_grad_(False)
        self.register_buffer("mask", torch.full((context, context), -math.inf).triu(1))
        projections = [module for module in self.modules() if isinstance(module, Projection)]
        A = [rng.rows(max_rank, p.weight.shape[1], 1 / math.sqrt(p.weight.shape[1])) for p in projections]
        B = [rng.matrix(len(p.weight), max_rank, bound) for p in projections]
        for factors in zip(projections, A, B):
            Projection.adapt(*factors)

    def forward(self, tokens, rank, form):
        x = (self.token_embedding[tokens] + self.position_embedding).flatten(0, 1)
        for block in self.blocks:
            x = block(x, self.mask, rank, form)
        return F.linear(self.final_norm(x), self.token_embedding)


class GptStep:
    """A training step on one batch: forward, loss, backward, clipping, AdamW on the adapters."""

    def __init__(self, request):
        rng = Rng(request["seed"])
        self.max_rank = request["max_rank"]
        self.model = Gpt(request, rng)
        shape = request["windows"], request["context"]
        self.tokens = rng.below(request["vocabulary"], math.prod(shape)).view(shape)
        self.targets = rng.below(request["vocabulary"], math.prod(shape))
        self.adapters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.adapters, lr=1e-3, weight_decay=0, foreach=True)

    def __call__(self, form, rank=None):
        rank = rank or self.max_rank
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(self.tokens, rank, form), self.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.adapters, 1)
        self.optimizer.step()
        return loss.item()


class Way:
    """A form, a number of threads for PyTorch, and one for OpenBLAS if it counts its own."""

    def __init__(self, form, threads, blas_threads):
        self.form, self.threads, self.blas_threads = form, threads, blas_threads

    def use_threads(self):
        torch.set_num_threads(self.threads)
        if openblas:
            openblas.openblas_set_num_threads(self.blas_threads)

    def __str__(self):
        blas = f", {self.blas_threads} in OpenBLAS" if openblas else ""
        return f"{self.form.__name__}, threads: {self.threads}{blas}"


class Task:
    def __init__(self, Step, request, forms):
        step = Step(request)
        counts = sorted({1, request["threads"]})
        ways = [Way(form, *threads) for form in forms for threads in itertools.product(counts, counts if openblas else [1])]
        self.way = min(ways, key=lambda way: self.seconds(way, lambda: step(way.form)))
        self.step = Step(request)  # as new
        self.calls = None  # of a round

    @staticmethod
    def seconds(way, call):
        """Of the median call: neither a disturbance nor a stroke of luck may decide."""
        way.use_threads()
        call()
        return statistics.median(elapsed(call) for _ in range(5))


def elapsed(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def resident(key):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(key))


tasks = []


def set_up(task):
    tasks.append(task)
    return {"id": len(tasks) - 1, "how": str(task.way)}


def linear(request):
    task = Task(LinearStep, request, FORMS)
    task.way.use_threads()
    task.step(task.way.form)
    return {**set_up(task), "norms": task.step.norms()}


def repeat(request):
    """The seconds of one call of a task that is warm: a quarter of the calls go before, uncounted."""
    task = tasks[request["id"]]
    task.way.use_threads()

    def run(calls):
        return elapsed(lambda: [task.step(task.way.form) for _ in range(calls)])

    if task.calls is None:
        run(2)
        task.calls = max(1, round(request["seconds"] / run(1)))
    run(task.calls // 4)
    return {"seconds": run(task.calls) / task.calls}


def gpt(request):
    return set_up(Task(GptStep, request, FORMS))


def train(request):
    task = tasks[request["id"]]
    task.way.use_threads()
    begin = time.perf_counter()
    losses = [task.step(task.way.form, rank) for rank in request["ranks"]]
    return {"seconds": (time.perf_counter() - begin) / len(losses), "losses": losses}


def memory(request):
    """The growth of the peak while a model is made and trained. A tiny one comes first, so that code read from disk does not count."""
    Way(added_in_place, request["threads"], request["threads"]).use_threads()

    def run(settings):
        step = GptStep(settings)
        for _ in range(3):
            step(added_in_place, settings["max_rank"])

    run({**request, "width": 8 * request["heads"], "layers": 1, "windows": 2})
    with open("/proc/self/clear_refs", "w") as forget_peak:
        forget_peak.write("5")
    before = resident("VmRSS")
    run(request)
    return {"bytes": resident("VmHWM") - before}


torch.set_flush_denormal(True)
handlers = {handler.__name__: handler for handler in (linear, repeat, gpt, train, memory)}
print(json.dumps({"version": torch.__version__}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps(handlers[request["do"]](request)), flush=True)
