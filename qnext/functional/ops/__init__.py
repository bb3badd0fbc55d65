"""The primitives: every operation of the model that lowering knows by name."""

from qnext.functional.ops.attention import attention as attention
from qnext.functional.ops.attention import kv_write as kv_write
from qnext.functional.ops.collective import all_gather as all_gather
from qnext.functional.ops.collective import all_reduce as all_reduce
from qnext.functional.ops.collective import all_to_all as all_to_all
from qnext.functional.ops.collective import reduce_scatter as reduce_scatter
from qnext.functional.ops.delta_rule import delta_gates as delta_gates
from qnext.functional.ops.delta_rule import delta_rule as delta_rule
from qnext.functional.ops.dispatch import combine as combine
from qnext.functional.ops.dispatch import dispatch as dispatch
from qnext.functional.ops.moe import experts as experts
from qnext.functional.ops.moe import route as route
from qnext.functional.ops.moe import swiglu as swiglu
from qnext.functional.ops.noise import gumbel as gumbel
from qnext.functional.ops.norm import gated_rms_norm as gated_rms_norm
from qnext.functional.ops.norm import l2_norm as l2_norm
from qnext.functional.ops.norm import rms_norm as rms_norm
from qnext.functional.ops.primitive import PRIMITIVES as PRIMITIVES
from qnext.functional.ops.primitive import Primitive as Primitive
from qnext.functional.ops.primitive import Tolerance as Tolerance
from qnext.functional.ops.quant import int8_experts as int8_experts
from qnext.functional.ops.quant import int8_linear as int8_linear
from qnext.functional.ops.quant import quantize_tokens as quantize_tokens
from qnext.functional.ops.rotary import rotary as rotary
from qnext.functional.ops.short_conv import short_conv as short_conv
