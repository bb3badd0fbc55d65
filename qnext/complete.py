"""Text in, text out: prompts of token ids continued as streamed text, with stop strings."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.acceptance import Acceptance, of_step
from qnext.errors import InputError
from qnext.functional.generate import GREEDY, stream
from qnext.functional.model import prefill
from qnext.functional.params import Params
from qnext.functional.sampling import Sampling
from qnext.functional.state import State, init_state, select
from qnext.text import Continuation, Tokenizer


class Piece(NamedTuple):
    """Text that became certain in one row; `finish` is set on a row's last piece.

    tokens: new tokens of the row so far. finish: "eos", "stop" or "length". acceptance: of the
    row's guesses so far.
    """

    row: int
    text: str
    tokens: int
    finish: str | None
    acceptance: Acceptance = Acceptance()


def complete(
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stops: Sequence[str] = (),
    draft: int = 0,
) -> Iterator[Piece]:
    """Continue prompts (token ids) as text, yielding pieces of any row as they become certain.

    A row ends at an eos token, before the first occurrence of a string of `stops`, or after
    `max_new_tokens`. What all prompts begin with is prefilled once. With `draft` so many tokens
    are guessed ahead, which changes no text. Raises InputError.
    """
    rows = [Continuation(tokenizer, prompt, stops) for prompt in prompts]
    acceptance = [Acceptance()] * len(rows)
    state, tokens, lengths = shared_prefix(params, prompts, max_new_tokens, draft)

    def stop(new: Tensor) -> Tensor:
        for row, token in zip(rows, new.tolist(), strict=True):
            if row.finish is None and token >= 0:
                row.push(token)
        return torch.tensor([row.finish is not None for row in rows], device=new.device)

    told = [False] * len(rows)
    steps = stream(params, state, tokens, max_new_tokens, lengths, sampling, stop, draft)
    for new, _ in steps:
        for i, (row, made) in enumerate(zip(rows, (new >= 0).sum(1).tolist(), strict=True)):
            if row.tokens == max_new_tokens and row.finish is None:
                row.end("length")
            if made:
                room = max_new_tokens - (row.tokens - made)
                acceptance[i] += of_step(made, draft, room, row.finish is not None)
            text = row.release()
            if not told[i] and (text or row.finish):
                yield Piece(i, text, row.tokens, row.finish, acceptance[i])
            told[i] = row.finish is not None


def shared_prefix(
    params: Params, prompts: Sequence[Sequence[int]], max_new_tokens: int, draft: int = 0
) -> tuple[State, Tensor, Tensor]:
    """(state, tokens, lengths): the state has consumed what all prompts share, once for all.

    tokens [batch, seq] are what remains of each prompt, right-padded; at least one token each.
    """
    if not prompts or not all(prompts):
        raise InputError("empty prompt: give at least one token")
    longest = max(map(len, prompts))
    least = min(map(len, prompts)) - 1
    shared = next((i for i in range(least) if len({p[i] for p in prompts}) > 1), least)
    batch, device = len(prompts), params.embed.device
    shared = shared if batch > 1 else 0
    rows = 1 if shared else batch
    room = longest + max_new_tokens
    state = init_state(params.config, rows, room, device=device, draft=draft)
    if shared:
        prefix = torch.tensor([list(prompts[0][:shared])], device=device)
        with torch.no_grad():
            _, state = prefill(params, state, prefix)
        state = select(state, [0] * batch)
    rest = [list(p[shared:]) for p in prompts]
    lengths = torch.tensor([len(r) for r in rest], device=device)
    width = int(lengths.max())
    tokens = torch.tensor([r + [0] * (width - len(r)) for r in rest], device=device)
    return state, tokens, lengths
