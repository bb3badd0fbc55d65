"""The demo's training text as batches of tokens: few-shot word problems, chat, and plain stories.

A row is one document of its own: problems in the form in which they are evaluated, conversations
in the chat template, or sentences. Batches are drawn from (seed, step) alone, so training that is
stopped resumes with the very batch it would have seen.
"""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from examples.chat_corpus import conversation, plain_text
from examples.problems import training_problems

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = SPECIAL[0]
CHAT_SHARE, STORY_SHARE = 0.14, 0.06
QUESTION_WEIGHT = 0.1  # names and numbers of a question cannot be known; its form can
# words take their leading space along, and so does the first digit of a number: one token a digit
WORDS = r"\n+| ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ["system", "user", "assistant"] -%}
{{- raise_exception("unknown role: " + message.role) -}}
{%- endif -%}
{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


class Batch(NamedTuple):
    """tokens [rows, length] int64; weight [rows, length] of each token as a target."""

    tokens: Tensor
    weight: Tensor


def train_tokenizer(vocab_size: int, seed: int, documents: int = 6000) -> Tokenizer:
    """A byte-level BPE tokenizer learned from that many documents of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    texts = ("".join(text for text, _ in document(rng)) for _ in range(documents))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def document(rng: random.Random) -> Iterator[tuple[str, float]]:
    """The parts of an endless-enough document, each with its weight as a target."""
    kind = rng.random()
    if kind < CHAT_SHARE:
        for _ in range(12):
            yield from _chat(rng)
    elif kind < CHAT_SHARE + STORY_SHARE:
        for _ in range(20):
            yield plain_text(rng) + "\n\n", 1.0
    else:
        for problem in islice(training_problems(rng.getrandbits(48)), 14):
            yield f"Question: {problem.question}\nAnswer:", QUESTION_WEIGHT
            yield f" {problem.answer}\n\n", 1.0


def _chat(rng: random.Random) -> Iterator[tuple[str, float]]:
    for message in conversation(rng):
        replied = message["role"] == "assistant"
        yield f"<|im_start|>{message['role']}\n", QUESTION_WEIGHT
        yield message["content"] + "<|im_end|>", 1.0 if replied else QUESTION_WEIGHT
        yield "\n", QUESTION_WEIGHT
    yield END, QUESTION_WEIGHT


def batch(tokenizer: Tokenizer, rows: int, length: int, seed: int, step: int) -> Batch:
    """The rows of one training step."""
    rng = random.Random(f"{seed}/{step}")
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    weight = torch.zeros(rows, length)
    for row in range(rows):
        ids: list[int] = []
        weights: list[float] = []
        for text, importance in document(rng):
            part = tokenizer.encode(text, add_special_tokens=False).ids
            ids += part
            weights += [importance] * len(part)
            if len(ids) >= length:
                break
        count = min(len(ids), length)
        tokens[row, :count] = torch.tensor(ids[:count])
        weight[row, :count] = torch.tensor(weights[:count])
    return Batch(tokens, weight)


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """tokenizer.json and the configs beside it."""
    import json

    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": END,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id(END)]
    generation = {"eos_token_id": ends, "pad_token_id": tokenizer.token_to_id(END)}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
