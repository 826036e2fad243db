"""The losses and similarities of `torch.nn.functional`, with its names, signatures and semantics.

Changing `import torch.nn.functional as F` to `import logitless.functional as F` changes no result and breaks
nothing; what torch gets plainly wrong is right here (docs/numerics.md). What goes beyond torch is keyword-only.
"""

from logitless.binary import binary_cross_entropy, binary_cross_entropy_with_logits
from logitless.classification import cross_entropy, linear_cross_entropy, nll_loss
from logitless.divergence import kl_div
from logitless.similarity import cosine_embedding_loss, cosine_similarity

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cross_entropy",
    "kl_div",
    "linear_cross_entropy",
    "nll_loss",
]
