"""Measure what training, evaluation and retrieval cost.

    python scripts/benchmark.py student --data amazon-beauty                  # beside RecTools
    python scripts/benchmark.py student --data ml-1m --max-length 200
    python scripts/benchmark.py catalogue                                     # as items grow
    python scripts/benchmark.py bulk --run runs/NAME                          # a million users
    python scripts/benchmark.py teacher --rows 64 --exactness                 # beside generate
    python scripts/benchmark.py teacher --model 7b --rows 8 256               # on a GPU
    python scripts/benchmark.py teacher --memory
    python scripts/benchmark.py teacher --loop
    python scripts/benchmark.py modes                                         # what it says
    python scripts/benchmark.py parity                                        # of every family
    python scripts/benchmark.py processes                                     # two beside one
    python scripts/benchmark.py sharding                                      # DDP beside ZeRO

`student` installs RecTools into an environment of its own in the cache folder, once. Each
subcommand has its `--help`. Tables go to stdout, progress to stderr, everything measured to
`--json FILE`.
"""

import argparse
import json
import sys
from pathlib import Path

from cotrain.benchmarks.settings import (
    BulkSettings,
    CatalogueSettings,
    ModesSettings,
    ParitySettings,
    ProcessesSettings,
    ShardingSettings,
    StudentSettings,
    TeacherSettings,
    add_options,
    read_options,
)
from cotrain.errors import ConfigError, CotrainError

COMMANDS = {
    "student": (StudentSettings, "one epoch and one evaluation beside RecTools' SASRec"),
    "catalogue": (CatalogueSettings, "step time, retrieval time and memory as the catalogue grows"),
    "bulk": (BulkSettings, "recommendations for a file of users: time, rate, memory"),
    "teacher": (TeacherSettings, "verdicts beside the plain generate loop; memory; a run's loop"),
    "modes": (ModesSettings, "verdicts, whole orders, cost and position bias of every mode"),
    "processes": (ProcessesSettings, "a short run by one process and by several on the same cores"),
    "sharding": (ShardingSettings, "memory of a process and time of a step, DDP beside ZeRO"),
    "parity": (ParitySettings, "the teacher's engine against generate, by family of models"),
}
REPOSITORY = Path(__file__).parents[1]
QUICKSTART = Path(__file__).parent / "recipes" / "quickstart.yaml"


def main(argv: list[str]) -> int:
    """Runs one benchmark; exit code 0."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description="What cotrain costs.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (settings, summary) in COMMANDS.items():
        add_options(commands.add_parser(name, help=summary, description=settings.__doc__), settings)
    parsed = parser.parse_args(argv)
    settings = read_options(parsed, COMMANDS[parsed.command][0])
    target = None if settings.json is None else Path(settings.json).expanduser()
    if target is not None and not target.parent.is_dir():
        # Said now and not after an hour of measuring.
        raise ConfigError(f"--json {target}: there is no folder {target.parent}.")
    # Importing the libraries takes seconds; --help and mistakes do not wait for it.
    if isinstance(settings, StudentSettings):
        from cotrain.benchmarks import student

        result = student.run(settings)
    elif isinstance(settings, CatalogueSettings):
        from cotrain.benchmarks import catalogue

        result = catalogue.run(settings)
    elif isinstance(settings, BulkSettings):
        from cotrain.benchmarks import bulk

        result = bulk.run(settings, Path(__file__).with_name("recommend.py"))
    elif isinstance(settings, ModesSettings):
        from cotrain.benchmarks import modes

        result = modes.run(settings)
    elif isinstance(settings, ParitySettings):
        from cotrain.benchmarks import parity

        result = parity.run(settings)
    elif isinstance(settings, ProcessesSettings):
        from cotrain.benchmarks import scaling

        result = scaling.run(settings, REPOSITORY, QUICKSTART)
    elif isinstance(settings, ShardingSettings):
        from cotrain.benchmarks import sharding

        result = sharding.run(settings, REPOSITORY)
    else:
        from cotrain.benchmarks import teacher

        result = teacher.run(settings, QUICKSTART)
    if target is not None:
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
