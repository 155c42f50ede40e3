"""Text -> an indexed data set for pretraining. The formats and the mechanics are in common/language/preprocess.py.

    bash zoo/qwen3/preprocess.sh --data corpus/ --weights Qwen3-8B --out qwen3-corpus --workers 32

No torch here: options are checked before anything heavy is imported.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from common.cli import option
from common.language import preprocess
from common.language.preprocess import run

from .config import model_config
from .data import DOCUMENT_END

HERE = Path(__file__).parent
DEMO_TEXT = HERE.parents[1] / "data" / f"{HERE.name}-demo" / "text"
DEMO_TOKENIZER = HERE / "demo" / "tokenizer"


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(preprocess.PreprocessOptions):
    end: str = option("token that ends every document", DOCUMENT_END, group="data")


def checked(o: PreprocessOptions, vocab_size: int) -> PreprocessOptions:
    """The options with their defaults filled in.

    Raises:
        ValueError: there is no tokenizer, or what `common.language.preprocess.check` refuses.
    """
    tokenizer = o.tokenizer or o.weights or (DEMO_TOKENIZER if o.size.startswith("tiny") else None)
    if tokenizer is None:
        raise ValueError(f"size {o.size} has no tokenizer of its own; fix: --tokenizer, or --weights with one")
    o = dataclasses.replace(o, data=o.data or DEMO_TEXT / "train.jsonl", tokenizer=tokenizer)
    return preprocess.check(o, vocab_size, DEMO_TEXT)


def main(o: PreprocessOptions) -> None:
    from .demo import make_data

    if o.data.parent == DEMO_TEXT:
        make_data.make(DEMO_TEXT)
    run(o, model_config(o).vocab_size)
