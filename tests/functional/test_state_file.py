"""States in files: bit for bit, of this model only, and never half-written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import qnext as qn
from qnext.functional.checkpoint import states
from qnext.functional.tree import leaves_with_paths, map_leaves
from tests.samples import spec

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def params() -> qn.Params:
    """An odd model with every part that has a state, and an MTP module."""
    values = {"num_hidden_layers": 3, "full_attention_interval": 2, "mtp_num_hidden_layers": 1}
    return qn.init_params(qn.Config.from_hf(spec("base") | values))


def used(params: qn.Params, **options: Any) -> qn.State:
    """A state of three rows that has consumed 9, 4 and 0 tokens."""
    state = qn.init_state(params.config, 3, 140, **options)
    tokens = torch.randint(0, 211, (3, 9))
    lengths = torch.tensor([9, 4, 0])
    _, state = qn.forward(params, state, tokens, lengths)
    if options.get("draft"):  # the module has followed
        return state
    hidden = torch.randn(3, 9, params.config.hidden_size)
    return qn.mtp(params, state, hidden, tokens, (lengths - 1).clamp(min=0))[2]


def assert_same(got: qn.State, want: qn.State) -> None:
    for (path, a), (_, b) in zip(leaves_with_paths(got), leaves_with_paths(want), strict=True):
        assert a.dtype == b.dtype and a.equal(b), path


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16 keys and values": {"dtype": torch.bfloat16},
    "draft 2": {"draft": 2},
    "bfloat16 and draft 3": {"dtype": torch.bfloat16, "draft": 3},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_state_comes_back_bit_for_bit(params: qn.Params, tmp_path: Path, case: str) -> None:
    state, options = used(params, **OPTIONS[case]), OPTIONS[case]
    assert state.layers[1].key.dtype == options.get("dtype", torch.float32)
    assert state.slots.shape == (3, 1 + options.get("draft", 0))
    assert state.lengths.tolist() == [9, 4, 0] and state.mtp_lengths.tolist() == [8, 3, 0]
    file = tmp_path / "state.safetensors"
    qn.save_state(params, state, file)
    assert_same(qn.load_state(params, file), state)
    assert_same(qn.load_state(params, str(file)), state)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("case", OPTIONS)
def test_continuing_after_load_is_continuing(params: qn.Params, tmp_path: Path, case: str) -> None:
    state, more = used(params, **OPTIONS[case]), torch.randint(0, 211, (3, 7))
    qn.save_state(params, state, tmp_path / "s")
    loaded = qn.load_state(params, tmp_path / "s")
    want, want_state = qn.generate(params, state, more, 5)
    got, got_state = qn.generate(params, loaded, more, 5)
    assert got.equal(want)
    assert_same(got_state, want_state)
    assert qn.forward(params, loaded, more)[0].equal(qn.forward(params, state, more)[0])


def test_saving_and_continuing_leave_the_state_alone(params: qn.Params, tmp_path: Path) -> None:
    state = used(params)
    copy = map_leaves(torch.clone, state)
    qn.save_state(params, state, tmp_path / "s")
    qn.decode(params, qn.load_state(params, tmp_path / "s"), torch.tensor([1, 2, 3]))
    assert_same(state, copy)


def test_loaded_state_owns_its_memory(params: qn.Params, tmp_path: Path) -> None:
    state, file = used(params), tmp_path / "s"
    qn.save_state(params, state, file)
    loaded = qn.load_state(params, file)
    with file.open("r+b") as stream:  # in place: a mapped file would show it
        stream.write(b"\xff" * file.stat().st_size)
    file.unlink()
    assert_same(loaded, state)


def test_header_tells_model_and_position(params: qn.Params, tmp_path: Path) -> None:
    qn.save_state(params, used(params), tmp_path / "s")
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.metadata() == {
            "format": "qnext-state-1",
            "model": params.config.fingerprint,
            "position": "[9, 4, 0]",
        }


def test_precision_of_the_params_may_differ(params: qn.Params, tmp_path: Path) -> None:
    state = used(params)
    qn.save_state(params, state, tmp_path / "s")
    config = params.config.with_precision(compute=torch.bfloat16)
    assert_same(qn.load_state(qn.init_params(config), tmp_path / "s"), state)


# --- refusals --------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "no mtp": {"mtp_num_hidden_layers": None},
    "another eps": {"rms_norm_eps": 1e-5},
    "another theta": {"rope_theta": 1e6},
    "more layers": {"num_hidden_layers": 4},
}


@pytest.mark.parametrize("case", OTHERS)
def test_state_of_another_model(params: qn.Params, tmp_path: Path, case: str) -> None:
    qn.save_state(params, used(params), tmp_path / "s")
    other = qn.init_params(qn.Config.from_hf(params.config.to_hf() | flat(OTHERS[case])))
    with pytest.raises(qn.CheckpointError) as error:
        qn.load_state(other, tmp_path / "s")
    for word in ("state of another model", params.config.fingerprint, other.config.fingerprint):
        assert word in str(error.value)


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with rope and layers to be read from the flat keys."""
    return {"rope_parameters": None, "layer_types": None, "full_attention_interval": 2} | values


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "in the header": lambda raw: raw[:200],
    "in the data": lambda raw: raw[: len(raw) // 2],
    "last byte": lambda raw: raw[:-1],
    "garbage": lambda raw: b"\x80" * 300,
}


@pytest.mark.parametrize("cut", CUTS)
def test_truncated_file(params: qn.Params, tmp_path: Path, cut: str) -> None:
    qn.save_state(params, used(params), tmp_path / "s")
    (tmp_path / "s").write_bytes(CUTS[cut]((tmp_path / "s").read_bytes()))
    with pytest.raises(qn.CheckpointError, match="s is no state file: Error while deserializing"):
        qn.load_state(params, tmp_path / "s")


def test_places_that_hold_no_state(params: qn.Params, tmp_path: Path) -> None:
    with pytest.raises(qn.CheckpointError, match="missing does not exist"):
        qn.load_state(params, tmp_path / "missing")
    with pytest.raises(qn.CheckpointError, match="is no state file"):
        qn.load_state(params, tmp_path)
    qn.save(params, tmp_path)
    with pytest.raises(qn.CheckpointError, match="is no state file: save_state did not write it"):
        qn.load_state(params, tmp_path / "model.safetensors")


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, dict[str, str]], None]:
    def tamper(tensors: Tensors, metadata: dict[str, str]) -> None:
        tensors[name] = change(tensors[name])

    return tamper


def drop(tensors: Tensors, metadata: dict[str, str]) -> None:
    del tensors[".layers[0].window"]


def add(tensors: Tensors, metadata: dict[str, str]) -> None:
    tensors[".layers[3].key"] = torch.ones(1)


def anonymous(tensors: Tensors, metadata: dict[str, str]) -> None:
    del metadata["model"]


def moved(tensors: Tensors, metadata: dict[str, str]) -> None:
    metadata["position"] = "[9, 4, 1]"


TAMPERED: dict[str, tuple[Callable[[Tensors, dict[str, str]], None], str]] = {
    "lost": (drop, r"lacks or adds tensors: \['.layers\[0\].window'\]"),
    "added": (add, r"lacks or adds tensors: \['.layers\[3\].key'\]"),
    "no model": (anonymous, "another model: its config hash is None"),
    "shape": (
        put(".layers[1].key", lambda t: t[:, :, :, :-1]),
        r"state.layers\[1\].key must be \[pages=7, page=128, hkv=2, hd=24\], got \[7, 128, 2, 23\]",
    ),
    "rank": (put(".rows", lambda t: t[:, None]), r"state.rows must be \[batch=3\], got \[3, 1\]"),
    "dtype": (put(".lengths", Tensor.long), "state.lengths must be torch.int32, got torch.int64"),
    "integers": (
        put(".layers[0].recurrent", Tensor.int),
        r"state.layers\[0\].recurrent must be floating point, got torch.int32",
    ),
    "fewer rows": (put(".accepted", lambda t: t[:2]), r"state.accepted must be \[batch=3\]"),
    "fewer pages": (put(".layers[1].value", lambda t: t[:-1]), r"value must be \[pages=7"),
    "too long": (put(".lengths", lambda t: t + 200), "state.lengths must lie in 0..capacity"),
    "negative": (put(".mtp_lengths", lambda t: t - 9), "state.mtp_lengths must lie in 0..capacity"),
    "room": (put(".capacity", lambda t: t * 2), "state.capacity must lie in 0..256"),
    "page": (put(".block_table", lambda t: t + 1), "state.block_table must lie in 0..6"),
    "slot": (put(".slots", lambda t: t * 4), "state.slots must lie in 0..6"),
    "row": (put(".rows", lambda t: t + 1), r"state.rows must lie in 0..3, got \[2, 3, 4\]"),
    "accepted": (put(".accepted", lambda t: t + 2), "state.accepted must lie in 0..1"),
    "position": (moved, r"state.lengths is not the position \[9, 4, 1\]"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_file(params: qn.Params, tmp_path: Path, case: str) -> None:
    file, (tamper, message) = tmp_path / "s", TAMPERED[case]
    qn.save_state(params, used(params, draft=1), file)
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata)
    qn.load_state(params, file)  # rewritten as it was: fine
    tamper(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    with pytest.raises(qn.CheckpointError, match=message):
        qn.load_state(params, file)


def test_state_that_is_not_of_this_model_is_not_saved(params: qn.Params, tmp_path: Path) -> None:
    state = used(params)
    donated = used(params)
    donated.mtp[0].key.untyped_storage().resize_(0)
    bad = {
        r"state.layers has 2 parts, the model has 3": state._replace(layers=state.layers[:2]),
        r"state.rows must be torch.int32": state._replace(rows=state.rows.long()),
        r"state.mtp\[0\].key was donated": donated,
    }
    for message, wrong in bad.items():
        with pytest.raises(qn.InputError, match=message):
            qn.save_state(params, wrong, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_file(
    params: qn.Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, file = used(params), tmp_path / "s"
    qn.save_state(params, state, file)
    write = states.save_file

    def fail(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
        write(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "save_file", fail)
    _, later = qn.decode(params, state, torch.tensor([5, 6, 7]))
    with pytest.raises(OSError, match="No space left"):
        qn.save_state(params, later, file)
    assert list(tmp_path.iterdir()) == [file]
    assert_same(qn.load_state(params, file), state)
    monkeypatch.undo()
    qn.save_state(params, later, file)
    assert_same(qn.load_state(params, file), later)
    assert json.loads(safe_open(file, framework="pt").metadata()["position"]) == [10, 5, 1]
