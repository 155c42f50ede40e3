"""The memory of a training step: fake tensors count as real ones do, and --dry-run's estimate is near the count."""

from importlib import import_module
from unittest import mock

import pytest
import wan_case as case
from ranks import run_ranks

from common import memory as counting

pytestmark = pytest.mark.L3

BUCKET = case.config.Bucket(17, 256, 320)  # 1,600 tokens


def measured(layouts: list[tuple[str, int, dict]], fake: bool = True) -> dict[str, tuple[int, int, float]]:
    """Returns {name of a layout: (peak bytes, bytes between steps, estimated bytes)}."""
    memory = import_module(f"zoo.{case.RECIPE}.memory")
    config, rows, counted = case.config.SIZES["tiny"], {}, counting.counted
    with mock.patch.object(counting, "counted", counted if fake else lambda fake: counted(False)):
        for name, ranks, layout in layouts:
            o = memory.options(ranks, {"size": "tiny", "precision": "fp32"} | layout, config, BUCKET)
            estimate = memory.memory_estimate(
                o, config, config.tokens(case.config.latent_grid(BUCKET)), memory.trained_parameters(o, config)
            )
            rows[name] = *memory.measure(o, config, BUCKET), estimate
    return rows


def features() -> list[tuple[str, int, dict]]:
    memory = import_module(f"zoo.{case.RECIPE}.memory")
    return [(name, *case_) for name, case_ in memory.FEATURES.items()]


def test_fake_tensors_count_as_real_ones():
    fake, real = (run_ranks(1, measured, [("plain", 1, {})], kind)[0]["plain"] for kind in (True, False))
    assert fake[:2] == pytest.approx(real[:2], rel=1e-4)  # except for some scalars
    config = case.config.SIZES["tiny"]
    video, rope = 4 * 16 * 5 * 32 * 40, 4 * 1600 * config.head_dim  # the batch, and the angles of its tokens
    # The rest are weights, gradients and two moments, all fp32.
    assert fake[1] == pytest.approx(16 * config.parameters + video + rope, rel=1e-3)


def test_memory_estimate_is_within_an_eighth_of_the_measurement():
    rows = run_ranks(1, measured, features())[0]
    ratios = {name: estimate / peak for name, (peak, _, estimate) in rows.items()}
    assert not {name: ratio for name, ratio in ratios.items() if not 0.875 <= ratio <= 1.125}, ratios
    plain = rows.pop("plain")
    assert all(peak < plain[0] for peak, _, _ in rows.values())
