"""Evaluation of generated images: attributes read back, metrics, and figures to look at."""
