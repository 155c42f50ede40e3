import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("ZOO_DEVICE", "cpu")  # the suite compares with fp32 on gloo

import common.device  # noqa: E402, F401  before the first import of megatron


def pytest_sessionfinish():
    import ranks

    ranks.stop()
