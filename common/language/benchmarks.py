"""Benchmarks that are the same for every language model: generation, compared with transformers' `generate`, and
preprocessing, compared with the tokenizer alone. The benchmark of the training step is in common/bench.py."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from common import bench, device, perf
from common.bench import OURS, rounded, timed

from . import preprocess
from .generate import generate as generate_answers
from .options import Demo, InferOptions
from .pool import in_order

PROMPT, ANSWER = 128, 64  # tokens
TEXT = 30_000_000  # characters to tokenize


def generate(o, model: torch.nn.Module, peer: torch.nn.Module, vocabulary: int) -> Iterator[dict]:
    """Measures greedy generation with a key-value cache, for one prompt and for eight; yields the result rows. `model`
    and `peer`, transformers' model with the same weights, run in turns, at least three timed ones for each batch and
    more while they fit in half of the time budget. In fp32, a batch whose answers differ becomes a refused row.

    o: the options of perf.sh. vocabulary: the prompts' tokens are drawn below this id.
    """
    for batch in (1, 8):
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(vocabulary, (batch, PROMPT), generator=generator).to(device.current())
        options = InferOptions(prompt="", max_new_tokens=ANSWER, batch=batch)
        lists, decoders, length = prompts.tolist(), [], {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER}

        def run_ours(lists=lists, options=options, decoders=decoders):
            return generate_answers(model, lists, options, set(), decoders=decoders)

        @torch.no_grad()
        def run_peer(prompts=prompts, length=length):
            return peer.generate(prompts, **length, do_sample=False, eos_token_id=None, pad_token_id=0)[:, PROMPT:]

        spent = seconds, peer_seconds = [], []
        most = max(bench.FEWEST, o.repeats // 4)
        while len(seconds) <= most and (len(seconds) <= bench.FEWEST or sum(map(sum, spent)) < bench.SECONDS / 2):
            elapsed, answers = timed(run_ours)
            peer_elapsed, peer_answers = timed(run_peer)
            seconds.append(elapsed)
            peer_seconds.append(peer_elapsed)
        task = f"generate, batch {batch}"
        same = sum(a == b for a, b in zip(answers, peer_answers.tolist(), strict=True))
        if same < batch and o.precision == "fp32":
            why = f"{batch - same} of {batch} answers are not transformers'"
            yield {"task": task, "refused": why, "system": OURS}
            continue
        rates, peer_rates = ([batch * ANSWER / s for s in elapsed[1:]] for elapsed in (seconds, peer_seconds))
        ratio = bench.median_ratio(rates, peer_rates)
        shape = {"shape": f"{batch} x ({PROMPT} + {ANSWER})"}
        raw = {"rate": rounded(perf.spread(rates)), "equal answers": f"{same} of {batch}"}
        peer_row = {
            "system": f"transformers {transformers.__version__}",
            "raw": {"rate": rounded(perf.spread(peer_rates))},
        }
        row = {"task": task, "unit": "tokens/s", "devices": 1} | shape
        yield row | {"value": round(statistics.median(rates), 1), "raw": raw}
        yield row | {"value": round(statistics.median(peer_rates), 1)} | peer_row
        yield shape | {"task": f"{task}, ratio to transformers", "unit": "x", "value": ratio, "raw": {}}


def tokenize(o, text: Path, vocabulary: int, demo: Demo, end: str) -> list[dict]:
    """Measures the preprocessing of a file of documents, repeated to at least TEXT characters, against the tokenizer
    library's encode_batch_fast alone in as many processes; returns the result row.

    text: a .jsonl of {"text": document}. vocabulary: the size of the vocabulary of the demo's tokenizer. end: its token
    that ends a document.
    """
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    copies = -(-TEXT // sum(map(len, documents)))
    workers, rates, alone = os.cpu_count(), [], []
    with tempfile.TemporaryDirectory(dir=o.out.parent if o.out.parent.is_dir() else None) as folder:
        file = Path(folder) / "text.jsonl"
        file.write_text(text.read_text() * copies)
        size = copies * sum(len(document.encode()) for document in documents) / 1e6  # MB
        options = preprocess.PreprocessOptions(data=file, workers=workers, out=Path(folder) / "out", end=end)
        options = preprocess.check(options, vocabulary, demo)
        tokenizer, _ = preprocess.load_tokenizer(options, vocabulary)

        def encode(some: list[str]) -> int:
            batches = (some[i : i + preprocess.BATCH] for i in range(0, len(some), preprocess.BATCH))
            return sum(
                len(e.ids) for part in batches for e in tokenizer.encode_batch_fast(part, add_special_tokens=False)
            )

        shares = [(documents * copies)[i::workers] for i in range(workers)]
        for _ in range(3):  # the two run in turns
            start = time.perf_counter()
            # Each worker gets many shards, as with a large corpus, so that no worker waits for another at the end.
            counts = preprocess.run(options, vocabulary, TEXT // (8 * workers))
            rates.append(size / (time.perf_counter() - start))
            start = time.perf_counter()
            tokens = sum(in_order(encode, shares, workers))
            alone.append(size / (time.perf_counter() - start))
            assert tokens + counts["documents"] == counts["tokens"], (tokens, counts)
            for path in Path(folder).glob("out*"):
                path.unlink()
    raw = {"MB/s": rounded(perf.spread(rates)), "tokenizer alone MB/s": rounded(perf.spread(alone)), "workers": workers}
    return [{"task": "preprocess", "size": "demo tokenizer", "layout": None, "precision": "-", "shape": None, "devices": 1,
             "value": bench.median_ratio(rates, alone), "unit": "x the tokenizer's rate", "raw": raw}]  # fmt: skip
