"""The plans that so many cards allow, from best to worst."""

from collections.abc import Iterator

from qnext.errors import InputError
from qnext.functional.config import Config
from qnext.functional.mesh import Block, Mesh
from qnext.planner.assumed import Load, Machine
from qnext.planner.costs import Move, fullest
from qnext.planner.plan import Plan

PROMISING = 2  # of the ways to share experts beyond a group, for each size of groups


def meshes(config: Config, int8: bool, cards: int, load: Load, machine: Machine) -> list[Mesh]:
    """Ways of sharing a model among all cards that are worth reckoning: groups of every size that
    heads allow, experts within a group, and beyond it as their bytes and travels promise."""
    found: list[Mesh] = []
    for tp in (n for n in range(1, cards + 1) if cards % n == 0):
        shared = [n for n in range(tp + 1, cards + 1) if cards % n == 0 and n % tp == 0]
        beyond = [mesh for ep in shared for mesh in _mesh(config, tp, cards // tp, ep)]
        beyond = [m for m in beyond if _held(config, int8, m.ep) < machine.usable_bytes] or beyond
        beyond.sort(key=lambda mesh: promised(config, int8, mesh, load, machine))
        found += [*_mesh(config, tp, cards // tp, tp), *beyond[:PROMISING]]
    return found


def _expert(config: Config, int8: bool) -> int:
    """Bytes of an expert's weights."""
    return 3 * config.moe_intermediate_size * config.hidden_size * (1 if int8 else 2)


def _held(config: Config, int8: bool, ranks: int) -> int:
    """Bytes of the experts that a rank holds."""
    return sum(config.is_moe) * -(-config.num_experts // ranks) * _expert(config, int8)


def promised(config: Config, int8: bool, mesh: Mesh, load: Load, machine: Machine) -> float:
    """Seconds a layer that experts must take at least, where tokens travel to them."""
    rows = -(-load.requests // mesh.dp) * (load.draft + 1)
    topk = config.num_experts_per_tok
    read = fullest(rows * mesh.ep / mesh.tp, topk, config.num_experts, mesh.ep)
    sent = rows * topk * 2 * config.hidden_size * (mesh.ep - 1) / mesh.ep
    travel = 2 * Move("npu_dispatch", mesh.ep, sent).seconds(machine)
    return read * _expert(config, int8) / machine.chip.bytes_per_second + travel


def _mesh(config: Config, tp: int, dp: int, ep: int) -> Iterator[Mesh]:
    """The mesh, if heads and experts can be shared so; the vocabulary stays whole where it must."""
    try:
        mesh = Mesh(tp, dp, ep).for_vocab(config.vocab_size)
        for blocks in _axes(config):
            mesh.spans(blocks)
    except InputError:
        return
    if ep <= config.num_experts or not any(config.is_moe):
        yield mesh


def _axes(config: Config) -> list[tuple[Block, ...]]:
    divided = config.divided
    unused = {"own_vocab"} | (set() if not all(config.is_moe) else {"dense_gate_up"})
    return [blocks for name, blocks in divided.items() if name not in unused]


def ranked(plans: list[Plan]) -> list[Plan]:
    """Those that fit first, by their time for a token; of equal ones the roomiest."""
    return sorted(plans, key=lambda p: (not p.fits, p.token, -p.memory.tokens))
