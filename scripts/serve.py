"""A page in the browser on which to look at a finished run.

    python scripts/serve.py --run runs/NAME
    python scripts/serve.py --run runs/NAME --port 8000

Choose a user, or type what a new one took: the lists of student and control side by side and what
moved, the teacher's order of the same candidates, reasons where the run has rationales, and the
curves of its training. Only this machine can open it, unless --host says otherwise.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from cotrain.errors import ConfigError, CotrainError


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = made.add_argument
    add("--run", required=True, help="Folder of a finished run.")
    add("--host", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1, which only "
        "this machine reaches.")
    add("--port", type=int, default=7860, help="Default: 7860; 0: any that is free.")
    add("--store", help="Where the encoded rationales are, if they were moved.")
    # fmt: on
    return made


def main(argv: list[str]) -> int:
    """Exit code 0, when it is interrupted; every failure is an exception."""
    options = parser().parse_args(argv)
    if not 0 <= options.port < 2**16:
        raise ConfigError(f"--port is {options.port}; expected 0 to {2**16 - 1}.")
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError(
            "The page needs Gradio, which is not installed. Install the extra: "
            "pip install 'cotrain[serve]'"
        )
    # Importing the libraries takes seconds; --help and mistakes do not wait for it.
    from cotrain.rationale.answers import FinishedRun
    from cotrain.serving.inspector import Inspector

    store = None if options.store is None else Path(options.store).expanduser()
    inspector = Inspector(FinishedRun.open(Path(options.run).expanduser()), store)
    from cotrain.serving.page import serve

    serve(inspector, options.host, options.port)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
