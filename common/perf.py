"""Device peaks, loss curves, and the performance record with the table rendered from it.

python -m common.perf            rewrite perf_table.md and the tables in the recipes' READMEs from zoo/*/perf.jsonl
python -m common.perf --check    exit code 1 if they differ from what would be written
"""

import json
import sys
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


ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"


def append(record: Path, row: dict) -> None:
    """Add a measured row to a recipe's perf.jsonl.

    Raises:
        ValueError: the row's commit is unknown or of a tree with uncommitted changes: nobody could reproduce it.
    """
    if row["commit"] == "unknown" or row["commit"].endswith("-dirty"):
        raise ValueError(f"commit {row['commit']}: a row must be reproducible; fix: commit your changes, then --record")
    with open(record, "a") as f:
        f.write(json.dumps(row) + "\n")


def table(record: Path) -> str:
    """One recipe's record as Markdown, a table per model and task, ours last; 'not measured' where we have no row."""
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    text = []
    for model, task in dict.fromkeys((r["model"], r["task"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["task"]) == (model, task)]
        unit = mine[0]["unit"]
        text += [f"**{model}, {task}**", "", f"| system | size | hardware | devices | setup | precision | {unit} |"]
        text += ["|---|---|---|---|---|---|---|"]
        for r in sorted(mine, key=lambda r: r["source"] == "measured"):
            cells = (
                r["system"],
                r["size"],
                r["hardware"],
                r["devices"],
                r["layout"] or "-",
                r["precision"],
                r["value"],
            )
            text.append("| " + " | ".join(str(c) for c in cells) + " |")
        if not any(r["source"] == "measured" for r in mine):
            text.append("| this zoo | | | | | | not measured |")
        text.append("")
    return "\n".join(text)


def rendered() -> dict[Path, str]:
    """Every file that holds a rendered table, as it should be."""
    head = (
        "# Performance record\n\nGenerated from `zoo/*/perf.jsonl` by `python -m common.perf`; never edited by hand.\n\n"
        "SPS and FPS are samples and frames per second of the whole cluster, TPS tokens per second per device.\n"
    )
    files = {}
    for record in sorted(ROOT.glob("zoo/*/perf.jsonl")):
        head += f"\n## {record.parent.name}\n\n{table(record)}"
        readme = record.parent / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        if rest:
            files[readme] = f"{before}{BEGIN}\n{table(record)}{END}{rest.partition(END)[2]}"
    return {ROOT / "perf_table.md": head} | files


def main() -> None:
    wrong = [path for path, text in rendered().items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in wrong:
            print(f"{path.relative_to(ROOT)} is not what its perf.jsonl renders to; fix: python -m common.perf")
        sys.exit(bool(wrong))
    for path, text in rendered().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
