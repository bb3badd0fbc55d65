"""The files that a benchmark is asked to write."""

from pathlib import Path

from qnext.bench.plot import import_figure
from qnext.errors import InputError


def check_files(figures: Path | None, picture: Path | None) -> None:
    """Refuse at once what could not be written after an hour of measuring."""
    for name, path in (("--json", figures), ("--plot", picture)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InputError(f"{name} {path}: must be a file in a directory that exists")
    if picture is not None:
        if picture.suffix.lower() != ".png":
            raise InputError(f"--plot {picture}: the picture is a PNG, name it .png")
        import_figure()
