"""Co-train a student with a live teacher.

    accelerate launch scripts/train_online.py                          # the quickstart recipe
    accelerate launch scripts/train_online.py --config RECIPE.yaml --teacher.model NAME
    accelerate launch scripts/train_online.py --resume RUN
    python scripts/train_online.py --show_prompts 3 [options]          # prints prompts and stops

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
    count, argv = prompts_to_show(argv)
    resume = None if count else resumed_folder(argv)
    config = None if resume else configuration.parse(argv, QUICKSTART, "train_online.py")
    from cotrain import rounds
    from cotrain.distill import loop, run
    from cotrain.distill.show_prompts import show_prompts

    if count and config:
        show_prompts(config, count)
        return 0
    try:
        if resume:
            rounds.run(run.open_interrupted(resume), resume=True)
        elif config:
            rounds.run(config)
    except loop.Interrupted as stop:
        print(
            f"\n{stop}\n  accelerate launch {sys.argv[0]} --resume {stop.folder}", file=sys.stderr
        )
        return 130
    return 0


def prompts_to_show(argv: list[str]) -> tuple[int | None, list[str]]:
    """The N of `--show_prompts N`, or None without it; and the other arguments."""
    others = list(argv)
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--show_prompts":
            end = place + 1 if equals else place + 2
            value = value if equals else " ".join(argv[place + 1 : end])
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(
                    f"--show_prompts is {value!r}; expected how many prompts to print, 1 or more."
                )
            del others[place:end]
            return int(value), others
    return None, others


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
