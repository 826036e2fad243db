"""What a call means, decided once: targets, dtypes, reductions, transforms, and who serves it."""
