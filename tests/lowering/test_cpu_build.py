"""Compiling the kernels: once, whole, by name; and what is said where it cannot be done.

Sources here are two of a few lines; the kernels themselves are built once, in no haste to run.
"""

import ctypes
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.errors import TargetError
from qnext.lowering.cpu import build, library
from qnext.lowering.target import resolve

needs_a_compiler = pytest.mark.skipif(
    build.compiler_here() is None, reason="no compiler for the kernels"
)
ANSWER = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    """As in a process that has not asked for the kernels yet; and so for the tests that follow."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of kernels that the builder takes for its own."""
    made = tmp_path / "kernels"
    made.mkdir()
    (made / "answer.h").write_text("#define ANSWER 41\n")
    (made / "answer.cpp").write_text(ANSWER)
    (made / "other.cpp").write_text('extern "C" int other() { return 7; }\n')
    monkeypatch.setattr(build, "KERNELS", made)
    monkeypatch.setattr(build, "FLAGS", ("-O0", "-fPIC"))
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "cache"  # neither is there yet


def answers(built: Path) -> tuple[int, int]:
    kernels = ctypes.CDLL(str(built))
    return kernels.answer(), kernels.other()


def libraries(cache: Path) -> list[Path]:
    """What a cache holds beside the locks."""
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock")


def refused(cache: Path, **how: Any) -> str:
    with pytest.raises(TargetError) as error:
        build.library(cache=cache, **how)
    return str(error.value)


# ---- what is built


@needs_a_compiler
def test_the_second_call_compiles_nothing(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build.library(cache=cache)
    assert answers(built) == (41, 7) and libraries(cache) == [built]
    written = built.stat().st_mtime_ns
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.library(cache=cache) == built and built.stat().st_mtime_ns == written
    built.unlink()  # a library that somebody removed is made anew
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        build.library(cache=cache)


@needs_a_compiler
def test_another_source_flag_or_isa_is_another_library(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def compiled(compiler: str, flags: Any, built: Path) -> None:
        made.append(built)
        built.write_bytes(b"")

    monkeypatch.setattr(build, "_compile", compiled)
    names = [build.library(cache=cache)]
    (sources / "answer.h").write_text("#define ANSWER 42\n")  # a header alone
    names.append(build.library(cache=cache))
    (sources / "answer.cpp").rename(sources / "renamed.cpp")
    names.append(build.library(cache=cache))
    names.append(build.library("portable", cache=cache))
    monkeypatch.setattr(build, "FLAGS", ("-O1", "-fPIC"))
    names.append(build.library("portable", cache=cache))
    monkeypatch.setattr(build, "_run", lambda _: "another compiler, or another machine")
    names.append(build.library("portable", cache=cache))
    assert len(set(names)) == 6 and made == names and set(libraries(cache)) == set(names)


@needs_a_compiler
def test_the_kernels_themselves(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel is in the library, whatever the machine has."""
    from qnext.lowering.cpu.calls import KERNELS

    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
    library = ctypes.CDLL(str(build.library("portable", cache=cache)))
    library.qnext_kernel.restype, library.qnext_kernel.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    assert [name for name in KERNELS if not library.qnext_kernel(name.encode())] == []
    assert library.qnext_kernel(b"no such kernel") is None


def racing(sources: Path, cache: Path) -> tuple[Path, tuple[int, int]]:
    """What another process builds, and what it has then."""
    build.KERNELS, build.FLAGS = sources, ("-O0", "-fPIC")
    built = build.library(cache=cache)
    return built, answers(built)


@needs_a_compiler
def test_two_processes_at_once_give_one_whole_library(sources: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        jobs = [pool.submit(racing, sources, cache) for _ in range(2)]
        found = [job.result(timeout=120) for job in jobs]
    assert found[0] == found[1] == (libraries(cache)[0], (41, 7))
    assert len(libraries(cache)) == 1


# ---- what is said where nothing is built


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)


def test_no_compiler(cache: Path, no_compiler: None) -> None:
    said = refused(cache)
    assert "g++" in said and "clang++" in said and "lower for target 'reference'" in said
    assert not cache.exists()


@needs_a_compiler
def test_a_compiler_that_fails_is_quoted(sources: Path, cache: Path) -> None:
    """Nothing is left behind, and when the fault is mended the next call builds."""
    (sources / "other.cpp").write_text("#error these are no kernels\n")
    said = refused(cache)
    assert "these are no kernels" in said and "lower for target 'reference'" in said
    assert str(build.compiler_here()) in said and libraries(cache) == []
    (sources / "other.cpp").write_text('extern "C" int other() { return 7; }\n')
    assert answers(build.library(cache=cache)) == (41, 7)


@needs_a_compiler
def test_a_library_that_does_not_link_is_none(sources: Path, cache: Path) -> None:
    (sources / "other.cpp").write_text(ANSWER)  # the same symbol twice
    assert "multiple definition" in refused(cache) and libraries(cache) == []


@needs_a_compiler
def test_a_compiler_that_knows_no_such_flag(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.ISAS, "native", ("-march=no-such-machine",))
    assert "no-such-machine" in refused(cache) and not cache.exists()


@needs_a_compiler
def test_a_cache_that_cannot_be_written(sources: Path, tmp_path: Path) -> None:
    """A file in its way stands for a read-only home: root may write to anything else."""
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        assert refused(cache).startswith(f"the kernels cannot be written to {cache}: ")


@needs_a_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_without_the_right_to_write(sources: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    assert refused(cache) == f"the kernels cannot be written to {cache}: Permission denied"


# ---- steps without kernels


def double(x: torch.Tensor) -> torch.Tensor:
    return qn.functional.ops.l2_norm(x=x, eps=1e-6)


def lowered(**how: Any) -> Any:
    return qn.jit(double).trace(torch.ones(3, 5)).lower("cpu", **how)


def test_a_step_without_a_compiler_runs_on_the_reference(no_compiler: None) -> None:
    step = lowered()
    assert step.target == resolve("cpu")
    with pytest.warns(UserWarning, match=r"(?s)none of g\+\+.*Until then double runs on the ref"):
        compiled = step.compile()
    assert compiled.lowered.target.name == "reference"
    x = torch.randn(3, 5)
    assert torch.equal(compiled(x), double(x))


def test_a_call_of_jit_without_a_compiler_warns_once(no_compiler: None) -> None:
    step, x = qn.jit(double, target="cpu"), torch.randn(3, 5)
    with pytest.warns(UserWarning) as caught:
        assert torch.equal(step(x), double(x)) and torch.equal(step(x), double(x))
    assert len(caught) == 1


@pytest.mark.parametrize("how", [{"strict": True}, {"require": {"l2_norm"}}])
def test_what_was_demanded_is_not_left_to_the_reference(how: Any, no_compiler: None) -> None:
    with pytest.raises(TargetError, match=r"g\+\+.*or lower for target 'reference'"):
        lowered(**how).compile()


@needs_a_compiler
def test_a_failing_compiler_is_told_by_the_warning(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sources / "other.cpp").write_text("#error these are no kernels\n")
    monkeypatch.setattr(build, "user_cache_path", lambda name: cache)
    with pytest.warns(UserWarning, match=r"(?s)these are no kernels.*Until then double runs on"):
        compiled = lowered().compile()
    assert compiled.lowered.target.name == "reference"


@needs_a_compiler
def test_a_library_that_cannot_be_loaded_is_told(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file cut short, say by a full disk, or one from another machine."""
    monkeypatch.setattr(build, "user_cache_path", lambda name: cache)
    build.library().write_bytes(b"\x7fELF")
    with pytest.warns(UserWarning, match="the compiled kernels cannot be loaded: "):
        compiled = lowered().compile()
    assert compiled.lowered.target.name == "reference"
