"""One plan: a model shared so on so many cards, and what a load on it would take."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

import qnext as qn
from qnext.functional.config import PAGE, Config
from qnext.functional.mesh import Mesh
from qnext.functional.params import MoeParams, Params
from qnext.functional.quantize import quantize
from qnext.functional.state import KV, State, pages_of
from qnext.functional.tree import leaves
from qnext.lowering.npu.dispatch import RELAYED, TOKENS
from qnext.lowering.target import Target
from qnext.planner.assumed import Load, Machine
from qnext.planner.costs import StepCost, small, step_cost

MIB = 1 << 20
CHUNK = 4096  # tokens of a prompt in one step


class Memory(NamedTuple):
    """Bytes on the fullest card, and what they leave room for.

    tokens: of keys and values, in all groups. requests: of the load's length at once.
    """

    experts: int
    others: int
    workspace: int
    buffers: int  # of HCCL, for the groups that a card is in
    a_request: int  # recurrent states and windows
    a_page: int  # keys and values of 128 tokens
    usable: int
    tokens: int
    requests: int

    @property
    def weights(self) -> int:
        return self.experts + self.others


class Time(NamedTuple):
    """Seconds of a step by what takes them; they do not overlap."""

    parts: dict[str, float]
    launches: int
    collectives: int
    link_bytes: float
    network_bytes: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda part: self.parts[part])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"seconds": self.total, "bottleneck": self.bottleneck}


TIMES = ("step", "prefill")


@dataclass(frozen=True)
class Plan:
    """What a mesh makes of a load. rows: requests of a group. first: None where not asked for."""

    mesh: Mesh
    rows: int
    memory: Memory
    step: Time
    tokens_a_step: float
    prefill: Time | None = None

    @property
    def fits(self) -> bool:
        return self.memory.requests >= self.rows * self.mesh.dp

    @property
    def token(self) -> float:
        """Seconds a request waits for a token."""
        return self.step.total / self.tokens_a_step

    @property
    def first(self) -> float | None:
        """Mean seconds to the first token, where a group takes its prompts one after another."""
        return None if self.prefill is None else (self.rows + 1) / 2 * self.prefill.total

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        mesh = {name: getattr(self.mesh, name) for name in ("tp", "dp", "ep")}
        values = {k: v for k, v in asdict(self).items() if k not in ("mesh", "memory", *TIMES)}
        told = {
            name: None if (time := getattr(self, name)) is None else time.to_dict()
            for name in TIMES
        }
        more = {"fits": self.fits, "seconds_a_token": self.token, "seconds_to_first": self.first}
        return mesh | values | {"memory": self.memory._asdict()} | told | more


def plan(config: Config, int8: bool, mesh: Mesh, load: Load, machine: Machine) -> Plan:
    """The plan of a mesh, without its prefill. Raises InputError where a model cannot be so shared.

    config: of the whole model, whose mesh is no matter. int8: W8A8 by the usual choice.
    """
    config = replace(config, mesh=mesh)
    rows = -(-load.requests // mesh.dp)
    step = _decoded(_Shape(config, int8, rows, load.length, load.draft, machine.target))
    return Plan(
        mesh=mesh,
        rows=rows,
        memory=_memory(config, int8, load, machine, step.temporaries),
        step=timed(step, machine),
        tokens_a_step=load.tokens_a_step,
    )


def with_prefill(plan: Plan, config: Config, int8: bool, load: Load, machine: Machine) -> Plan:
    """The same plan with the time to the first token, which takes longer to reckon."""
    config = replace(config, mesh=plan.mesh)
    seq = min(load.prompt, CHUNK)
    cost = _prefilled(_Shape(config, int8, 1, load.length, load.draft, machine.target), seq)
    time = timed(cost, machine, times=-(-load.prompt // seq))
    memory = _memory(config, int8, load, machine, cost.temporaries)
    return replace(plan, prefill=time, memory=memory)


def timed(cost: StepCost, machine: Machine, times: int = 1) -> Time:
    """The step's time. A collective's launch is in its latency."""
    pairs = [(move, times * count) for move, count in cost.moves.items()]
    latency = sum(count for _, count in pairs) * machine.collective
    moving = sum(count * move.seconds(machine) for move, count in pairs) - latency
    split = [(move.split(machine), count) for move, count in pairs]
    parts = {kind: times * spent for kind, spent in sorted(cost.seconds.items())}
    parts["launches"] = times * (cost.launches - cost.collectives) * machine.launch
    if pairs:
        parts |= {"collectives, latency": latency, "collectives, bytes": moving}
    return Time(
        parts,
        times * cost.launches,
        times * cost.collectives,
        sum(inside * count for (inside, _), count in split),
        sum(outside * count for (_, outside), count in split),
    )


def params_of(config: Config, int8: bool) -> Params:
    """Specs of a rank's params."""
    params = qn.specs(config, 1, 1)[0]
    return quantize(params) if int8 else params


class _Shape(NamedTuple):
    """What a step is lowered for."""

    config: Config  # a rank's
    int8: bool
    rows: int
    length: int  # tokens there is room for
    draft: int
    target: Target


@lru_cache(maxsize=256)
def _decoded(shape: _Shape) -> StepCost:
    """A decode step, or one of speculation."""
    few, times = small(shape.config)
    _, state, tokens = qn.specs(few, shape.rows, shape.length, draft=shape.draft)
    step = qn.jit(qn.speculate if shape.draft else qn.decode, donate="state")
    given = (params_of(few, shape.int8), state, tokens, *([shape.draft] if shape.draft else []))
    return step_cost(step.trace(*given).lower(shape.target), few, times)


@lru_cache(maxsize=256)
def _prefilled(shape: _Shape, seq: int) -> StepCost:
    """A step that consumes some of one prompt in each group."""
    few, times = small(shape.config)
    _, state, tokens = qn.specs(few, shape.rows, shape.length, seq=seq, draft=shape.draft)
    traced = qn.jit(qn.prefill, donate="state").trace(params_of(few, shape.int8), state, tokens)
    return step_cost(traced.lower(shape.target), few, times)


def _memory(config: Config, int8: bool, load: Load, machine: Machine, workspace: int) -> Memory:
    few, times = small(config)
    params, state = params_of(few, int8), qn.specs(few, 1, 1, draft=load.draft)[1]
    experts = sum(n * _experts(layer.ffn) for n, layer in zip(times, params.layers, strict=True))
    layers = sum(n * size(layer) for n, layer in zip(times, params.layers, strict=True))
    others = size(params) - size(params.layers) + layers - experts
    request, page = _state_bytes(state, times)
    usable = machine.usable_bytes
    buffers = _buffers(config, load, machine)
    free = usable - experts - others - workspace - buffers
    groups = config.mesh.dp
    fixed = -(-load.requests // groups) * request
    return Memory(
        experts=experts,
        others=others,
        workspace=workspace,
        buffers=buffers,
        a_request=request,
        a_page=page,
        usable=usable,
        tokens=max(free - fixed, 0) // max(page, 1) * PAGE * groups,
        requests=max(free, 0) // (request + pages_of(load.length) * page) * groups,
    )


def buffer_bytes(config: Config, load: Load, machine: Machine) -> int:
    """What HCCL_BUFFSIZE must be at least, in bytes; 0 where no tokens travel by the fused calls.

    By the formulas on the page of npu_moe_distribute_dispatch_v2, for the tokens of a decode step
    or as many as one call takes of a prompt.
    """
    mesh, kind = config.mesh, machine.target.facts.dispatch
    size, topk = mesh.divides("experts"), config.num_experts_per_tok
    if size <= mesh.tp or kind is None:
        return 0
    tokens = max(min(load.prompt, TOKENS[kind]), -(-load.requests // mesh.dp) * (load.draft + 1))
    row = 2 * config.hidden_size
    if kind == RELAYED:
        return config.num_experts * tokens * (row + 16 * (-(-topk // 8) * 8)) + 104 * MIB
    sent = config.axes["own_experts"] * size * _up(_up(row, 32) + 64, 512)
    return 2 * tokens * (sent + (topk + 1) * _up(row, 512))


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _buffers(config: Config, load: Load, machine: Machine) -> int:
    """One for each group, by default of 200 MB; a variable sets it for all of them."""
    groups = (config.mesh.tp > 1) + (config.mesh.divides("experts") > 1)
    return groups * max(200 * MIB, buffer_bytes(config, load, machine))


def _experts(ffn: Any) -> int:
    return size((ffn.gate_up, ffn.down)) if isinstance(ffn, MoeParams) else 0


def _state_bytes(state: State, times: list[int]) -> tuple[int, int]:
    """Bytes of a request's recurrent states and windows, and of a page of all layers."""
    request: Counter[str] = Counter()
    for count, layer in zip(times, state.layers, strict=True):
        if isinstance(layer, KV):
            request["page"] += count * sum(pool[0].nbytes for pool in layer)
        else:
            slots = state.slots.shape[1]
            request["row"] += count * (slots * layer.recurrent[0].nbytes + layer.window[0].nbytes)
    for module in state.mtp:
        request["page"] += module.key[0].nbytes + module.value[0].nbytes
        request["row"] += module.hidden[0].nbytes
    return request["row"], request["page"]


def size(tree: object) -> int:
    """Bytes of the specs of a tree."""
    return sum(leaf.nbytes for leaf in leaves(tree) if isinstance(leaf, Tensor))
