"""Reading and writing files: checkpoints in Hugging Face's format, and states.

Nothing is read before the headers of all shards agree with the config, and nothing half-written
ever has its final name.
"""

from qnext.functional.checkpoint.read import load as load
from qnext.functional.checkpoint.states import load_state as load_state
from qnext.functional.checkpoint.states import save_state as save_state
from qnext.functional.checkpoint.states import state_tokens as state_tokens
from qnext.functional.checkpoint.write import save as save
