"""Kernels as differentiable operations in eager mode."""
