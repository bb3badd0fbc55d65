"""Type checks of what is not about shapes: imported before anything of the packages is.

jaxtyping's hook, which the command line asks for, binds the arguments of every call. Functions of
nodes and requests are called by the million, and need no more than beartype's.
"""

from beartype import BeartypeConf
from beartype.claw import beartype_packages

# with shapes in their annotations, or names that are imported for type checkers alone
BY_JAXTYPING = (
    "qnext.runtime.steps",
    "qnext.lowering.compiled",
    "qnext.lowering.page",
    "qnext.lowering.npu.capture",
)
# arguments and results; local variables are mypy's
CONF = BeartypeConf(claw_is_pep526=False, claw_skip_package_names=BY_JAXTYPING)

beartype_packages(("qnext.lowering", "qnext.runtime"), conf=CONF)
