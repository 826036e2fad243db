"""Kernels as operators of torch.library, for graphs that are compiled."""
