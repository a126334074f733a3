"""A reader of GGUF adapters that shares nothing with the library's: struct and numpy alone.

    gguf_reader.py FILE                        what is in it
    gguf_reader.py ADAPTER BASE MERGED         fails unless W + (alpha / r) B A is the merged weight, for every tensor of BASE

The files to compare are written by: test_gguf_adapter "[.gguf_reader]"
"""

import struct
import sys

import numpy as np

VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
DTYPES = {0: "<f4", 1: "<f2", 28: "<f8"}


def require(condition, message):
    if not condition:
        sys.exit(f"gguf_reader.py: {message}")


class Gguf:
    def __init__(self, path):
        with open(path, "rb") as file:
            self.bytes = file.read()
        self.at = 0
        require(self.take(4) == b"GGUF", f"{path}: it does not begin with GGUF")
        version, tensors, entries = self.number("I"), self.number("Q"), self.number("Q")
        require(version in (2, 3), f"{path}: version {version}")
        self.metadata = {}
        for _ in range(entries):
            key = self.string()
            self.metadata[key] = self.value(self.number("I"))
        headers = [self.header() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        data = -(-self.at // alignment) * alignment
        self.tensors = {name: self.elements(shape, kind, data + offset) for name, shape, kind, offset in headers}
        end = max([data + offset + self.tensors[name].nbytes for name, _, _, offset in headers], default=self.at)
        if headers:
            whole = len(self.bytes) == -(-end // alignment) * alignment
            require(whole, f"{path}: the last tensor is to be padded, and nothing to follow")

    def take(self, size):
        self.at += size
        require(self.at <= len(self.bytes), "the file is cut short")
        return self.bytes[self.at - size : self.at]

    def number(self, code):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self):
        return self.take(self.number("Q")).decode()

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            kind = self.number("I")
            return [self.value(kind) for _ in range(self.number("Q"))]
        return self.number(VALUES[kind])

    def header(self):
        name = self.string()
        ne = [self.number("Q") for _ in range(self.number("I"))]
        return name, ne[::-1], self.number("I"), self.number("Q")

    def elements(self, shape, kind, at):
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self.bytes, DTYPES[kind], count, at).reshape(shape)


def delta(adapter, name):
    """What llama.cpp adds to the tensor: its scale is alpha / r in float, or 1 without an alpha."""
    if name + ".lora_a" not in adapter.tensors:
        return 0, 0.0, 0.0
    a, b = adapter.tensors[name + ".lora_a"], adapter.tensors[name + ".lora_b"]
    rank = a.shape[0]
    alpha = np.float32(adapter.metadata.get("adapter.lora.alpha", 0))
    scale = alpha / np.float32(rank) if alpha != 0 else np.float32(1)
    return rank, scale, np.float64(scale) * (b.astype(np.float64) @ a.astype(np.float64))


def main(paths):
    adapter = Gguf(paths[0])
    for key, value in adapter.metadata.items():
        print(f"{key} = {value}")
    if len(paths) == 1:
        for name, tensor in adapter.tensors.items():
            print(f"{name}: {tensor.dtype} {tensor.shape}")
        return 0
    base, merged = Gguf(paths[1]), Gguf(paths[2])
    require(base.tensors and base.tensors.keys() == merged.tensors.keys(), "the base and the merged weights have other tensors")
    adapted = {name.rsplit(".lora_", 1)[0] for name in adapter.tensors}
    require(adapted and adapted <= base.tensors.keys(), "the adapter is for no tensor of the base, or for others")
    for name, weight in base.tensors.items():
        rank, scale, change = delta(adapter, name)
        gap = np.abs(weight + change - merged.tensors[name]).max()
        moved = np.abs(merged.tensors[name] - weight).max()
        print(f"{name}: rank {rank}, scale {scale:.6g}, largest change {moved:.3g}, gap {gap:.2g}")
        require(gap < 1e-6, f"{name}: the weight with the adapter is not the merged one")  # a NaN is not, either
        require(moved > 0 or rank == 0, f"{name}: the adapter changes nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
