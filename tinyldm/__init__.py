"""tinyldm: a whole Stable Diffusion, small enough to read and to train on a laptop, in NumPy."""

__version__ = "0.1.0"
