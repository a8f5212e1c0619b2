"""Training both stages, and the state that survives anything."""
