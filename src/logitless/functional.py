"""The losses and similarities of `torch.nn.functional`, with its names, signatures and semantics.

Changing `import torch.nn.functional as F` to `import logitless.functional as F` changes no result and breaks
nothing; what torch gets plainly wrong is right here (docs/numerics.md). What goes beyond torch is keyword-only.
Importing this makes torch's functions of the same names mean these for logits that are not built.
"""

import torch.nn.functional as F

from logitless.lazy.log_probs import log_probs_of
from logitless.lazy.proxy import give_meaning
from logitless.losses.binary import binary_cross_entropy, binary_cross_entropy_with_logits
from logitless.losses.classification import cross_entropy, linear_cross_entropy, nll_loss
from logitless.losses.divergence import kl_div
from logitless.losses.similarity import cosine_embedding_loss, cosine_similarity

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

give_meaning(F.log_softmax, log_probs_of)
give_meaning(F.cross_entropy, cross_entropy)
give_meaning(F.binary_cross_entropy_with_logits, binary_cross_entropy_with_logits)
