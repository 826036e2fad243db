"""Who computes: the interface that every backend offers, the definitions, and the backends, a file or folder each."""
