"""The backends: each file computes the same rows; `reference` is the definition."""
