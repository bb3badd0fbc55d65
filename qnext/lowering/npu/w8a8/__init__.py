"""W8A8 on the NPU: its calls, the patterns they take, and the rules."""
