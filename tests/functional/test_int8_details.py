"""Small print of W8A8: what was once wrong, and must not be again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.functional import ops
from qnext.functional.ops.quant import RECIPROCAL, TIMES
from qnext.functional.quantize import KEPT, PUBLIC_CONVERTER, kept_paths, quantize
from qnext.functional.scheme import quantization_config
from qnext.functional.tree import leaves_with_paths
from tests.samples import BASE
from tests.sequences import model
from tests.stored import read


def equal(one: qn.Params, other: qn.Params) -> bool:
    mine, theirs = dict(leaves_with_paths(one)), dict(leaves_with_paths(other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_times_divides_once() -> None:
    """torch computes a number / tensor as number * (1 / tensor): 22 % of scales were other ones."""
    x = torch.randn(500, 7)
    _, scale = ops.quantize_tokens(x=x, rounding=TIMES)
    inverse = torch.full((500,), 127.0) / x.abs().amax(-1)
    assert torch.equal(scale, 1 / inverse)


@pytest.mark.parametrize("rounding", [TIMES, RECIPROCAL])
def test_the_tiniest_token_does_not_overflow(rounding: str) -> None:
    x = torch.tensor([[3e-38, 0.0, -1e-38], [0.0, 0.0, 0.0]])
    q, scale = ops.quantize_tokens(x=x, rounding=rounding)
    assert int(q[0, 1]) == 0 and int(q[0, 0]) > 0 > int(q[0, 2]) and scale.isfinite().all()
    assert not q[1].any() and float(scale[1]) == 0
    assert (q[0] * scale[0] - x[0]).abs().max() <= scale[0]


def test_a_dense_layer_may_have_half_its_matrices_in_int8(tmp_path: Path) -> None:
    """Only experts are one primitive; `load` refused what `save` had written."""
    listed = ["lm_head", r"re:.*\.mlp\.down_proj"]
    params = quantize(model(num_experts=0, mlp_only_layers=[]), ignore=listed)
    qn.save(params, tmp_path)
    assert equal(qn.load(tmp_path), params)


def test_saving_over_a_modelslim_checkpoint_removes_its_description(tmp_path: Path) -> None:
    params = model()
    (tmp_path / "quant_model_description.json").write_text('{"model.x.weight": "W8A8_DYNAMIC"}')
    qn.save(params, tmp_path)
    assert equal(qn.load(tmp_path), params)


def test_int8_and_its_scales_are_in_one_shard(tmp_path: Path) -> None:
    """Others read a shard at a time."""
    qn.save(quantize(model(mtp_num_hidden_layers=1)), tmp_path, max_shard_bytes=9_000)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    scales = [name for name in where if name.endswith("_scale")]
    assert len(set(where.values())) > 5 and scales
    assert all(where[name] == where[name.removesuffix("_scale")] for name in scales)


def test_every_choice_is_one_for_every_model() -> None:
    """The public converter's names mtp.fc, which most models have not."""
    quantize(model(), ignore=PUBLIC_CONVERTER)
    quantize(model(tie_word_embeddings=True), ignore=KEPT)


def test_a_list_may_name_fused_and_split_parts_both() -> None:
    both = [r"re:.*in_proj_ba$", r"re:.*in_proj_(b|a)$"]
    assert any("gate_proj" in path for path in kept_paths(model().config, both))


def test_what_a_checkpoint_ignores_can_be_ignored_again(tmp_path: Path) -> None:
    """Its list names embeddings and convolutions as well, which are no matrices to quantise."""
    params = quantize(model(mtp_num_hidden_layers=1))
    qn.save(params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    listed = config["quantization_config"]["ignore"]
    assert "model.embed_tokens" in listed and equal(
        quantize(model(mtp_num_hidden_layers=1), ignore=listed), params
    )


def scheme(**changes: Any) -> dict[str, Any]:
    return BASE | {"quantization_config": quantization_config(["lm_head.weight"]) | changes}


PART = {"num_bits": 8}  # per tensor and static, in the words of compressed-tensors
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "said nothing": (
        {"config_groups": {"g": {"weights": PART, "input_activations": PART}}},
        r"g\.weights\.strategy = 'tensor', not 'channel'.*dynamic = False, not True",
    ),
    "transform": ({"transform_config": {"u": {}}}, r"transform_config = \{'u'"),
    "sparsity": ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config = "),
    "ignore of numbers": ({"ignore": [3]}, r"ignore = \[3\], not a list of names"),
    "ignore a string": ({"ignore": "lm_head"}, "ignore = 'lm_head', not a list"),
    "ignore no pattern": ({"ignore": ["re:("]}, r"ignore has 're:\(', no regular expression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheme_of_other_mathematics_is_refused(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(qn.ConfigError, match=message):
        qn.Config.from_hf(scheme(**changes))


def test_empty_further_parts_say_nothing() -> None:
    qn.Config.from_hf(scheme(transform_config={}, sparsity_config=None, ignore=None))


def test_half_a_matrix_is_told_once(tmp_path: Path) -> None:
    """Not that its float half lacks a scale."""
    from safetensors.torch import save_file

    qn.save(quantize(model()), tmp_path)
    tensors = read(tmp_path)
    name = next(n for n in tensors if n.endswith("k_proj.weight"))
    tensors[name] = tensors[name].float()
    del tensors[f"{name}_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(qn.CheckpointError, match=r"half quantised: .*q_proj") as error:
        qn.load(tmp_path)
    assert "without scale" not in str(error.value)
