"""Claims of the field, tried at small scale: each a short file that a reader can change."""
