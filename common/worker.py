"""What torchrun starts on every device: `-m common.worker zoo.wan21 train`.

It ties the process to the launcher and locks what the job writes, before anything heavy is imported. Then it imports the
device first, joins the groups of the layout and calls `main(o)` of the job with the options that the launcher has
resolved and checked: they come in the environment, and nothing is parsed or checked again. Rank 0 has a lock beside the
launcher's, which may be killed a moment before its ranks are: without rank 0 no checkpoint is finished, and nothing gets
the name under which it is read.
"""

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
        cli.exit_on_bad_input(processes.hold, Path(out), doing, wait)
    options = importlib.import_module(f"{recipe}.options").JOBS[script][0]
    cli.exit_on_bad_input(run, recipe, script, cli.from_json(options, os.environ["ZOO_OPTIONS"]))


def run(recipe: str, script: str, o: Any) -> None:
    """The job `script` with its options, in this process, which is one of torchrun's. A job without a layout is the work
    of one process, which divides it itself: rank 0's."""
    if not isinstance(o, cli.LayoutOptions):
        if os.environ.get("RANK", "0") == "0":
            importlib.import_module(f"{recipe}.{script}").main(o)
        return
    from common import device  # noqa: F401  isort: skip  (before anything that imports megatron)
    from common import parallel

    job = importlib.import_module(f"{recipe}.{script}")
    parallel.initialize(o)
    job.main(o)
    parallel.shutdown()


if __name__ == "__main__":
    main()
