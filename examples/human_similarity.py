"""Do cosines agree with people? 50 news items, and how alike people found each two of them (Lee et al., 2005).

python examples/human_similarity.py
"""

import torch
from scipy.stats import pearsonr, spearmanr

import logitless as ll
from data import lee
from vectors import vectors


def main() -> None:
    items, people = lee()
    cosines = ll.pairwise_cosine(vectors(items))
    rows, columns = torch.triu_indices(len(items), len(items), 1)
    ours, theirs = cosines[rows, columns].numpy(), people[rows.numpy(), columns.numpy()]
    print(
        f"{len(ours)} pairs of news items: Spearman {spearmanr(ours, theirs).statistic:.3f}, "
        f"Pearson {pearsonr(ours, theirs).statistic:.3f}"
    )


if __name__ == "__main__":
    main()
