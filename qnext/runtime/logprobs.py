"""Log probabilities of tokens under the model itself, before filters, penalties and temperature."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qnext.runtime.request import Logprob


def told(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[Logprob, ...]:
    """What to tell of tokens [n] drawn from logits [n, vocab], with the `top` likeliest of each."""
    if not tokens:
        return ()
    shares = logits.to(torch.float32).log_softmax(-1)
    own = shares.gather(1, torch.tensor(tokens, device=shares.device)[:, None]).squeeze(1)
    values, ids = shares.topk(top, dim=-1)
    rows = zip(tokens, own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return tuple(Logprob(t, p, tuple(zip(i, v, strict=True))) for t, p, i, v in rows)
