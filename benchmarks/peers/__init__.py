"""qnext beside llama.cpp, each run a process of its own: `python -m benchmarks.peers`."""
