"""W8A8 in the words of compressed-tensors: the `quantization_config` of a config.json."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qnext.errors import ConfigError

# What of a scheme must hold for the mathematics to be ours, in the words of compressed-tensors.
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
WEIGHTS = INT8 | {"strategy": "channel", "dynamic": False}
ACTIVATIONS = INT8 | {"strategy": "token", "dynamic": True}
# and what is meant where nothing is said
DEFAULTS = INT8 | {"strategy": "tensor", "dynamic": False}
FORMAT = "int-quantized"
FURTHER = ("kv_cache_scheme", "sparsity_config", "transform_config")


def quantization_config(kept: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a W8A8 checkpoint in which the tensors `kept` are not int8.

    Its `ignore` lists every module with such a weight, norms apart: embeddings and convolutions are
    no linears, but tools that know names only would take them for ones.
    """
    weights = [name for name in kept if name.endswith((".weight", "_proj"))]
    modules = {name.removesuffix(".weight") for name in weights}
    group = {
        "targets": ["Linear"],
        "weights": WEIGHTS | {"observer": "minmax"},
        "input_activations": ACTIVATIONS,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(module for module in modules if not module.endswith("norm")),
        "kv_cache_scheme": None,
    }


def check_quantization_config(config: object) -> None:
    """Raise ConfigError unless this `quantization_config` is one that qnext computes."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"quantization_config must be an object, got {config!r}")
    wrong = []
    wanted = {"quant_method": "compressed-tensors", "format": FORMAT}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            wrong.append(f"{key} = {config[key]!r}, not {value!r}")
    # each of these changes what is computed; empty, they say that they do not
    wrong += [f"{key} = {config[key]!r}" for key in FURTHER if config.get(key)]
    wrong += _wrong_ignore(config.get("ignore"))
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        wrong.append("config_groups is missing")
        groups = {}
    for name, group in groups.items():
        wrong += _wrong_group(name, group)
    if wrong:
        raise ConfigError(
            "quantization_config is not W8A8 as qnext computes it (int8 weights by channel, int8 "
            "activations by token, symmetric): " + "; ".join(wrong)
        )


def _wrong_ignore(ignore: object) -> Iterator[str]:
    if ignore is None:
        return
    if not isinstance(ignore, list) or not all(isinstance(entry, str) for entry in ignore):
        yield f"ignore = {ignore!r}, not a list of names"
        return
    for entry in ignore:
        try:
            re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
        except re.error as error:
            yield f"ignore has {entry!r}, no regular expression ({error})"


def _wrong_group(name: str, group: object) -> Iterator[str]:
    if not isinstance(group, Mapping):
        yield f"{name} is {group!r}"
        return
    if group.get("output_activations"):
        yield f"{name}.output_activations is given"
    for part, wanted in (("weights", WEIGHTS), ("input_activations", ACTIVATIONS)):
        given = group.get(part)
        if not isinstance(given, Mapping):
            yield f"{name}.{part} is {given!r}"
            continue
        for key, value in wanted.items():
            if (have := given.get(key, DEFAULTS[key])) != value:
                yield f"{name}.{part}.{key} = {have!r}, not {value!r}"
