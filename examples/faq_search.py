"""Text search: of 468 real questions, how many find their own answer among 468?

    python examples/faq_search.py ["a question of your own"]

A question is a heading of perlfaq or of Python's FAQ, and its answer is the section below it. Other answers may help
too, so the figures are a lower bound.
"""

import sys

import torch

import logitless as ll
from data import faq
from vectors import vectors


def ndcg(ranks: torch.Tensor, cut: int = 10) -> float:
    """Return the mean discounted gain where each query has one relevant answer, whose gain is 1 at most."""
    return torch.where(ranks <= cut, 1 / torch.log2(ranks.double() + 1), 0).mean().item()


def main() -> None:
    questions, answers = zip(*faq(), strict=True)
    query, corpus = vectors(questions), vectors(answers)
    ranks = ll.paired_ranks(query, corpus)
    told = ranks.metrics()
    print(
        f"{len(questions)} questions: recall@1 {told['image_to_text_R@1']:.3f}, "
        f"recall@10 {told['image_to_text_R@10']:.3f}, nDCG@10 {ndcg(ranks.image_to_text):.3f}, "
        f"median rank {told['image_to_text_median_rank']:.0f}"
    )
    for asked in sys.argv[1:]:
        scores, ids = ll.cosine_topk(vectors([asked]), corpus, 3)
        for score, number in zip(scores[0].tolist(), ids[0].tolist(), strict=True):
            print(f"{score:.3f}  {questions[number]}")


if __name__ == "__main__":
    main()
