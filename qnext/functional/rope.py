"""Rotary position frequencies: which angle each channel pair turns by per position.

`default` is RoPE (arXiv:2104.09864); `linear` divides positions by a factor; `yarn` stretches the
slow channels only and warms the attention up a little (arXiv:2309.00071), as Qwen3-Next's model
card recommends beyond 262,144 tokens. Only the first `partial` share of a head is rotated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qnext.errors import ConfigError

ROPE_TYPES = ("default", "linear", "yarn")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary part of a config; `factor` and what follows it are read by `linear` and `yarn`."""

    theta: float = 10_000.0
    partial: float = 0.25
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 32_768
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "Rope":
        """Read `rope_parameters` (transformers 5) or the flat keys and `rope_scaling` (4)."""
        given = {name: values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
        for name in ("rope_scaling", "rope_parameters"):
            part = values.get(name) or {}
            if not isinstance(part, Mapping) or any(isinstance(v, Mapping) for v in part.values()):
                raise ConfigError(f"{name} must be one object, for all layers, got {part!r}")
            given |= part
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ConfigError(
                f"rope_type {kind!r} is not known: qnext computes {', '.join(ROPE_TYPES)}. "
                'Without scaling, write "rope_parameters": {"rope_type": "default", ...}.'
            )
        rope = cls(
            theta=_number(given, "rope_theta", cls.theta, above=1.0),
            partial=_number(given, "partial_rotary_factor", cls.partial),
            kind=kind,
        )
        return rope if kind == "default" else rope.scaled(given, values)

    def scaled(self, given: Mapping[str, Any], values: Mapping[str, Any]) -> "Rope":
        """This rope with the parameters of a scaled kind, which must be there."""
        longest = _number(values, "max_position_embeddings", 32_768.0)
        original = _number(given, "original_max_position_embeddings", longest)
        # as transformers does: the ratio where no factor is written, the outer key before the inner
        original = _number(values, "original_max_position_embeddings", original)
        yarn = self.kind == "yarn"
        ratio = longest / original if yarn and original < longest else 0.0
        factor = _number(given, "factor", ratio)
        if factor < 1:
            raise ConfigError(
                f'rope_type "{self.kind}" needs "factor" >= 1 in its rope parameters, '
                f"got {given.get('factor')!r}"
            )
        if not yarn:
            return replace(self, factor=factor)
        return replace(
            self,
            factor=factor,
            original_positions=int(original),
            attention_factor=_number(given, "attention_factor", _yarn_warmth(factor, given)),
            beta_fast=_number(given, "beta_fast", 32.0),
            beta_slow=_number(given, "beta_slow", 1.0),
            truncate=bool(given.get("truncate", True)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` entry that `from_hf` reads back."""
        values: dict[str, Any] = {
            "rope_type": self.kind,
            "rope_theta": self.theta,
            "partial_rotary_factor": self.partial,
        }
        if self.kind != "default":
            values["factor"] = self.factor
        if self.kind == "yarn":
            values |= {
                "original_max_position_embeddings": self.original_positions,
                "attention_factor": self.attention_factor,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "truncate": self.truncate,
            }
        return values

    def rotated_channels(self, head_dim: int) -> int:
        """How many leading channels of a head are rotated; even."""
        return 2 * math.ceil(int(head_dim * self.partial) / 2)

    def frequencies(self, head_dim: int, device: torch.device) -> Float[Tensor, " pairs"]:
        """Radians per position for each rotated channel pair, in float32."""
        channels = int(head_dim * self.partial)
        exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
        fast = 1.0 / self.theta**exponent
        if self.kind == "default":
            return fast
        slow = 1.0 / (self.factor * self.theta**exponent)
        if self.kind == "linear":
            return fast / self.factor
        stretch = self._stretch(channels, device)
        return slow * stretch + fast * (1 - stretch)

    def _stretch(self, channels: int, device: torch.device) -> Float[Tensor, " pairs"]:
        """YaRN's ramp: 0 for channels that turn often in the trained range, 1 for slow ones."""

        def channel_of(rotations: float) -> float:
            span = math.log(self.original_positions / (rotations * 2 * math.pi))
            return channels * span / (2 * math.log(self.theta))

        low, high = channel_of(self.beta_fast), channel_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, channels - 1)
        pair = torch.arange((channels + 1) // 2, dtype=torch.float32, device=device)
        return ((pair - low) / max(high - low, 0.001)).clamp(0, 1)


def _number(values: Mapping[str, Any], name: str, default: float, above: float = 0.0) -> float:
    """A finite number above a bound, or the default where the key is absent or null."""
    value = values.get(name)
    if value is None:
        return float(default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not above < value < math.inf:
        raise ConfigError(f"{name} must be a number > {above:g}, got {value!r}")
    return float(value)


def _yarn_warmth(factor: float, given: Mapping[str, Any]) -> float:
    """The factor on cos and sin that YaRN derives from the stretch, where none is written."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    names = ("mscale", "mscale_all_dim")
    above, below = (_number(given, name, 0.0, above=-math.inf) for name in names)
    return mscale(above) / mscale(below) if above and below else mscale(1.0)
