"""Device figures, steady-state statistics, loss curves, and the performance record and its rendered tables.

python -m common.perf            rewrite perf_table.md and the tables in the recipes' READMEs from zoo/*/perf.jsonl
python -m common.perf --check    exit code 1 if they differ from what would be written
python -m common.perf --add FILE rows.jsonl of a perf.sh that ran on another machine: adds its rows to the records
"""

import argparse
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common import cli, jsonl, records


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator's figures as its vendor publishes them. None: the source does not give the figure."""

    name: str  # regular expression, searched in the name that the driver reports
    bf16: float  # dense tensor-core TFLOP/s, half of what NVIDIA's sheets print with sparsity
    fp16: float
    fp32: float | None  # without TF32, as torch computes by default
    memory_gb: int
    memory_tb_s: float | None
    link_gb_s: int | None  # NVLink, HCCS or UB, both directions together
    source: str


_A100 = {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}
_H100 = {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0}
_H100_NVL = {"bf16": 835.0, "fp16": 835.0, "fp32": 60.0}
_SHEET = "NVIDIA {} Tensor Core GPU data sheet"
# The first match counts. No public sheet pairs these names with figures: H20, B200 and later, Ascend910B1, B2 and B4
# (the Atlas 800T A2 comes with 313 or 376 TFLOP/s), the lower bins of Ascend910_93xx. They have no row, so no MFU.
DEVICES = [
    Device(name=r"\bH200 NVL", **_H100_NVL, memory_gb=141, memory_tb_s=4.8, link_gb_s=900, source=_SHEET.format("H200")),
    Device(name=r"\bH200\b", **_H100, memory_gb=141, memory_tb_s=4.8, link_gb_s=900, source=_SHEET.format("H200")),
    Device(name=r"\bH100 NVL", **_H100_NVL, memory_gb=94, memory_tb_s=3.9, link_gb_s=600, source=_SHEET.format("H100")),
    Device(name=r"\bH100 PCIe", bf16=756.0, fp16=756.0, fp32=51.0, memory_gb=80, memory_tb_s=2.0, link_gb_s=600,
           source=_SHEET.format("H100")),
    Device(name=r"\bH100 80GB HBM3", **_H100, memory_gb=80, memory_tb_s=3.35, link_gb_s=900, source=_SHEET.format("H100")),
    Device(name=r"\bH800(?! PCIe)\b", **_H100, memory_gb=80, memory_tb_s=None, link_gb_s=400,
           source="DeepSeek-AI, Insights into DeepSeek-V3, arXiv:2505.09343: an H100 SXM but for FP64 and NVLink"),
    Device(name=r"\bA100-SXM4-80GB", **_A100, memory_gb=80, memory_tb_s=2.039, link_gb_s=600, source=_SHEET.format("A100")),
    Device(name=r"\bA100 80GB PCIe", **_A100, memory_gb=80, memory_tb_s=1.935, link_gb_s=600, source=_SHEET.format("A100")),
    Device(name=r"\bA100-\w+-40GB", **_A100, memory_gb=40, memory_tb_s=1.555, link_gb_s=600, source=_SHEET.format("A100")),
    Device(name=r"\bA800 80GB PCIe", **_A100, memory_gb=80, memory_tb_s=1.935, link_gb_s=400, source=_SHEET.format("A800")),
    Device(name=r"\bA800\b(?! 40GB)", **_A100, memory_gb=80, memory_tb_s=2.039, link_gb_s=400, source=_SHEET.format("A800")),
    Device(name=r"\bAscend910B3\b", bf16=313.0, fp16=313.0, fp32=None, memory_gb=64, memory_tb_s=None, link_gb_s=None,
           source="Huawei Atlas 800T A2 training server white paper, its 313 TFLOP/s option"),
    Device(name=r"\bAscend910_939[12]\b", bf16=376.0, fp16=376.0, fp32=None, memory_gb=64, memory_tb_s=1.6, link_gb_s=392,
           source="Huawei, Serving LLMs on CloudMatrix384, arXiv:2506.12708: one die; that its bin reports this name is assumed"),
]  # fmt: skip


def find_device(hardware: str) -> Device | None:
    """Returns the row for a reported device name, None if the table has none."""
    return next((d for d in DEVICES if re.search(d.name, hardware)), None)


def peak_tflops(hardware: str, precision: str) -> float | None:
    """Returns the device's dense peak for the precision, None where the table has none."""
    device = find_device(hardware)
    return getattr(device, precision) if device else None


def figures(hardware: str) -> str:
    """Describes a device's row in one line."""
    device = find_device(hardware)
    if device is None:
        return f"{hardware}: no vendor figures in common/perf.py"
    bandwidth = f"{device.memory_tb_s} TB/s" if device.memory_tb_s else "bandwidth not published"
    link = f"{device.link_gb_s} GB/s" if device.link_gb_s else "not published"
    return (
        f"{hardware}: bf16 {device.bf16:.0f} TFLOP/s dense, {device.memory_gb} GB at {bandwidth}, link {link} "
        f"({device.source})"
    )


# ------------------------------------------------------------------------------------------------------- statistics

WARMUP = 3  # first steps, left out of every summary: allocators, caches and autotuning settle in them


def spread(values: list[float]) -> dict:
    """Returns the median, the 10th and 90th percentile (interpolated between ranks), and the count."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[8], "n": len(values)}


def steady_rows(rows: list[dict], warmup: int = WARMUP) -> list[dict]:
    """Returns the step rows of one process that count: after its warm-up, and not slowed by the profiler."""
    return [row for row in rows[warmup:] if not row.get("profiled")]


def steady(rows: list[dict], warmup: int = WARMUP) -> dict | None:
    """Summarises a run after its warm-up: {"window", "step_time_ms": spread, "samples_per_second", "mfu": medians}.

    rows: step rows of metrics.jsonl, from one process. Returns None if the run ended within its warm-up.
    """
    rows = steady_rows(rows, warmup)
    if not rows:
        return None
    first, last = rows[0]["step"], rows[-1]["step"]
    profiled = last - first + 1 - len(rows)
    mfu = [row["mfu"] for row in rows if row["mfu"] is not None]
    return {
        "window": f"steps {first}-{last}" + (f" without {profiled} profiled" if profiled else ""),
        "step_time_ms": spread([row["step_time_ms"] for row in rows]),
        "samples_per_second": statistics.median(row["samples_per_second"] for row in rows),
        "mfu": statistics.median(mfu) if mfu else None,
    }


def steady_line(summary: dict | None) -> str:
    """Formats the result of `steady` for the console."""
    if summary is None:
        return f"steady state: the run ended within its {WARMUP} steps of warm-up"
    time, mfu = summary["step_time_ms"], "-" if summary["mfu"] is None else f"{summary['mfu']:.3f}"
    return (
        f"steady state, {summary['window']}: {time['median']:.1f} ms a step (p10 {time['p10']:.1f}, p90 {time['p90']:.1f}), "
        f"{summary['samples_per_second']:.3f} samples/s, MFU {mfu}"
    )


def read_metrics(path: Path) -> tuple[dict, list[dict]]:
    """Returns (header, step rows) of a metrics.jsonl. After a resume, the later row of a step counts."""
    rows = jsonl.read(path)
    steps = {row["step"]: row for row in rows if row["kind"] == "step"}
    return next((row for row in rows if row["kind"] == "run"), {}), [steps[k] for k in sorted(steps)]


def plot_loss(metrics: Path, target: Path) -> None:
    """Plots the loss of every step and its running mean as a PNG."""
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


# ----------------------------------------------------------------------------------------------------------- record

ROOT = Path(__file__).parents[1]
QUALITY = ("speed-up", "baseline", "PSNR dB", "SSIM")
BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"


def append(record: Path, row: dict) -> None:
    """Adds a measured row to a recipe's perf.jsonl.

    Raises:
        ValueError: the row's commit is unknown, or its tree has uncommitted changes: nobody could reproduce the row.
    """
    if _is_unclean(row):
        raise ValueError(f"commit {row['commit']}: a row must be reproducible; fix: commit your changes, then --record")
    jsonl.append(record, [row])


def add(file: Path) -> None:
    """Adds the rows that `bench.report` wrote on another machine to the records of their recipes: all of them or none.

    Raises:
        ValueError: the file is missing, has no rows, or has one that is unreadable, torn, of an unknown recipe or there
            already; a row's tree had uncommitted changes, or its commit is not in the history of this checkout.
    """
    rows = list(records.read_json(file))
    if not rows:
        raise ValueError(f"{file} holds no rows; expected rows.jsonl of a perf.sh; fix: --add")
    for line, row in rows:
        where = f"{file}:{line}"
        if not isinstance(row, dict) or not {"recipe", "commit", "task"} <= row.keys():
            raise ValueError(f"{where}: {str(row)[:60]!r} is no row of a perf.sh; expected a whole one; fix: --add")
        record = ROOT / "zoo" / str(row["recipe"]) / "perf.jsonl"
        if not record.is_file():
            raise ValueError(f"{where}: no recipe {row['recipe']!r}; expected a folder of zoo/; fix: --add")
        is_ancestor = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", str(row["commit"]), "HEAD"]
        if _is_unclean(row) or subprocess.run(is_ancestor, capture_output=True).returncode:
            raise ValueError(
                f"{where}: commit {row['commit']} is not in this history, or its tree was not clean; expected a row that "
                "can be reproduced; fix: measure a committed tree"
            )
        if {k: v for k, v in row.items() if k != "recipe"} in read(record):
            raise ValueError(f"{where}: {record} has the row {row['task']!r} of {row['commit']} already; fix: --add")
    for _, row in rows:
        append(ROOT / "zoo" / row.pop("recipe") / "perf.jsonl", row)


def _is_unclean(row: dict) -> bool:
    """Tells whether nobody could reproduce a row, because its code is not in a commit."""
    return row["commit"] in ("unknown", None) or str(row["commit"]).endswith("-dirty")


def read(record: Path) -> list[dict]:
    """Returns the rows of a perf.jsonl."""
    return jsonl.read(record)


def compare(row: dict, record: Path) -> list[str]:
    """Compares a measured row with each published row of the same workload, in total and per device: one line each."""
    task = row["task"].removesuffix(" step")
    same = {k: row[k] for k in ("model", "size", "shape", "precision", "unit")} | {"source": "published", "task": task}
    published = [r for r in read(record) if all(r[k] == value for k, value in same.items())]
    per_device = row["value"] / row["devices"]
    lines = [
        f"published {r['value']} {r['unit']} on {r['devices']} x {r['hardware']} ({r['system']}) = "
        f"{r['value'] / r['devices']:.3g} per device; ours {row['value']} on {row['devices']} x {row['hardware']} = "
        f"{per_device:.3g} per device, {per_device * r['devices'] / r['value']:.3g} x"
        for r in published
    ]
    if not lines:
        return [
            f"no published row has this workload: {', '.join(same[k] for k in ('model', 'task', 'size', 'shape', 'precision'))}"
        ]
    if task != row["task"]:
        lines.append("ours is the step alone: the trainer's overhead and its wait for data are rows of their own")
    return lines


def _spreads(raw: dict) -> str:
    """Formats every spread in a row's raw facts as 'name median (p10-p90)'."""
    groups = {"": raw} | {k: v for k, v in raw.items() if isinstance(v, dict)}
    return (
        ", ".join(f"{k} {v['median']} ({v['p10']}-{v['p90']})".strip() for k, v in groups.items() if "p10" in v) or "-"
    )


def table(record: Path) -> str:
    """Renders one recipe's record as Markdown: one table per model, task and unit, with our measured rows last, or 'not
    measured'. Tables that state a speed-up also show its baseline and quality."""
    rows, text = read(record), []
    if not rows:
        return "Nothing recorded yet.\n"
    for group in dict.fromkeys((r["model"], r["task"], r["unit"]) for r in rows):
        group_rows = [r for r in rows if (r["model"], r["task"], r["unit"]) == group]
        quality = QUALITY if any("speed-up" in r["raw"] for r in group_rows) else ()
        header = [
            "system",
            "size",
            "hardware",
            "devices",
            "setup",
            "precision",
            group[2],
            "median (p10-p90)",
            *quality,
            "MFU",
            "commit",
        ]
        text += [f"**{group[0]}, {group[1]}**", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for r in sorted(group_rows, key=lambda r: r["source"] == "measured"):
            cells = [r[k] for k in ("system", "size", "hardware", "devices", "layout", "precision", "value")]
            cells += [_spreads(r["raw"]), *(r["raw"].get(k) for k in quality), r["mfu"], (r["commit"] or "-")[:7]]
            text.append(f"| {' | '.join('-' if c is None else str(c) for c in cells)} |")
        if not any(r["source"] == "measured" for r in group_rows):
            text.append("| this zoo | | | | | | not measured | | | |")
        text.append("")
    return "\n".join(text)


def rendered() -> dict[Path, str]:
    """Returns every file that holds a rendered table, with the text that it should have."""
    head = (
        "# Performance record\n\nGenerated from `zoo/*/perf.jsonl` by `python -m common.perf`; never edited by hand.\n\n"
        "SPS and FPS are samples and frames per second of the whole cluster, TPS tokens per second per device. MFU counts\n"
        "model FLOPs (recompute not) against the vendor's dense peak in `common/perf.py`; commits are of measured rows.\n"
    )
    files = {}
    for record in sorted(ROOT.glob("zoo/[!_]*/perf.jsonl")):
        head += f"\n## {record.parent.name}\n\n{table(record)}"
        readme = record.parent / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        if rest:
            files[readme] = f"{before}{BEGIN}\n{table(record)}{END}{rest.partition(END)[2]}"
    return {ROOT / "perf_table.md": head} | files


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.perf", description="Render the tables of the records.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is out of date")
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="first add the rows.jsonl of another machine's perf.sh"
    )
    args = parser.parse_args()
    if args.add:
        cli.exit_on_bad_input(add, args.add)
    wrong = [path for path, text in rendered().items() if not path.is_file() or path.read_text() != text]
    if args.check:
        for path in wrong:
            print(f"{path.relative_to(ROOT)} is not what its perf.jsonl renders to; fix: python -m common.perf")
        sys.exit(bool(wrong))
    for path, text in rendered().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
