"""Measure what there is before it is used.

    python scripts/evaluate.py teacher --examples.student RUN            # without training
    python scripts/evaluate.py teacher --examples.student RUN \\
        --teacher.adapter ADAPTER --measure.against EVALUATION           # beside another one
    python scripts/evaluate.py teacher --examples.student RUN --teacher.mode cot \\
        --measure.searches greedy,sc4,tree2x2x3

`--help` after `teacher` explains every setting. Validation rows only; test is never touched.
"""

import sys
from pathlib import Path

from cotrain.config import EvaluateConfig, parse_as
from cotrain.errors import ConfigError, CotrainError

RECIPE = Path(__file__).parent / "recipes" / "teacher.yaml"


def main(argv: list[str]) -> int:
    """Exit code 0; every failure is an exception."""
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if argv[:1] != ["teacher"]:
        raise ConfigError(
            f"What to measure is {argv[0]!r}; expected teacher." if argv else
            "Nothing named to measure; expected teacher."
        )  # fmt: skip
    config = parse_as(EvaluateConfig, argv[1:], RECIPE, "evaluate.py teacher")
    # Importing the libraries takes seconds; --help and mistakes in the settings do not wait for it.
    from cotrain.finetune.evaluate import evaluate

    evaluate(config)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
