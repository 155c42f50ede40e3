import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("ZOO_DEVICE", "cpu")  # the suite compares with fp32 on gloo

# Triton decides at the decorator whether a kernel is interpreted, its own library included: so before anything else
# imports it. The variable goes again because inductor reads it too.
if importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    for path in sorted(ROOT.glob("kernels/*.py")):
        importlib.import_module(f"kernels.{path.stem}")
    importlib.import_module("triton.experimental.gluon")  # the first launch would, without the variable, and fail
    del os.environ["TRITON_INTERPRET"]

import common.device  # noqa: E402, F401  before the first import of megatron


def pytest_sessionfinish():
    import ranks

    ranks.stop()
