"""Text -> an indexed data set for pretraining.

Formats and mechanics are in common/language/preprocess.py.

    bash zoo/qwen3/preprocess.sh --data corpus/ --weights Qwen3-8B --out qwen3-corpus --workers 32
"""

from common.language import preprocess

from .config import model_config
from .options import PreprocessOptions


def main(o: PreprocessOptions) -> None:
    preprocess.run(o, model_config(o).vocab_size)
