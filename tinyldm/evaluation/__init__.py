"""Judging what was painted: attributes read back, metrics, and pictures to look at."""
