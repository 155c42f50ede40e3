"""What a trigram model makes of the same text: the baseline beside the demo's perplexity."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np


def perplexity(train: str | Path, validation: str | Path, vocabulary: int) -> float:
    """Of the validation documents' tokens, each but a document's first, by counts of the training documents: the
    probability of a trigram, backed off by Witten and Bell's rule (Chen and Goodman, 1999, section 2.5) to the bigram,
    the unigram and 1/vocabulary: p(w | h) = (c(h w) + t(h) p(w | shorter h)) / (c(h) + t(h)), t(h) the number of
    different followers of h."""
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
    surprise, seen = 0.0, 0
    for document in IndexedDataset(str(validation)):
        tokens = tuple(np.asarray(document).tolist())
        for i in range(1, len(tokens)):
            p = 1 / vocabulary
            for order in range(min(i, 2) + 1):
                history = tokens[i - order : i]
                weight = followers[history]
                if totals[history]:
                    p = (counts[history, tokens[i]] + weight * p) / (totals[history] + weight)
            surprise -= math.log(p)
            seen += 1
    return math.exp(surprise / seen)
