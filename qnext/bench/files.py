"""The files that a command is asked to write."""

from pathlib import Path

from qnext.bench.plot import import_figure
from qnext.errors import InputError


def check_file(option: str, path: Path | None) -> None:
    """Refuse what is asked for by an option and could not be written. Raises InputError."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError(f"{option} {path}: must be a file in a directory that exists")


def check_files(figures: Path | None, picture: Path | None) -> None:
    """Refuse at once what could not be written after an hour of measuring."""
    check_file("--json", figures)
    check_file("--plot", picture)
    if picture is not None:
        if picture.suffix.lower() != ".png":
            raise InputError(f"--plot {picture}: the picture is a PNG, name it .png")
        import_figure()
