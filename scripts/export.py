"""Write a finished run's student as a folder that somebody else runs.

    python scripts/export.py --run runs/NAME --format pretrained --output exported/NAME
    python scripts/export.py --run runs/NAME --format onnx --int8 --output exported/NAME-onnx

`pretrained` is what `Recommender.from_pretrained` reads, with a model card made of the run's
report. `onnx` is a graph from padded item indices to the best items, compared with PyTorch on real
histories before it is believed; it needs `pip install 'cotrain[export]'`. Both measure what one
request costs, beside the teacher.
"""

import argparse
import sys
from pathlib import Path

from cotrain.errors import CotrainError


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
    add("--format", choices=["pretrained", "onnx"], default="pretrained",
        help="Default: pretrained.")
    add("--output", required=True, help="Folder to be made.")
    add("--int8", action="store_true",
        help="With onnx: also a graph with 8-bit weights, and its NDCG@10 on test.")
    add("--k", type=int, default=100, help="With onnx: items in the graph's lists. Default: 100.")
    add("--requests", type=int, default=1000,
        help="Requests that latency is measured by; 0: not at all. Default: 1000.")
    # fmt: on
    return made


def main(argv: list[str]) -> int:
    """Exit code 0; every failure is an exception."""
    options = parser().parse_args(argv)
    # Importing the libraries takes seconds; --help does not wait for it.
    from cotrain.export.run import export

    export(
        Path(options.run).expanduser(), options.format, Path(options.output).expanduser(),
        int8=options.int8, k=options.k, requests=options.requests,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
