"""Triton's names of dtypes; importing it imports Triton."""

import torch
import triton.language as tl

LANGUAGE_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
