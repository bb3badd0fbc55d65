"""What W8A8 costs the demo: answers, perplexity, guesses that hold, and the error layer by layer.

`python -m studies.quantization` writes docs/images/quantization.png and its part of
studies/results.json. Everything runs the reference, in float32, on the demo's unseen problems.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding
from tqdm import tqdm

import qnext as qn
from qnext.embedded import PROBLEMS
from qnext.evaluate import evaluate, read_problems, shown
from qnext.functional import ops
from qnext.functional.blocks import layer, locate, unembed
from qnext.functional.params import Params, matrices
from qnext.functional.quantize import (
    KEPT,
    PUBLIC_CONVERTER,
    dequantize,
    kept_paths,
    quantize,
    quantize_rows,
)
from qnext.functional.tree import map_with_paths
from studies.inputs import IMAGES, RESULTS, record, relative_rms

FLOAT = "float32"
SEQ = 256  # tokens a row of text


def weights_only(params: Params) -> Params:
    """The default choice's weights in int8, activations in float32: what weights alone cost."""
    chosen = {path for path, _ in matrices(params)} - kept_paths(params.config)
    return map_with_paths(
        lambda path, leaf: dequantize(quantize_rows(leaf)) if path in chosen else leaf, params
    )


def bfloat16_weights(params: Params) -> Params:
    """Weights rounded to bfloat16 and computed with in float32: the checkpoint's own error."""
    return map_with_paths(lambda path, leaf: leaf.bfloat16().to(leaf.dtype), params)


def ways() -> dict[str, Params]:
    """The demo, and what is compared with it."""
    params = qn.demo(torch.float32)
    gates = [entry for entry in KEPT if "in_proj" not in entry]
    return {
        FLOAT: params,
        "bfloat16 weights": bfloat16_weights(params),
        "int8 weights only": weights_only(params),
        "W8A8, default": quantize(params),
        "W8A8, gates too": quantize(params, ignore=gates),
        "W8A8, public converter's choice": quantize(params, ignore=PUBLIC_CONVERTER),
        "W8A8, everything": quantize(params, ignore=()),
    }


def text(rows: int) -> Tensor:
    """Solved problems that the demo has not seen, as rows of tokens."""
    problems = "\n\n".join(shown(problem) for problem in read_problems(PROBLEMS))
    tokens = torch.tensor(qn.tokenizer().encode(problems))
    return tokens[: tokens.numel() // SEQ * SEQ].view(-1, SEQ)[:rows]


def perplexity(params: Params, tokens: Tensor) -> float:
    """exp of the mean cross-entropy of each token given those before it in its row."""
    state = qn.init_state(params.config, *tokens.shape)
    with torch.no_grad():
        logits, _ = qn.forward(params, state, tokens)
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp())


def streams(params: Params, tokens: Tensor) -> Iterator[Tensor]:
    """The residual stream after each layer, then the logits."""
    config = params.config
    state = qn.init_state(config, *tokens.shape)
    step = locate(config, state, state.lengths, torch.ones_like(tokens, dtype=torch.bool))
    x = embedding(tokens, params.embed)
    for p, past in zip(params.layers, state.layers, strict=True):
        x, _ = layer(p, past, x, step, config)
        yield x
    yield unembed(params, ops.rms_norm(x=x, weight=params.norm, eps=config.rms_norm_eps))


def errors(exact: Params, params: Params, tokens: Tensor) -> list[float]:
    """Relative RMS error of the stream after each layer, and of the logits."""
    with torch.no_grad():
        pairs = zip(streams(exact, tokens), streams(params, tokens), strict=True)
        return [relative_rms(got, want) for want, got in pairs]


def answers(params: Params, problems: int | None) -> dict[str, Any]:
    """Exact match at 5 shots, and how often one guess of the MTP module holds."""
    report = evaluate(
        params, qn.tokenizer(), read_problems(PROBLEMS), shots=5, limit=problems, draft=1
    )
    return {
        "accuracy": report.accuracy,
        "acceptance": report.acceptance.rates[0],
        "tokens_per_step": report.acceptance.tokens_per_step,
    }


def plot(layers: dict[str, list[float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(9, 3.4))
    for name, values in layers.items():
        panel.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
    count = len(next(iter(layers.values())))
    panel.set_xticks(range(1, count + 1), [*map(str, range(1, count)), "logits"])
    panel.set(xlabel="after layer", ylabel="relative RMS error", yscale="log", ylim=(1e-3, 1e-1))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problems", type=int, help="problems to answer (default: all)")
    parser.add_argument("--rows", type=int, default=64, help=f"rows of {SEQ} tokens of text")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where figures go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where numbers go")
    options = parser.parse_args()
    models, tokens = ways(), text(options.rows)
    exact = models[FLOAT]
    values: dict[str, Any] = {}
    for name, params in tqdm(models.items(), desc="quantization", unit="model"):
        values[name] = {
            "perplexity": perplexity(params, tokens),
            "errors": errors(exact, params, tokens[:8]),
            **answers(params, options.problems),
        }
    options.images.mkdir(parents=True, exist_ok=True)
    layers = {name: value["errors"] for name, value in values.items() if name != FLOAT}
    plot(layers, options.images / "quantization.png")
    record("quantization", {"tokens": tokens.numel(), "ways": values}, options.results)
    for name, value in values.items():
        ratio = value["perplexity"] / values[FLOAT]["perplexity"]
        print(
            f"{name:32} accuracy {value['accuracy']:.3f}  perplexity {value['perplexity']:.4f} "
            f"({ratio:.4f})  acceptance {value['acceptance']:.3f}  logits {value['errors'][-1]:.4f}"
        )


if __name__ == "__main__":
    main()
