"""Qwen3-Next as mathematics: no device, no clock, and no file but in checkpoint.py."""
