"""Kernels of the CPU: blocks that fit its caches, threads and processes on all cores."""
