"""The gated delta rule (arXiv:2412.06464): its gates, its definition, and its chunked form.

Per value head, with log decay g_t <= 0 and write strength beta_t, from state S [dv, dk]:

    S <- exp(g_t) S;   S <- S + beta_t (v_t - S k_t) k_t^T;   o_t = scale * S q_t

`delta_scan` is the definition, token by token. `delta_chunked` is a theorem about it: inside a
chunk the writes solve one triangular system, so time turns into matrix products. Tests hold the
two equal in float64; long sequences run the chunked form.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import solve_triangular, vecdot
from torch.nn.functional import pad, softplus

from qnext.functional.ops.primitive import primitive
from qnext.functional.ops.tolerance import ROUNDS_ONCE, SUMS, randn, wide

CHUNK = 64  # tokens a chunk: the triangular systems stay small, the products large
SCAN_UP_TO = 16  # tokens for which the scan is the faster of the two


def _gate_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    yield {
        "a": randn(g, 2, 5, 3) * 10,  # log decays from nearly 0 to far below -1
        "b": randn(g, 2, 5, 3),
        "A_log": torch.linspace(-4, 2.7, 3),
        "dt_bias": randn(g, 3),
        "valid": torch.arange(5) < torch.tensor([[5], [3]]),
    }


@primitive(
    shapes=lambda *, a, b, A_log, **_: (
        a.new_empty(a.shape, dtype=A_log.dtype),
        b.new_empty(b.shape),
    ),
    flops=lambda *, a, **_: 12 * a.numel(),
    tolerance=ROUNDS_ONCE,
    samples=_gate_samples,
)
def delta_gates(
    *,
    a: Float[Tensor, "batch seq hv"],
    b: Float[Tensor, "batch seq hv"],
    A_log: Float[Tensor, " hv"],
    dt_bias: Float[Tensor, " hv"],
    valid: Bool[Tensor, "batch seq"],
) -> tuple[Float[Tensor, "batch seq hv"], Float[Tensor, "batch seq hv"]]:
    """(g, beta): log decay -exp(A_log) * softplus(a + dt_bias) and write strength sigmoid(b).

    Both are 0 where not valid, which makes padding an identity update.
    """
    g = -A_log.exp() * softplus(a.to(A_log.dtype) + dt_bias)
    beta = wide(b).sigmoid().to(b.dtype)
    return g.where(valid[..., None], 0), beta.where(valid[..., None], 0)


def _rule_samples(g: torch.Generator) -> Iterator[dict[str, Any]]:
    for seq, writes, decay in ((1, 1, 1.0), (5, 5, 1.0), (70, 1, 1.0), (70, 1, 30.0)):
        key = randn(g, 2, seq, 3, 7)
        yield {
            "query": randn(g, 2, seq, 3, 7),
            "key": key / key.norm(dim=-1, keepdim=True),
            "value": randn(g, 2, seq, 6, 11),
            "g": -decay * torch.rand(2, seq, 6, generator=g),
            "beta": torch.rand(2, seq, 6, generator=g),
            "state": randn(g, 13, 6, 11, 7),
            "slots": torch.randperm(12, generator=g)[: 2 * writes].view(2, writes) + 1,
            "scale": 7**-0.5,
        }


def _rule_flops(*, value: Tensor, state: Tensor, **_: Any) -> int:
    batch, seq = value.shape[:2]
    return 8 * batch * seq * state[0].numel()  # decay, read, write, query: 2 each


@primitive(
    shapes=lambda *, value, state, **_: (torch.empty_like(value), torch.empty_like(state)),
    flops=_rule_flops,
    bytes=lambda *, query, value, state, slots, **_: (
        2 * query.nbytes
        + 2 * value.nbytes
        + (slots.shape[0] + slots.numel()) * state[0].numel() * state.itemsize
    ),
    tolerance=SUMS,
    samples=_rule_samples,
)
def delta_rule(
    *,
    query: Float[Tensor, "batch seq hk dk"],
    key: Float[Tensor, "batch seq hk dk"],
    value: Float[Tensor, "batch seq hv dv"],
    g: Float[Tensor, "batch seq hv"],
    beta: Float[Tensor, "batch seq hv"],
    state: Float[Tensor, "slots hv dv dk"],
    slots: Int[Tensor, "batch writes"],
    scale: float,
) -> tuple[Float[Tensor, "batch seq hv dv"], Float[Tensor, "slots hv dv dk"]]:
    """The gated delta rule over a pool of states; returns (o, the pool after the call).

    Starts from slots[:, 0]. With one write, the state after the last token replaces it; with
    `writes` == seq > 1, the state after token t goes to slots[:, t]. Query and key arrive
    normalised; value head h uses query and key head h // (hv / hk). Computes in float32 at least.
    """
    dtype = torch.promote_types(wide(value).dtype, state.dtype)
    q, k, v, g, beta = (t.to(dtype) for t in (query, key, value, g, beta))
    q = q * scale
    start = state.index_select(0, slots[:, 0]).to(dtype)
    if slots.shape[1] > 1:
        out, states = delta_scan(q, k, v, g, beta, start)
        return out.to(value.dtype), state.index_put((slots.long(),), states.to(state.dtype))
    short = value.shape[1] <= SCAN_UP_TO
    run = partial(delta_scan, each=False) if short else delta_chunked
    out, last = run(q, k, v, g, beta, start)
    return out.to(value.dtype), state.index_copy(0, slots[:, 0].long(), last.to(state.dtype))


def delta_scan(
    q: Float[Tensor, "batch seq hk dk"],
    k: Float[Tensor, "batch seq hk dk"],
    v: Float[Tensor, "batch seq hv dv"],
    g: Float[Tensor, "batch seq hv"],
    beta: Float[Tensor, "batch seq hv"],
    state: Float[Tensor, "batch hv dv dk"],
    each: bool = True,
) -> tuple[Float[Tensor, "batch seq hv dv"], Float[Tensor, "batch *steps hv dv dk"]]:
    """The definition: returns the outputs and the states after each token, or the last only."""
    group = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(group, dim=2).unsqueeze(-2) for x in (q, k))
    outputs, states = [], []
    for t in range(v.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        write = beta[:, t, :, None] * (v[:, t] - vecdot(state, k[:, t]))
        state = torch.addcmul(state, write[..., None], k[:, t])
        outputs.append(vecdot(state, q[:, t]))
        if each:
            states.append(state)
    return torch.stack(outputs, dim=1), torch.stack(states, dim=1) if each else state


def delta_chunked(
    q: Float[Tensor, "batch seq hk dk"],
    k: Float[Tensor, "batch seq hk dk"],
    v: Float[Tensor, "batch seq hv dv"],
    g: Float[Tensor, "batch seq hv"],
    beta: Float[Tensor, "batch seq hv"],
    state: Float[Tensor, "batch hv dv dk"],
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "batch seq hv dv"], Float[Tensor, "batch hv dv dk"]]:
    """The same outputs and the last state, by chunks; any length, any decay.

    Within a chunk let D_ij = exp(g_{j+1} + ... + g_i) be the decay from j to i. The writes u_i obey
    u_i + beta_i sum_{j<i} D_ij (k_i . k_j) u_j = beta_i (v_i - D_i0 S k_i): a unit lower
    triangular system whose right side is affine in S, so it is solved for all chunks at once
    (the UT transform) and only S itself is carried from chunk to chunk.
    """
    seq, group = v.shape[1], v.shape[2] // k.shape[2]
    fill = -seq % chunk  # g = 0, beta = 0: identity updates
    q, k = (
        rearrange(pad(x, (0, 0, 0, 0, 0, fill)), "b (n c) hk dk -> b hk 1 n c dk", c=chunk)
        for x in (q, k)
    )
    v = rearrange(
        pad(v, (0, 0, 0, 0, 0, fill)), "b (n c) (hk r) dv -> b hk r n c dv", c=chunk, r=group
    )
    g, beta = (
        rearrange(pad(x, (0, 0, 0, fill)), "b (n c) (hk r) -> b hk r n c", c=chunk, r=group)
        for x in (g, beta)
    )
    since_start = g.cumsum(-1).exp()[..., None]  # D_i0, including g_i itself
    within = decay_between(g)
    to_end = within[..., -1, :, None]

    system = (beta[..., None] * (k @ k.mT) * within).tril(-1)
    right = beta[..., None] * torch.cat([v, (k * since_start)], dim=-1)
    # solved from the right, as LAPACK sees row-major memory transposed: no copies either way
    solved = solve_triangular(system.mT, right.mT, upper=True, left=False, unitriangular=True).mT
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.mT) * within
    q_decayed, k_decayed, kept = q * since_start, k * to_end, since_start[..., -1, :, None]

    state = rearrange(state, "b (hk r) dv dk -> b hk r dv dk", r=group)
    outputs = []
    for n in range(v.shape[3]):
        writes = u[..., n, :, :] - w[..., n, :, :] @ state.mT
        outputs.append(q_decayed[..., n, :, :] @ state.mT + scores[..., n, :, :] @ writes)
        state = state * kept[..., n, :, :] + writes.mT @ k_decayed[..., n, :, :]
    out = rearrange(torch.stack(outputs, dim=3), "b hk r n c dv -> b (n c) (hk r) dv")
    return out[:, :seq], rearrange(state, "b hk r dv dk -> b (hk r) dv dk")


def decay_between(g: Float[Tensor, "*batch chunk"]) -> Float[Tensor, "*batch chunk chunk"]:
    """exp(g_{j+1} + ... + g_i) for i >= j, else 0.

    Each entry is its own sum: differences of one running sum would lose small decays behind a
    large one.
    """
    size = g.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    sums = g[..., None].where(below, 0).cumsum(-2)  # not times 0: g may be -inf
    return sums.exp() * below.logical_or(torch.eye(size, dtype=torch.bool, device=g.device))
