"""Who may import whom (docs/design.md, Rooms), read from the source with `ast`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "qnext"
LOWERING = {
    *("torch", "jaxtyping", "qnext.errors", "qnext.lowering"),
    *("qnext.functional.ops", "qnext.functional.tree"),
}
CORE = {"torch", "einops", "jaxtyping", "qnext.errors", "qnext.shapes", "qnext.functional"}

# room (longest prefix wins) -> what its modules may import besides the standard library
ALLOWED: dict[str, set[str]] = {
    "qnext.errors": set(),
    "qnext.shapes": {"torch", "beartype", "jaxtyping"},
    "qnext.functional": CORE,
    "qnext.functional.checkpoint": CORE | {"safetensors", "tqdm"},
    "qnext.text": {"tokenizers", "jinja2", "qnext.errors", "qnext.text"},
    "qnext.embedded": {"torch", "qnext.functional", "qnext.text"},
    "qnext.acceptance": set(),
    "qnext.complete": {
        *("qnext.acceptance", "qnext.errors", "qnext.functional", "qnext.runtime"),
        "qnext.text",
    },
    "qnext.evaluate": {
        "tqdm",
        "qnext.acceptance",
        "qnext.complete",
        "qnext.errors",
        "qnext.functional",
        "qnext.text",
    },
    "qnext.convert": {"filelock", "torch", "tqdm", "qnext.errors", "qnext.functional"},
    "qnext.lowering": LOWERING,
    "qnext.lowering.npu": LOWERING | {"torch_npu"},
    "qnext.lowering.cpu": LOWERING | {"filelock", "platformdirs", "tqdm"},
    "qnext.lowering.softnpu": {"torch", "torch_npu", "qnext.lowering.softnpu"},
    "qnext.runtime": {
        *("torch", "tqdm", "jaxtyping", "qnext.acceptance", "qnext.errors", "qnext.shapes"),
        *("qnext.functional", "qnext.lowering", "qnext.runtime", "qnext.text"),
    },
    "qnext.runtime.kept": {"numpy", "torch", "qnext.functional", "qnext.runtime"},
    "qnext.handoff": {"torch", "qnext.errors", "qnext.handoff"},
    "qnext.handoff.spares": {"numpy", "torch"},
    "qnext.handoff.layout": {"numpy", "torch", "xxhash", "qnext.functional", "qnext.runtime"},
    "qnext.handoff.receive": {"pydantic", "torch", "qnext.handoff", "qnext.runtime"},
    "qnext.handoff.send": {"torch", "qnext.handoff", "qnext.runtime"},
    "qnext.handoff.manifest": {"pydantic", "qnext.errors", "qnext.handoff"},
    "qnext.handoff.group": {"torch", "torch_npu", "qnext.errors", "qnext.handoff"},
    "qnext.handoff.mooncake": {"torch", "mooncake", "qnext.errors", "qnext.handoff"},
    "qnext.bench": {"numpy", "tqdm", "qnext.bench", "qnext.embedded", "qnext.errors"},
    "qnext.bench.steps": {"torch", "tqdm", "qnext"},
    "qnext.server": {"torch", "tqdm", "qnext"},
    "qnext.planner": {"torch", "tqdm", "qnext"},
    "qnext.measure": {"torch", "jaxtyping", "qnext.errors", "qnext.functional"},
    "qnext.plot": {"torch", "qnext.errors", "qnext.measure"},
    "qnext.lower": {"torch", "qnext"},
    "qnext.doctor": {"torch", "qnext.errors", "qnext.lowering"},
    "qnext.arguments": {"torch", "qnext"},
    "qnext.cli": {"qnext"},
    "qnext": {"qnext"},
}
STANDARD = {
    "qnext.functional": {"collections", "dataclasses", "functools", "inspect", "math", "typing"},
    "qnext.functional.config": {"hashlib", "json", "pathlib"},
    "qnext.functional.checkpoint": {"concurrent", "contextlib", "json", "os", "pathlib", "zlib"},
    "qnext.functional.checkpoint.mapped": {"ctypes", "errno", "io", "mmap", "sys"},
    "qnext.functional.quantize": {"re"},
    "qnext.functional.scheme": {"re"},
}
MODULES = sorted(ROOT.rglob("*.py"))
LONGEST = 400
# the software runtime is told where its libraries are by the environment of a child process
READS_ENVIRONMENT = {"qnext.lowering.softnpu.device"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(node: ast.AST) -> list[str]:
    """The top packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [str(node.module).partition(".")[0]] if isinstance(node, ast.ImportFrom) else []


def within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def room_of(name: str) -> str:
    return max((room for room in ALLOWED if within(name, {room})), key=len)


def forbidden(path: Path) -> list[str]:
    """The imports of a module that its room does not allow."""
    name = name_of(path)
    allowed = ALLOWED[room_of(name)]
    theirs = {"torch", "torch_npu", "einops", "jaxtyping", "beartype", "safetensors", "tqdm"}
    theirs |= {"tokenizers", "jinja2", "transformers", "numpy", "qnext"}
    pure = within(name, {"qnext.functional"})
    standard = set().union(*(names for room, names in STANDARD.items() if within(name, {room})))
    wrong = []
    for imported in imports(path):
        top = imported.partition(".")[0]
        if top in theirs or pure:
            good = within(imported, allowed) or (pure and top in standard)
            wrong += [] if good else [f"{name} imports {imported}"]
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_down(path: Path) -> None:
    assert forbidden(path) == []


def test_a_wrong_arrow_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "qnext" / "functional"
    room.mkdir(parents=True)
    module = room / "wrong.py"
    module.write_text("import os\nimport torch_npu\nfrom qnext.cli import main\nimport torch\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "qnext")
    assert forbidden(module) == [
        "qnext.functional.wrong imports os",
        "qnext.functional.wrong imports torch_npu",
        "qnext.functional.wrong imports qnext.cli.main",
    ]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_torch_npu_is_imported_only_when_called(path: Path) -> None:
    """Every other machine lacks it; the software Ascend runs where it is there."""
    tree = ast.parse(path.read_text())
    called = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
    }
    early = [node for node in ast.walk(tree) if node not in called and "torch_npu" in tops(node)]
    assert not early or within(name_of(path), {"qnext.lowering.softnpu"})


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_stay_readable(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= LONGEST
    assert "from __future__ import annotations" not in source  # would switch shape checks off
    if name_of(path) not in READS_ENVIRONMENT:
        assert "os.environ" not in source and "getenv" not in source


@pytest.mark.parametrize("path", [p for p in MODULES if "functional" in p.parts], ids=name_of)
def test_functional_knows_no_device(path: Path) -> None:
    words = {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not words & {"cuda", "npu", "mps"}


def test_private_torch_lives_in_one_file() -> None:
    """Underscored torch modules may change with any release: one place to mend."""
    users = {
        name_of(path)
        for path in MODULES
        for imported in imports(path)
        if imported.startswith("torch.") and "._" in imported
    }
    assert users == {"qnext.functional.tree"}
