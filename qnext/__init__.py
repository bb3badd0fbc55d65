"""Qwen3-Next as pure functions of (params, state, tokens)."""

from importlib.metadata import version as _version

from qnext.embedded import demo as demo
from qnext.embedded import tokenizer as tokenizer
from qnext.errors import CapacityError as CapacityError
from qnext.errors import CheckpointError as CheckpointError
from qnext.errors import ConfigError as ConfigError
from qnext.errors import DonatedError as DonatedError
from qnext.errors import InputError as InputError
from qnext.errors import LoweringError as LoweringError
from qnext.errors import QnextError as QnextError
from qnext.errors import TargetError as TargetError
from qnext.functional.checkpoint import load as load
from qnext.functional.checkpoint import load_state as load_state
from qnext.functional.checkpoint import save as save
from qnext.functional.checkpoint import save_state as save_state
from qnext.functional.config import Config as Config
from qnext.functional.config import Precision as Precision
from qnext.functional.generate import advance as advance
from qnext.functional.generate import generate as generate
from qnext.functional.generate import stream as stream
from qnext.functional.mesh import Mesh as Mesh
from qnext.functional.model import decode as decode
from qnext.functional.model import forward as forward
from qnext.functional.model import prefill as prefill
from qnext.functional.mtp import mtp as mtp
from qnext.functional.params import Params as Params
from qnext.functional.params import Quantized as Quantized
from qnext.functional.params import init_params as init_params
from qnext.functional.quantize import dequantize as dequantize
from qnext.functional.quantize import quantize as quantize
from qnext.functional.sampling import Sampling as Sampling
from qnext.functional.sampling import knobs as knobs
from qnext.functional.sampling import sample as sample
from qnext.functional.shard import shard as shard
from qnext.functional.specs import specs as specs
from qnext.functional.speculate import accept as accept
from qnext.functional.speculate import draft as draft
from qnext.functional.speculate import newest as newest
from qnext.functional.speculate import speculate as speculate
from qnext.functional.state import State as State
from qnext.functional.state import clear as clear
from qnext.functional.state import fork as fork
from qnext.functional.state import init_state as init_state
from qnext.functional.state import narrow as narrow
from qnext.functional.state import select as select
from qnext.functional.state import widen as widen
from qnext.functional.tree import place as place
from qnext.functional.verify import commit as commit
from qnext.functional.verify import rewind as rewind
from qnext.functional.verify import verify as verify
from qnext.lowering.stages import jit as jit
from qnext.runtime.buckets import Buckets as Buckets
from qnext.runtime.parallel import join as join

__version__ = _version("qnext")
