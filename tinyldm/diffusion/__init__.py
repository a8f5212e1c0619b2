"""The mathematics of diffusion. It sees arrays and callables, never a network."""
