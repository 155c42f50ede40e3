"""What torchrun starts on every device in place of a job's own module: `-m common.worker zoo.wan21.train [options]`.

It ties the process to the launcher and locks what the job writes, before anything heavy is imported, and then runs the
module as if it had been started itself. Rank 0 has a lock beside the launcher's, which may be killed a moment before its
ranks are: without rank 0 no checkpoint is finished, and nothing gets the name under which it is read.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from common import cli, processes


def main() -> None:
    processes.die_with(int(os.environ["ZOO_LAUNCHER"]))
    processes.die_with_me()
    for out, doing, wait in json.loads(os.environ["ZOO_WRITES"]) if os.environ["RANK"] == "0" else ():
        cli.exit_on_bad_input(processes.hold, Path(out), doing, wait)
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
