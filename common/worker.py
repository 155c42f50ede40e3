"""The program that torchrun starts on every device: `-m common.worker zoo.wan21 train`.

Before it imports anything heavy, it ties the process to the launcher and locks what the job writes. Then it imports the
device first, joins the groups of the layout and calls the job's `main(o)`. The launcher has resolved and checked the
options; they come in the environment, and nothing is parsed or checked again.

Rank 0 has its own lock beside the launcher's, because the launcher may be killed a moment before its ranks. Rank 0 is
enough: without it no checkpoint is finished, and no output gets the name under which it is read.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from common import cli, processes


def main() -> None:
    recipe, script = sys.argv[1:]
    processes.die_with(int(os.environ["ZOO_LAUNCHER"]))
    processes.die_with_me()
    for out, doing, wait in json.loads(os.environ["ZOO_WRITES"]) if os.environ["RANK"] == "0" else ():
        cli.exit_on_bad_input(processes.lock, Path(out), doing, wait)
    options = importlib.import_module(f"{recipe}.options").JOBS[script][0]
    cli.exit_on_bad_input(run, recipe, script, cli.from_json(options, os.environ["ZOO_OPTIONS"]))


def run(recipe: str, script: str, o: Any) -> None:
    """Runs the job `script` with its options in this process, which torchrun started. A job without a layout runs on
    rank 0 alone, which divides the work itself."""
    if not isinstance(o, cli.LayoutOptions):
        if os.environ.get("RANK", "0") == "0":
            _imported(f"{recipe}.{script}").main(o)
        return
    from common import device  # isort: skip  (before anything that imports megatron)
    from common import ops, parallel

    job = _imported(f"{recipe}.{script}")
    parallel.initialize(o)
    if device.KIND == "cuda" and os.environ["RANK"] == "0":
        cli.say(f"attention runs on {ops.describe_attention()}")
    job.main(o)
    parallel.shutdown()


def _imported(name: str) -> Any:
    """Imports a module with all libraries that it needs. Python's garbage collector does not run meanwhile, and later
    it leaves out what was imported: half a million objects, which take it half a second."""
    gc.disable()
    module = importlib.import_module(name)
    gc.freeze()
    gc.enable()
    return module


if __name__ == "__main__":
    main()
