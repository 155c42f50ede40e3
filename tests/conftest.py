import gc
import importlib.util
import os
import sys
from pathlib import Path

gc.disable()  # what is imported until the tests begin is no garbage, and a collection looks at a million objects

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("ZOO_DEVICE", "cpu")  # the suite compares in fp32, on gloo

# Triton reads TRITON_INTERPRET where a kernel is decorated, also in its own library. The kernels are therefore imported
# before anything else imports triton. The variable is deleted afterwards, because inductor reads it too.
if importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    for path in sorted(ROOT.glob("kernels/*.py")):
        importlib.import_module(f"kernels.{path.stem}")
    importlib.import_module("triton.experimental.gluon")  # else the first launch does it, unset, and fails
    del os.environ["TRITON_INTERPRET"]

import common.device  # noqa: E402, F401  isort: skip  (before the first import of megatron)
import pytest  # noqa: E402


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def one_rank(request, tmp_path_factory):
    """Makes this process a group of one rank, for a test module that imports its recipe's helper module as `case`."""
    import torch

    from common import parallel

    store = tmp_path_factory.mktemp("store") / "store"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        parallel.initialize(request.module.case.options())
        yield
        parallel.shutdown()


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Makes a folder of undamaged videos. Each frame shows its own number."""
    from video_case import clip

    folder = tmp_path_factory.mktemp("clips")
    clip(folder / "fast.mp4", frames=120, faststart=True)
    clip(folder / "a.mp4", frames=60)
    clip(folder / "b.mp4", frames=40)
    clip(folder / "c.mp4", frames=50, fps=16)
    return folder
