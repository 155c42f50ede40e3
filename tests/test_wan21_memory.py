"""What a training step takes: fake tensors count as real ones do, and the estimate of --dry-run beside the count."""

from importlib import import_module
from unittest import mock

import pytest
import wan_case as case
from ranks import run_ranks

from common import memory as counting

pytestmark = pytest.mark.L3

BUCKET = case.config.Bucket(17, 256, 320)  # 1,600 tokens


def measured(layouts: list[tuple[str, int, dict]], fake: bool = True) -> dict[str, tuple[int, int, float]]:
    """{name: (peak, bytes between steps, estimate)}."""
    memory = import_module(f"zoo.{case.RECIPE}.memory")
    config, found, counted = case.config.SIZES["tiny"], {}, counting.counted
    with mock.patch.object(counting, "counted", counted if fake else lambda fake: counted(False)):
        for name, ranks, layout in layouts:
            o = memory.options(ranks, {"size": "tiny", "precision": "fp32"} | layout, config, BUCKET)
            estimate = memory.memory_estimate(
                o, config, config.tokens(case.config.latent_grid(BUCKET)), memory.trained_parameters(o, config)
            )
            found[name] = *memory.measure(o, config, BUCKET), estimate
    return found


def features() -> list[tuple[str, int, dict]]:
    memory = import_module(f"zoo.{case.RECIPE}.memory")
    return [(name, *case_) for name, case_ in memory.FEATURES.items()]


def test_fake_tensors_count_as_real_ones():
    fake, real = (run_ranks(1, measured, [("plain", 1, {})], kind)[0]["plain"] for kind in (True, False))
    assert fake[:2] == pytest.approx(real[:2], rel=1e-4)  # but for some scalars
    config = case.config.SIZES["tiny"]
    video, rope = 4 * 16 * 5 * 32 * 40, 4 * 1600 * config.head_dim  # the batch, and the angles of its tokens
    # And weights, gradients and moments, all fp32.
    assert fake[1] == pytest.approx(16 * config.parameters + video + rope, rel=1e-3)


def test_memory_estimate_is_within_an_eighth_of_the_measurement():
    found = run_ranks(1, measured, features())[0]
    off = {name: estimate / peak for name, (peak, _, estimate) in found.items()}
    assert not {name: ratio for name, ratio in off.items() if not 0.875 <= ratio <= 1.125}, off
    plain = found.pop("plain")
    assert all(peak < plain[0] for peak, _, _ in found.values())
