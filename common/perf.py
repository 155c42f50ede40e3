"""Device peaks, loss curves, and the performance record with the table rendered from it."""

import json
from pathlib import Path

# Dense bf16 TFLOP/s by the vendors' data sheets; matched against the device's name. No row, no MFU.
PEAKS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "Ascend910B": 313.0}


def peak_tflops(hardware: str, precision: str) -> float | None:
    """The device's dense peak for the precision, None where the table has none."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in PEAKS.items() if name in hardware), None)


def read_metrics(path: Path) -> tuple[dict, list[dict]]:
    """(header, step rows) of a metrics.jsonl; after a resume the later row of a step counts."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = {row["step"]: row for row in rows if row["kind"] == "step"}
    return next(row for row in rows if row["kind"] == "run"), [steps[k] for k in sorted(steps)]


def plot_loss(metrics: Path, target: Path) -> None:
    """The loss curve, every step and its running mean, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, rows = read_metrics(metrics)
    if not rows:
        return
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    window = max(1, len(rows) // 50)
    means = [sum(losses[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot(steps, losses, alpha=0.3, label="step")
    axes.plot(steps, means, label=f"mean of {window + 1} steps")
    axes.set(xlabel="step", ylabel="loss", title=target.parent.name)
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
