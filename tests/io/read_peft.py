"""Reads what write_peft_case wrote, as PEFT does and without anything of dylora's: python3 read_peft.py FOLDER

For each adapter, base + lora_alpha / r * B @ A has to be the merged weight beside it. And Python's own regular expressions have to agree
about every pattern.
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


def check_adapter(folder):
    """The number of modules that have an adapter."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    metadata, tensors = read_safetensors(folder / "adapter_model.safetensors")
    _, expected = read_safetensors(folder / "expected.safetensors")
    require(set(config) == CONFIG_FIELDS, f"{folder}: the config has other fields: {sorted(set(config) ^ CONFIG_FIELDS)}")
    require(config["peft_type"] == "LORA" and config["use_rslora"] is False and config["use_dora"] is False, f"{folder}: not a plain LoRA")
    require(metadata["format"] == "pt", f"{folder}: the format is not pt")
    baked = folder.name.endswith("_baked")

    adapted = []
    for module in sorted({name.rpartition(".")[0] for name in expected}):
        base, merged = expected[module + ".base"], expected[module + ".merged"]
        A = tensors.pop(f"base_model.model.{module}.lora_A.weight", None)
        B = tensors.pop(f"base_model.model.{module}.lora_B.weight", None)
        require((A is None) == (B is None), f"{folder}: {module} has only one factor")
        if A is None:
            require(numpy.array_equal(base, merged), f"{folder}: {module} has no adapter, but should")
            continue
        adapted.append(module)
        rank = pattern_value(config["rank_pattern"], module, config["r"])
        alpha = pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
        require(A.shape == (rank, base.shape[1]) and B.shape == (base.shape[0], rank), f"{folder}: {module}: shapes {A.shape}, {B.shape}")
        require(not baked or alpha == rank, f"{folder}: {module}: the scale is baked, but lora_alpha is {alpha} and r is {rank}")
        gap = numpy.abs(base + alpha / rank * (B @ A) - merged).max() / numpy.abs(merged).max()
        require(gap < 1e-6, f"{folder}: {module}: off by {gap}")
        require(not numpy.array_equal(base, merged), f"{folder}: {module}: the adapter does nothing")
    require(not tensors, f"{folder}: tensors of no module: {sorted(tensors)}")
    require(config["target_modules"] == adapted, f"{folder}: target_modules are {config['target_modules']}, but {adapted} have tensors")
    return len(adapted)


def main():
    root = pathlib.Path(sys.argv[1])
    counts = [check_adapter(folder) for folder in sorted(root.iterdir()) if folder.is_dir()]
    require(len(counts) == 84, f"{root}: expected 84 adapters, got {len(counts)}")
    verdicts = json.loads((root / "patterns.json").read_text("utf-8"))
    for key, path, verdict in verdicts:
        require(matches(key, path) == verdict, f"pattern {key!r} on {path!r}: Python says {not verdict}")
    both = {verdict for _, _, verdict in verdicts}
    require(both == {False, True}, "the patterns match everything or nothing")
    print(f"{len(counts)} adapters of {sum(counts)} modules, {len(verdicts)} patterns: as expected")


main()
