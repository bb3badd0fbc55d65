"""How a checkpoint says which of its tensors are int8: compressed-tensors' config, or ModelSlim's.

compressed-tensors (`quantization_config` of config.json, format `int-quantized`) lists targets and
what it ignores; ModelSlim (`quant_model_description.json`) names each tensor's type. Both store
`weight` int8 and `weight_scale`, a row each; ModelSlim adds a `weight_offset` of zeros.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from qnext.errors import CheckpointError
from qnext.functional.checkpoint.shards import FLOATS, Stored
from qnext.functional.layout import Piece
from qnext.functional.quantize import Ignore
from qnext.functional.scheme import check_quantization_config

DESCRIPTION = "quant_model_description.json"
DYNAMIC, FLOAT = "W8A8_DYNAMIC", "FLOAT"


def announced(path: Path, values: Mapping[str, Any]) -> "CompressedTensors | ModelSlim | None":
    """What the checkpoint `path`, with this config.json, says of int8; None: it says nothing.

    Raises ConfigError for a scheme that qnext does not compute, CheckpointError for a bad file.
    """
    description, config = path / DESCRIPTION, values.get("quantization_config")
    if description.is_file():
        return ModelSlim(_read(description))
    return CompressedTensors(config) if config else None


class CompressedTensors:
    """`quantization_config`: what is not ignored is int8."""

    source = "quantization_config of config.json"

    def __init__(self, config: Mapping[str, Any]) -> None:
        check_quantization_config(config)
        self._ignore = Ignore(config.get("ignore") or ())

    def contradictions(self, piece: Piece, dtype: str) -> Iterator[str]:
        if dtype == "I8" and self._ignore.matches(piece.module):
            yield f"{piece.name} is I8, though the {self.source} ignores it"

    def unused(self, stored: Mapping[str, Stored]) -> Iterator[str]:
        for name in stored:
            self._ignore.matches(name.rpartition(".")[0])
            self._ignore.matches(name)
        for entry in list(self._ignore.unused):
            yield f"ignore of {self.source} lists {entry}, which matches nothing in the checkpoint"


class ModelSlim:
    """`quant_model_description.json`: a type for each tensor."""

    source = DESCRIPTION

    def __init__(self, description: Mapping[str, Any]) -> None:
        self._types = {
            name: kind for name, kind in description.items() if "." in name and _is_type(kind)
        }

    def contradictions(self, piece: Piece, dtype: str) -> Iterator[str]:
        kind = self._types.get(piece.name)
        if kind not in (None, DYNAMIC, FLOAT):
            yield f"{piece.name} is {kind} by {self.source}: qnext computes {DYNAMIC} and {FLOAT}"
        elif (dtype == "I8" and kind != DYNAMIC) or (dtype in FLOATS and kind == DYNAMIC):
            yield f"{piece.name} is {dtype}, {self.source} says {kind or 'nothing'}"

    def unused(self, stored: Mapping[str, Stored]) -> Iterator[str]:
        for name in sorted(self._types.keys() - stored.keys()):
            yield f"{self.source} lists {name}, which the checkpoint does not have"


def _is_type(kind: object) -> bool:
    return isinstance(kind, str) and (kind == FLOAT or kind.startswith(("W4", "W8", "W16", "C8")))


def _read(file: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


Announced: TypeAlias = CompressedTensors | ModelSlim
