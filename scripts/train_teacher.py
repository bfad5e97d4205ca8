"""Train the teacher: an adapter (LoRA) on its frozen, quantised weights.

    accelerate launch scripts/train_teacher.py METHOD --examples.student RUN [options]

    rank-sft        the one pass that ranks, on the student's candidates
    cot-sft         reasonings, then the identifier (--cot.rationales)
    star            rounds of its own reasonings that led to the right item
    process-reward  a model that scores each step of a reasoning
    rl              GRPO with rewards for rank, format, grounding and steps
    bigrec          the next title (teacher.mode bigrec), or yes or no (pointwise)

RUN is a run of scripts/train_online.py; `--help` after a METHOD explains every setting. The same
command goes on where it was interrupted. What it writes is loaded by --teacher.adapter.
"""

import sys
from pathlib import Path

from cotrain.config import FinetuneConfig, parse_as
from cotrain.errors import ConfigError, CotrainError

RECIPE = Path(__file__).parent / "recipes" / "teacher.yaml"
METHODS = ("rank-sft", "cot-sft", "star", "process-reward", "rl", "bigrec")


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 130 interrupted with a checkpoint."""
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not argv or argv[0] not in METHODS:
        raise ConfigError(
            f"METHOD is {argv[0]!r}; expected one of {', '.join(METHODS)}."
            if argv
            else f"No METHOD given; expected one of {', '.join(METHODS)}."
        )
    method = argv[0]
    config = parse_as(FinetuneConfig, argv[1:], RECIPE, f"train_teacher.py {method}")
    # Importing the libraries takes seconds; --help and mistakes in the settings do not wait for it.
    from cotrain.finetune import methods
    from cotrain.finetune.tuning import Interrupted

    try:
        methods.train(method, config)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
