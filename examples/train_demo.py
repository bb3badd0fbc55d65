"""Train the embedded demo model: `python -m examples.train_demo`.

A small but complete Qwen3-Next (delta-net and attention layers, experts with a shared expert, an
MTP head) learns grade-school word problems in GSM8K's few-shot form, some chat, and plain stories.
The model, its two losses and their gradients are qnext's own pure functions; the optimiser is
torch's AdamW. Stop it with Ctrl-C and run it again: it resumes at the last saved step.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import qnext as qn
from examples.demo_data import Batch, batch, train_tokenizer, write_tokenizer
from qnext.functional.model import trunk, unembed
from qnext.functional.tree import leaves, leaves_with_paths, map_leaves, rebuild

VOCABULARY = 1024
ARCHITECTURE = {
    "model_type": "qwen3_next",
    "vocab_size": VOCABULARY,
    "hidden_size": 160,
    "num_hidden_layers": 6,
    "full_attention_interval": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 40,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.25,
}
MTP_WEIGHT = 0.3
WARMUP = 100  # steps


def losses(params: qn.Params, data: Batch) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of the next token (main head) and of the one after it (MTP head)."""
    tokens, weight = data
    rows, length = tokens.shape
    state = qn.init_state(params.config, rows, length)
    taken = torch.full((rows,), length - 1, dtype=torch.int32)
    hidden, state = trunk(params, state, tokens[:, :-1], taken)
    main = weighted(unembed(params, hidden), tokens[:, 1:], weight[:, 1:])
    logits, _, _ = qn.mtp(params, state, hidden[:, :-1], tokens[:, 1:-1])
    return main, weighted(logits, tokens[:, 2:], weight[:, 2:])


def weighted(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (each * weight.flatten()).sum() / weight.sum()


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: up, then a slow fall over the first half, then to zero.

    All three parts are linear; the first fall aims at zero half a run after the end.
    """
    half, aim = steps / 2, 1.5 * steps
    fall = (aim - min(step, half)) / max(aim - WARMUP, 1)
    return min((step + 1) / WARMUP, fall) * min((steps - step) / half, 1)


def optimizer(params: qn.Params, peak: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms, gates and biases alone."""
    every = leaves(params)
    groups = [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def update(
    params: qn.Params, optimiser: torch.optim.AdamW, data: Batch, share: float, peak: float
) -> tuple[float, float]:
    """One step: gradients of both losses, clipped to norm 1, and AdamW's move."""
    every = leaves(params)
    main, ahead = losses(params, data)
    for leaf, gradient in zip(
        every, torch.autograd.grad(main + MTP_WEIGHT * ahead, every), strict=True
    ):
        leaf.grad = gradient
    torch.nn.utils.clip_grad_norm_(every, 1.0)
    for group in optimiser.param_groups:
        group["lr"] = peak * share
    optimiser.step()
    return main.item(), ahead.item()


def train(args: argparse.Namespace, tokenizer: Tokenizer) -> qn.Params:
    """Run (or resume) all steps; the run directory holds resume.pt and loss.jsonl."""
    config = replace(qn.Config.from_hf(ARCHITECTURE), mtp_layers=1)
    params = map_leaves(Tensor.requires_grad_, qn.init_params(config, args.seed))
    optimiser = optimizer(params, args.rate)
    resume = args.run / "resume.pt"
    first, seconds = 0, 0.0
    if resume.exists():
        saved = torch.load(resume, weights_only=True)
        if saved["steps"] != args.steps:
            raise SystemExit(f"{args.run} is a run of {saved['steps']} steps; choose another --run")
        with torch.no_grad():
            for leaf, value in zip(leaves(params), saved["params"], strict=True):
                leaf.copy_(value)
        optimiser.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]

    def keep(step: int, seconds: float) -> None:
        partial = resume.with_suffix(".partial")
        torch.save(
            {
                "step": step,
                "steps": args.steps,
                "seconds": seconds,
                "params": [leaf.detach() for leaf in leaves(params)],
                "optimizer": optimiser.state_dict(),
            },
            partial,
        )
        partial.replace(resume)

    began = time.monotonic() - seconds
    log = args.run / "loss.jsonl"
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="train")
    for step in bar:
        data = batch(tokenizer, args.rows, args.length, args.seed, step)
        share = rate(step, args.steps)
        main, ahead = update(params, optimiser, data, share, args.rate)
        bar.set_postfix(main=f"{main:.3f}", mtp=f"{ahead:.3f}")
        seconds = time.monotonic() - began
        with log.open("a") as lines:
            row = {"step": step, "main": main, "mtp": ahead, "seconds": round(seconds, 1)}
            lines.write(json.dumps(row) + "\n")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            keep(step + 1, seconds)
    return params


def curve(log: Path) -> Iterator[dict[str, float]]:
    """The logged steps; a resumed run repeats some, and the last word counts."""
    rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}
    return iter(sorted(rows.values(), key=lambda row: row["step"]))


def plot(log: Path, picture: Path) -> None:
    """The two losses, smoothed over 20 steps, against the training step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(curve(log))
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label in (("main", "next token"), ("mtp", "token after next (MTP)")):
        values = torch.tensor([row[name] for row in rows])
        smooth = values.unfold(0, min(20, len(rows)), 1).mean(-1)
        axes.plot(range(len(rows) - len(smooth), len(rows)), smooth, label=label)
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token", yscale="log")
    axes.set_title(f"demo training, {rows[-1]['seconds'] / 3600:.2f} hours")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def export(params: qn.Params, tokenizer: Tokenizer, path: Path) -> None:
    """Write the checkpoint in bfloat16, with its tokenizer and chat template."""
    config = params.config.with_precision(compute=torch.bfloat16, logits=torch.bfloat16)
    rounded = [
        leaf.detach().to(torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16)
        for name, leaf in leaves_with_paths(params)
    ]
    qn.save(rebuild(params, rounded)._replace(config=config), path)
    write_tokenizer(tokenizer, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="where to keep the run")
    parser.add_argument("--out", type=Path, default=Path("qnext/embedded/model"), help="checkpoint")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rows", type=int, default=8, help="documents a step")
    parser.add_argument("--length", type=int, default=640, help="tokens a document")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="steps between resume points")
    parser.add_argument("--picture", type=Path, default=Path("docs/demo_loss.png"))
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # vanishing decays cost x86 dearly and change nothing
    args.run.mkdir(parents=True, exist_ok=True)
    words = args.run / "tokenizer.json"
    if not words.exists():
        train_tokenizer(VOCABULARY, args.seed).save(str(words))
    tokenizer = Tokenizer.from_file(str(words))
    params = train(args, tokenizer)
    export(params, tokenizer, args.out)
    plot(args.run / "loss.jsonl", args.picture)


if __name__ == "__main__":
    main()
