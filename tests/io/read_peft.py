"""Reads what write_peft_case wrote, as PEFT does and without anything of dylora's: python3 read_peft.py FOLDER

For each adapter, base + lora_alpha / r * B @ A has to be the merged weight beside it: under use_dora, with its rows scaled to the length
that the magnitude says; for a convolution, with B @ A of each group's share of the components. And Python's own regular expressions have
to agree about every pattern.
"""

import json
import pathlib
import re
import struct
import sys

import numpy

DTYPES = {"F32": "<f4", "F64": "<f8"}
CONFIG_FIELDS = {
    "alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


def require(condition, what):
    if not condition:
        sys.exit(f"read_peft.py: {what}")


def read_safetensors(path):
    """The metadata, and the tensors by name."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    require((8 + length) % 8 == 0, f"{path}: the data are not aligned")
    header = json.loads(data[8 : 8 + length].decode("utf-8"))
    metadata = header.pop("__metadata__")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        require(entry["data_offsets"][0] == end, f"{path}: {name} does not begin where the tensor before it ends")
        end = entry["data_offsets"][1]
        values = numpy.frombuffer(data[8 + length + entry["data_offsets"][0] : 8 + length + end], DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"]).astype(numpy.float64)
    require(8 + length + end == len(data), f"{path}: there are bytes that belong to no tensor")
    return metadata, tensors


def matches(key, path):
    return re.match(rf"(.*\.)?({key})$", path) is not None


def pattern_value(pattern, path, default):
    """What the first key that matches says."""
    return next((value for key, value in pattern.items() if matches(key, path)), default)


def convolution_delta(A, B, base):
    """B after A as a weight of the convolution, out x (channels of a group * kernel): A reads all channels, B is grouped."""
    groups = A.shape[0] // B.shape[1]
    outs, channels, components = B.shape[0] // groups, A.shape[1] // groups, B.shape[1]
    delta = numpy.zeros((B.shape[0], channels, *A.shape[2:]))
    for o in range(B.shape[0]):
        group = o // outs
        for k in range(components):
            row = B[o, k, 0, 0] * A[group * components + k]
            own = slice(group * channels, (group + 1) * channels)
            delta[o] += row[own]
            require(numpy.count_nonzero(numpy.delete(row, range(own.start, own.stop), axis=0)) == 0, "a group reads another's channels")
    return delta.reshape(base.shape)


def check_adapter(folder):
    """The number of modules that have an adapter."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    metadata, tensors = read_safetensors(folder / "adapter_model.safetensors")
    _, expected = read_safetensors(folder / "expected.safetensors")
    require(set(config) == CONFIG_FIELDS, f"{folder}: the config has other fields: {sorted(set(config) ^ CONFIG_FIELDS)}")
    require(config["peft_type"] == "LORA" and config["use_rslora"] is False, f"{folder}: not a plain LoRA")
    require(config["use_dora"] is ("dora" in folder.name), f"{folder}: use_dora is {config['use_dora']}")
    require(metadata["format"] == "pt", f"{folder}: the format is not pt")
    baked = folder.name.endswith("_baked")

    adapted = []
    for module in sorted({name.rpartition(".")[0] for name in expected}):
        base, merged = expected[module + ".base"], expected[module + ".merged"]
        embedding = module.endswith("wte")
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        A, B = (tensors.pop(f"base_model.model.{module}.{name}", None) for name in names)
        magnitude = tensors.pop(f"base_model.model.{module}.lora_magnitude_vector", None)
        require((A is None) == (B is None), f"{folder}: {module} has only one factor")
        if A is None:
            require(numpy.array_equal(base, merged), f"{folder}: {module} has no adapter, but should")
            continue
        adapted.append(module)
        rank = pattern_value(config["rank_pattern"], module, config["r"])
        alpha = pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
        convolution = module.endswith(("conv", "grouped"))
        require(A.ndim == B.ndim == (4 if convolution else 2), f"{folder}: {module}: factors of {A.ndim} and {B.ndim} dimensions")
        if not convolution:
            fit = A.shape == (rank, base.shape[1]) and B.shape == (base.shape[0], rank)
        else:
            fit = A.shape[0] == rank and B.shape[0] == base.shape[0] and rank % B.shape[1] == 0
        require(fit, f"{folder}: {module}: shapes {A.shape}, {B.shape}")
        require((magnitude is not None) == config["use_dora"], f"{folder}: {module}: a magnitude without use_dora, or none with it")
        require(not baked or alpha == rank, f"{folder}: {module}: the scale is baked, but lora_alpha is {alpha} and r is {rank}")
        weight = base + alpha / rank * (convolution_delta(A, B, base) if convolution else B @ A)
        if magnitude is not None:
            weight *= (magnitude / numpy.linalg.norm(weight, axis=1))[:, None]
        gap = numpy.abs(weight - merged).max() / numpy.abs(merged).max()
        require(gap < 1e-6, f"{folder}: {module}: off by {gap}")
        require(not numpy.array_equal(base, merged), f"{folder}: {module}: the adapter does nothing")
    require(not tensors, f"{folder}: tensors of no module: {sorted(tensors)}")
    require(config["target_modules"] == adapted, f"{folder}: target_modules are {config['target_modules']}, but {adapted} have tensors")
    return len(adapted)


def main():
    root = pathlib.Path(sys.argv[1])
    counts = [check_adapter(folder) for folder in sorted(root.iterdir()) if folder.is_dir()]
    require(len(counts) == 104, f"{root}: expected 104 adapters, got {len(counts)}")
    verdicts = json.loads((root / "patterns.json").read_text("utf-8"))
    for key, path, verdict in verdicts:
        require(matches(key, path) == verdict, f"pattern {key!r} on {path!r}: Python says {not verdict}")
    both = {verdict for _, _, verdict in verdicts}
    require(both == {False, True}, "the patterns match everything or nothing")
    print(f"{len(counts)} adapters of {sum(counts)} modules, {len(verdicts)} patterns: as expected")


main()
