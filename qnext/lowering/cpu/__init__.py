"""This machine: kernels in C++, compiled once, and programs of them without Python in between."""
