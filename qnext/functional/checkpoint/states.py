"""States as files: one safetensors file with its model's fingerprint and its position."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qnext.errors import CheckpointError
from qnext.functional.checkpoint.shards import replacing
from qnext.functional.checks import check_trees, state_mismatches, table_mismatches
from qnext.functional.params import Params
from qnext.functional.state import State, init_state
from qnext.functional.tree import leaves_with_paths, rebuild

STATE_FORMAT = "qnext-state-1"


def save_state(
    params: Params, state: State, path: str | Path, tokens: Sequence[int] | None = None
) -> None:
    """Write a state as one safetensors file, with its model's fingerprint and its position.

    `tokens`, of a state of one sequence, is what it has consumed, for `state_tokens` to find.
    Raises InputError where the state is not one of this model.
    """
    check_trees(params, state)
    metadata = {
        "format": STATE_FORMAT,
        "model": params.config.fingerprint,
        "position": json.dumps(state.lengths.tolist()),
    }
    if tokens is not None:
        metadata["tokens"] = json.dumps(list(tokens))
    tensors = {name: leaf.detach().contiguous().cpu() for name, leaf in leaves_with_paths(state)}
    with replacing() as new:
        save_file(tensors, new(Path(path)), metadata)


def state_tokens(params: Params, path: str | Path) -> tuple[int, ...] | None:
    """The tokens that a state file's sequence has consumed, of its header alone.

    None where the file is no state of this model, or was saved without them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != STATE_FORMAT or "tokens" not in metadata:
            return None
        if metadata.get("model") != params.config.fingerprint:
            return None
        return tuple(json.loads(metadata["tokens"]))
    except (SafetensorError, OSError, ValueError):
        return None


def load_state(params: Params, path: str | Path, device: torch.device | str | None = None) -> State:
    """The state that `save_state` wrote, bit for bit.

    Raises CheckpointError where the file is no state, or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no state file: {error}") from error
    if metadata.get("format") != STATE_FORMAT:
        raise CheckpointError(f"{path} is no state file: save_state did not write it")
    if metadata.get("model") != params.config.fingerprint:
        raise CheckpointError(
            f"{path} is a state of another model: its config hash is {metadata.get('model')}, "
            f"this model's is {params.config.fingerprint}"
        )
    skeleton = init_state(params.config, 1, 1, device="meta")
    names = [name for name, _ in leaves_with_paths(skeleton)]
    if set(names) != set(tensors):
        raise CheckpointError(f"{path} lacks or adds tensors: {sorted(set(names) ^ set(tensors))}")
    state = rebuild(skeleton, [tensors[name] for name in names])
    wrong = state_mismatches(params, state) or table_mismatches(state)
    if not wrong and metadata.get("position") != json.dumps(state.lengths.tolist()):
        wrong = [f"state.lengths is not the position {metadata.get('position')} in its header"]
    if wrong:
        raise CheckpointError(f"{path} does not fit the model:\n  " + "\n  ".join(wrong))
    return state
