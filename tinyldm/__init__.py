"""tinyldm: a whole Stable Diffusion, small enough to read and to train on a laptop, in NumPy."""

__version__ = "0.1.0"
__all__ = ["Pipeline", "load_weights", "save_weights"]


def __getattr__(name):
    # Loaded on first use: `tinyldm --help` need not wait for NumPy.
    if name == "Pipeline":
        from tinyldm.sampling.pipeline import Pipeline

        return Pipeline
    if name in ("load_weights", "save_weights"):
        from tinyldm.checkpoints import safetensors as weights

        return getattr(weights, name)
    raise AttributeError(f"module 'tinyldm' has no attribute {name!r}")
