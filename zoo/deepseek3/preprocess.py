"""Tokenizes text into an indexed data set for pretraining.

common/language/preprocess.py has the formats and the mechanics.

    bash zoo/deepseek3/preprocess.sh --data corpus/ --weights DeepSeek-V3 --out deepseek3-corpus --workers 32
"""

from common.language import preprocess

from .config import model_config
from .options import PreprocessOptions


def main(o: PreprocessOptions) -> None:
    preprocess.run(o, model_config(o).vocab_size)
