"""Benchmarks: `python -m bench` on the CPU, `python -m bench.gpu` on a GPU. They assert nothing."""
