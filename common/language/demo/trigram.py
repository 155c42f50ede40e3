"""The perplexity of a trigram model on the demo's text: the baseline for the demo's own."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np


def perplexity(train: str | Path, validation: str | Path, vocabulary: int) -> float:
    """Returns the perplexity of the validation documents' tokens, without the first of each document, under counts of
    the training documents. A trigram's probability is backed off by Witten and Bell's rule (Chen and Goodman, 1999,
    section 2.5) to the bigram, the unigram and 1/vocabulary. With t(h) the number of different followers of h,

        p(w | h) = (c(h w) + t(h) p(w | shorter h)) / (c(h) + t(h))
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from common import device  # noqa: F401  before the first import of megatron

    counts, followers, totals = Counter(), Counter(), Counter()
    for document in IndexedDataset(str(train)):
        tokens = tuple(np.asarray(document).tolist())
        for i in range(1, len(tokens)):
            for order in range(min(i, 2) + 1):
                history = tokens[i - order : i]
                totals[history] += 1
                counts[history, tokens[i]] += 1
                followers[history] += counts[history, tokens[i]] == 1
    nll, count = 0.0, 0
    for document in IndexedDataset(str(validation)):
        tokens = tuple(np.asarray(document).tolist())
        for i in range(1, len(tokens)):
            p = 1 / vocabulary
            for order in range(min(i, 2) + 1):
                history = tokens[i - order : i]
                weight = followers[history]
                if totals[history]:
                    p = (counts[history, tokens[i]] + weight * p) / (totals[history] + weight)
            nll -= math.log(p)
            count += 1
    return math.exp(nll / count)
