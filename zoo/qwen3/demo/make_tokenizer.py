"""Demo tokenizer: a byte-level BPE of 2,048 tokens with Qwen3's special tokens and conversation format.

    python -m common.language.demo.make_data --out data/demo
    python -m zoo.qwen3.demo.make_tokenizer data/demo/text/train.jsonl

writes `tokenizer/`, a folder that transformers' AutoTokenizer loads. The one in the repository was trained on the texts
of Python 3.11.7. This script does not touch `chat_template.jinja` in that folder, which is written by hand.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 2048
# token -> whether it is special, so that decoding may skip it. Thoughts are text, so their marks are not special.
SPECIAL = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False}


def train(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    # each digit is a token, as in the released tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(text, normalized=False) for text in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=added, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:  # the trainer marks all of them as special
        token["special"] = SPECIAL[token["content"]]
    return Tokenizer.from_str(json.dumps(state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="train.jsonl of make_data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tokenizer")
    args = parser.parse_args()
    texts = [json.loads(line)["text"] for line in args.data.read_text(encoding="utf-8").splitlines()]
    tokenizer = train(texts)
    args.out.mkdir(exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": 2048, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokens = sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts))
    print(
        f"{tokenizer.get_vocab_size()} tokens, {sum(map(len, texts)) / tokens:.2f} characters a token on its own texts"
    )


if __name__ == "__main__":
    main()
