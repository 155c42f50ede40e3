"""The performance record: its table, its refusal of irreproducible rows, and the FLOPs formula behind every MFU."""

import json

import pytest
import torch
import wan_case as case
from torch.utils.flop_counter import FlopCounterMode

from common import perf

pytestmark = pytest.mark.L1


def test_tables_are_what_the_records_render_to():
    assert not [str(path) for path, text in perf.rendered().items() if path.read_text() != text]


@pytest.mark.parametrize("commit", ["unknown", "0123456789ab-dirty"])
def test_a_row_from_an_uncommitted_tree_is_refused(commit, tmp_path):
    with pytest.raises(ValueError, match="reproducible"):
        perf.append(tmp_path / "perf.jsonl", {"commit": commit})
    assert not list(tmp_path.iterdir())


def test_a_committed_row_is_appended(tmp_path):
    perf.append(tmp_path / "perf.jsonl", {"commit": "0123456789ab", "value": 1})
    assert json.loads((tmp_path / "perf.jsonl").read_text())["value"] == 1


def test_unknown_hardware_has_no_mfu():
    assert perf.peak_tflops("Some CPU", "bf16") is None
    assert perf.peak_tflops("NVIDIA H200", "bf16") == 989.0


@pytest.mark.parametrize("size", ["tiny", "1.3B"])
def test_flops_formula_agrees_with_a_counted_run(size):
    from diffusers import WanTransformer3DModel

    config, grid = case.config.SIZES[size], (3, 8, 12)
    values = {k: v for k, v in config.to_diffusers().items() if not k.startswith("_")}
    with torch.device("meta"):
        model = WanTransformer3DModel(**values | {"patch_size": tuple(values["patch_size"])})
        inputs = torch.empty(1, 16, *grid), torch.empty(1), torch.empty(1, config.text_len, config.text_dim)
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
    assert config.flops(grid) == pytest.approx(counter.get_total_flops(), rel=0.01)
