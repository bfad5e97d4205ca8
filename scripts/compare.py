"""Compare ways of teaching the same student, on equal terms.

    python scripts/compare.py --seeds 3                                   # the quickstart recipe
    python scripts/compare.py --recipe RECIPE.yaml --arms ce,logit_kd,rdr,decision_state,full \\
        --seeds 5 --distill.rationales STORE --distill.lambda_rdr 0.1
    python scripts/compare.py --arms ce,rdr,rdr_gram --distill.rationales STORE --output FOLDER
    python scripts/compare.py --arms ce,ranking --vary query.fraction=0.025,0.05 \\
        --vary query.policy=entropy,margin                                # one thing at a time

Every arm trains with the same data, seeds, initial weights, batches and epochs, each run in a
process and a folder of its own. Interrupted or killed, the same command goes on from where it was.
In the end there is a table here and a page in the folder. `--help` lists the arms.
"""

import argparse
import sys
from pathlib import Path

from cotrain.comparison.arms import ARMS, Plan, make_plan
from cotrain.errors import ConfigError, CotrainError

HERE = Path(__file__).parent
QUICKSTART = HERE / "recipes" / "quickstart.yaml"


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 with runs that failed, 130 interrupted."""
    plan = parse(argv)
    # Importing the libraries takes seconds; --help and mistakes in the settings do not wait for it.
    from cotrain.comparison import run, runs

    command = [sys.executable, str(HERE / "train_online.py")]
    try:
        result = run.compare(plan, command, lambda text: print(text, flush=True))
    except runs.Stopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    return 1 if result["failed"] else 0


def parse(argv: list[str]) -> Plan:
    """What the command line asks for.

    Raises:
        ConfigError: It cannot be done.
    """
    arms = "\n".join(f"  {name:15} {arm.summary}" for name, arm in ARMS.items())
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Compare ways of teaching the same student, on equal terms.",
        epilog=f"arms:\n{arms}\n\nAll other options are settings of scripts/train_online.py, such "
        "as --train.epochs 20,\nand hold for every arm.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", type=Path, default=QUICKSTART, help="YAML file of settings; default: quickstart"
    )
    parser.add_argument(
        "--arms",
        help="names, joined by commas; default: all that the settings allow, up to full",
    )
    parser.add_argument("--seeds", default="3", help="how many; default: 3")
    parser.add_argument("--first_seed", default="0", help="the seeds count up from it; default: 0")
    parser.add_argument(
        "--output", type=Path, help="folder, which a restart finds again; default: comparisons/DATA"
    )
    parser.add_argument(
        "--vary", action="append", default=[], metavar="SETTING=VALUE,VALUE",
        help="further arms, one a value, each like the last of --arms but for it; may be repeated",
    )  # fmt: skip
    parser.add_argument("--vary_arm", help="the arm that these are like; default: the last one")
    given, options = parser.parse_known_args(argv)
    seeds, first = _whole("--seeds", given.seeds, 1), _whole("--first_seed", given.first_seed, 0)
    names = None if given.arms is None else [name.strip() for name in given.arms.split(",")]
    return make_plan(
        given.recipe, options, names, range(first, first + seeds), given.output, given.vary,
        given.vary_arm,
    )  # fmt: skip


def _whole(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} is {text!r}; expected a whole number, {least} or more.")
    return int(text)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
