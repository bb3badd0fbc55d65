"""Compile the kernels for this machine, once: the library lies in the user's cache directory.

Its name is a digest of the sources, the compiler, its flags and what the compiler says the machine
can do, so that another machine at the same home directory, or another version, has its own.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from platformdirs import user_cache_path
from tqdm import tqdm

from qnext.errors import TargetError

KERNELS = Path(__file__).parent / "kernels"
COMPILERS = ("g++", "clang++", "c++")
# sources say which products and sums are fused; everything that would change NaN, infinity or the
# order of a sum beyond what `omp simd` names stays off
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp-simd"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
ISAS = {"native": ("-march=native",), "avx2": ("-mavx2", "-mfma"), "portable": ()}


def library(isa: str = "native", cache: Path | None = None) -> Path:
    """The compiled kernels, made on first use; TargetError says what is missing or went wrong."""
    cache = cache or user_cache_path("qnext") / "kernels"
    compiler = compiler_here()
    if compiler is None:
        raise TargetError(
            f"target 'cpu' compiles its kernels and there is none of {', '.join(COMPILERS)}: "
            "apt install g++, or lower for target 'reference'"
        )
    flags = (*FLAGS, *ISAS[isa])
    built = cache / f"{_fingerprint(compiler, flags)}.so"
    if built.is_file():
        return built
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(built.with_suffix(".lock")):
            if not built.is_file():  # another process may have been faster
                _compile(compiler, flags, built)
    except OSError as error:
        raise TargetError(f"the kernels cannot be written to {cache}: {error.strerror}") from None
    return built


def compiler_here() -> str | None:
    """The first of the known compilers that this machine has."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def _fingerprint(compiler: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(flags).encode())
    machine = [compiler, *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    digest.update(_run(machine).encode())  # the compiler's version and the machine's instructions
    for source in sorted(KERNELS.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _compile(compiler: str, flags: Sequence[str], built: Path) -> None:
    """Objects of all sources side by side, then one library, renamed into place when whole."""
    sources = sorted(KERNELS.glob("*.cpp"))
    with TemporaryDirectory(dir=built.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        jobs = [
            subprocess.Popen(
                [compiler, *flags, "-c", "-o", made, source], stderr=subprocess.PIPE, text=True
            )
            for source, made in zip(sources, objects, strict=True)
        ]
        complaints = [
            job.communicate()[1]
            for job in tqdm(jobs, desc="compiling the cpu kernels, once", leave=False, unit="file")
        ]
        if wrong := [text for job, text in zip(jobs, complaints, strict=True) if job.returncode]:
            raise _failed(compiler, wrong[0])
        whole = Path(scratch) / "kernels.so"
        _run([compiler, "-shared", "-o", str(whole), *map(str, objects)])
        whole.rename(built)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise _failed(command[0], done.stderr)
    return done.stdout


def _failed(compiler: str, message: str) -> TargetError:
    return TargetError(
        f"target 'cpu' compiles its kernels and {compiler} failed, lower for target 'reference' "
        f"or mend this:\n{message.strip()}"
    )
