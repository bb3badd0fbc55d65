"""Build the software CANN for the installed torch_npu wheel: `python -m ... .build OUT`.

The wheel needs a set of C functions that CANN has. Those that matter are written in `runtime.cpp`,
`formats.cpp`, `opapi.c` and `hccl.c`; what remains answers 0. Needs g++, gcc and nm on x86-64.
"""

import ctypes
import hashlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("runtime.cpp", "formats.cpp", "opapi.c", "hccl.c", "build.py")
# short name -> what the chip calls itself
SOCS = {"910B3": "Ascend910B3", "9391": "Ascend910_9391"}
OPTIONS = {"soc": "Ascend910B3", "cann": "8.5.0"}
# libraries that the wheel is linked to and that hold nothing here
EMPTY = ("ge_runner", "graph", "acl_tdt_channel")
COMPILER = """
#include <stdint.h>
#include <string.h>
static int64_t parameters[64];
int aclrtGetSysParamOpt(int k, int64_t *v) { *v = parameters[k & 63]; return 0; }
int aclrtSetSysParamOpt(int k, int64_t v) { parameters[k & 63] = v; return 0; }
int aclrtCtxGetSysParamOpt(int k, int64_t *v) { return aclrtGetSysParamOpt(k, v); }
int aclrtCtxSetSysParamOpt(int k, int64_t v) { return aclrtSetSysParamOpt(k, v); }
int aclSetCompileopt(int option, const char *value) { (void)option, (void)value; return 0; }
int aclGenGraphAndDumpForOp(void) { return 0; }
void *aclCreateGraphDumpOpt(void) { return 0; }
int aclDestroyGraphDumpOpt(void *options) { (void)options; return 0; }
size_t aclGetCompileoptSize(int option) { (void)option; return 8; }
int aclGetCompileopt(int option, char *value, size_t n) {
  (void)option; strncpy(value, "disable", n); return 0;
}
"""
NNOPBASE = "int aclDestroyAclOpExecutor(void *e) { (void)e; return 0; }\n"
NNOPBASE += "int aclSetAclOpExecutorRepeatable(void *e) { (void)e; return 0; }\n"
# keeps every argument register, loads the kernels, and goes where the slot then points
FIRST = """
softnpu_first:
 push %rbp
 mov %rsp, %rbp
 push %rdi
 push %rsi
 push %rdx
 push %rcx
 push %r8
 push %r9
 push %r10
 push %r11
 sub $128, %rsp
{save}
 call softnpu_load@PLT
{load}
 add $128, %rsp
 pop %r11
 pop %r10
 pop %r9
 pop %r8
 pop %rcx
 pop %rdx
 pop %rsi
 pop %rdi
 pop %rbp
 jmp *(%r10)
softnpu_missing:
 mov %r11, %rdi
 jmp softnpu_complain@PLT
"""


class BuildError(RuntimeError):
    """The software Ascend cannot be built on this machine."""


def build(out: Path, options: dict[str, str] | None = None) -> None:
    """Write the libraries and the file `options` to a directory; nothing where they are fresh."""
    chosen = OPTIONS | (options or {})
    _require_tools()
    stamp = _fingerprint(chosen)
    mark = out / "stamp"
    if mark.is_file() and mark.read_text() == stamp:
        return
    out.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    (out / "options").write_text("".join(f"{name} {value}\n" for name, value in chosen.items()))
    for name in EMPTY:
        _library(out, name, "")
    _library(out, "acl_op_compiler", COMPILER)
    _library(out, "nnopbase", NNOPBASE)
    _library(out, "hccl", (HERE / "hccl.c").read_text())
    _runtime(out)
    _opapi(out)
    mark.write_text(stamp)


def package(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"{name} is not installed: pip install 'qnext[npu]'")
    return Path(spec.submodule_search_locations[0])


def entries() -> list[str]:
    """Every aclnn call whose name the wheel holds."""
    library = (package("torch_npu") / "lib" / "libtorch_npu.so").read_bytes()
    found = re.findall(rb"(aclnn[A-Za-z0-9_]+?)Get(?:Max)?WorkspaceSize\b", library)
    return sorted({name.decode() for name in found})


def _require_tools() -> None:
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise BuildError(f"the software Ascend needs Linux on x86-64, not {platform.machine()}")
    missing = [tool for tool in ("g++", "gcc", "nm") if shutil.which(tool) is None]
    if missing:
        raise BuildError(f"the software Ascend needs {', '.join(missing)}: apt install g++")


def _fingerprint(options: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(options.items())).encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    wheel = (package("torch_npu") / "lib" / "libtorch_npu.so").stat()
    digest.update(f"{wheel.st_size} {wheel.st_mtime_ns}".encode())
    return digest.hexdigest()


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


def _library(out: Path, name: str, source: str) -> None:
    file = out / f"{name}.c"
    file.write_text(source)
    _run("gcc", "-shared", "-fPIC", "-o", out / f"lib{name}.so", file, f"-Wl,-soname,lib{name}.so")


def _symbols(files: Iterable[Path], kind: str) -> set[str]:
    return {
        line.split()[-1]
        for file in files
        for line in _run("nm", "-D", f"--{kind}-only", file).splitlines()
        if line.strip()
    }


def _missing(ours: Iterable[Path]) -> list[str]:
    """What the wheel needs that no library of it, of torch, of ours or of Python has."""
    wheel, torch = package("torch_npu"), package("torch")
    mine = [*wheel.glob("lib/*.so"), *wheel.glob("_C*.so")]
    defined = _symbols([*mine, *torch.glob("lib/*.so*"), *ours], "defined")
    have = {name.partition("@")[0] for name in defined}
    need = {name for name in _symbols(mine, "undefined") if "@" not in name} - have
    process = ctypes.CDLL(None)
    skipped = re.compile(r"_?Py|_ITM|__gmon|_ZTH|_ZN3atb")
    return sorted(name for name in need if not skipped.match(name) and not hasattr(process, name))


def _runtime(out: Path) -> None:
    objects: list[Path] = []
    known: set[str] = set()
    for source in (HERE / "runtime.cpp", HERE / "formats.cpp"):
        objects.append(out / f"{source.stem}.o")
        flags = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
        _run("g++", *flags, "-c", "-o", objects[-1], source)
        known |= set(re.findall(r"^API .*?[\s*](\w+)\(", source.read_text(), re.M))
        known |= set(re.findall(r"NOTHING\((\w+)\)", source.read_text()))
    ours = [out / f"lib{name}.so" for name in (*EMPTY, "acl_op_compiler", "nnopbase", "hccl")]
    known |= set(re.findall(r"^API .*?[\s*](acl\w+)\(", (HERE / "opapi.c").read_text(), re.M))
    rest = [name for name in _missing(ours) if name not in known]
    stubs = out / "stubs.c"
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in rest))
    _run("gcc", "-O1", "-fPIC", "-c", "-o", out / "stubs.o", stubs)
    linked = [out / "libascendcl.so", *objects, out / "stubs.o"]
    _run("g++", "-shared", "-o", *linked, "-Wl,-soname,libascendcl.so", "-ldl")


def _opapi(out: Path) -> None:
    """libopapi.so: handles, and for each aclnn call a trampoline through a table."""
    names = entries()
    registers = [f"{16 * i}(%rsp)" for i in range(8)]
    save = "\n".join(f" movups %xmm{i}, {place}" for i, place in enumerate(registers))
    load = "\n".join(f" movups {place}, %xmm{i}" for i, place in enumerate(registers))
    lines = [".section .rodata", *(f'name_{i}: .string "{name}"' for i, name in enumerate(names))]
    lines += [".balign 8", ".globl softnpu_count", f"softnpu_count: .quad {len(names)}"]
    lines += ['.section .data.rel.local,"aw"', ".balign 8", ".globl softnpu_names"]
    lines += ["softnpu_names:", *(f" .quad name_{i}" for i in range(len(names)))]
    lines += [".globl softnpu_table", "softnpu_table:", "table:"]
    lines += [" .quad softnpu_first"] * len(names)
    lines += [".text", ".hidden softnpu_first", ".globl softnpu_first"]
    lines += [".hidden softnpu_missing", ".globl softnpu_missing"]
    lines += [FIRST.format(save=save, load=load)]
    for i, name in enumerate(names):
        for phase in ("GetWorkspaceSize", "GetMaxWorkspaceSize"):
            entry = f"{name}{phase}"
            lines += [f".globl {entry}", f".type {entry},@function", f"{entry}:"]
            lines += [f" lea name_{i}(%rip), %r11", f" lea table+{8 * i}(%rip), %r10"]
            lines += [" jmp *(%r10)"]
        lines += [f".globl {name}", f".type {name},@function", f"{name}: jmp softnpu_execute@PLT"]
    lines += ['.section .note.GNU-stack,"",@progbits', ""]
    (out / "trampolines.s").write_text("\n".join(lines))
    _run(
        *("gcc", "-O1", "-shared", "-fPIC", "-o", out / "libopapi.so"),
        *(HERE / "opapi.c", out / "trampolines.s", f"-L{out}", "-lascendcl", "-ldl"),
        *("-Wl,-rpath,$ORIGIN", "-Wl,-soname,libopapi.so"),
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m qnext.lowering.softnpu.build OUT", file=sys.stderr)
        return 2
    try:
        build(Path(arguments[0]).resolve())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
