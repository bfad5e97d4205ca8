"""Co-train a student with a live teacher.

    accelerate launch scripts/train_online.py                          # the quickstart recipe
    accelerate launch scripts/train_online.py --config RECIPE.yaml --teacher.model NAME
    accelerate launch scripts/train_online.py --resume RUN

`--help` explains every setting.
"""

import sys
from pathlib import Path

from cotrain import config as configuration
from cotrain.errors import ConfigError, CotrainError

QUICKSTART = Path(__file__).parent / "recipes" / "quickstart.yaml"


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 130 interrupted with a checkpoint."""
    # Importing the libraries takes seconds; --help and mistakes in the settings do not wait for it.
    resume = resumed_folder(argv)
    config = None if resume else configuration.parse(argv, QUICKSTART, "train_online.py")
    from cotrain.distill import loop, run

    try:
        if resume:
            run.run(run.open_interrupted(resume), resume=True)
        elif config:
            run.run(config)
    except loop.Interrupted as stop:
        print(
            f"\n{stop}\n  accelerate launch {sys.argv[0]} --resume {stop.folder}", file=sys.stderr
        )
        return 130
    return 0


def resumed_folder(argv: list[str]) -> Path | None:
    """The RUN of `--resume RUN`, which stands alone; None without it."""
    if not any(word.partition("=")[0] == "--resume" for word in argv):
        return None
    words = [*argv[0].split("=", 1), *argv[1:]]
    if len(words) != 2 or words[0] != "--resume":
        raise ConfigError(
            f"--resume takes a run folder and nothing else; received {' '.join(argv)}. The "
            "settings of the interrupted run hold."
        )
    return Path(words[1])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
