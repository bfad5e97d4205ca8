"""What a finished run recommends to one of its users, and why.

    python scripts/recommend.py --run runs/NAME --user 42
    python scripts/recommend.py --run runs/NAME --user 42 --k 5 --explain
    python scripts/recommend.py --run runs/NAME --user 42 --explain --json
    python scripts/recommend.py --run runs/NAME --agreement      # do reasons fit, over test users

Reasons need a run that was trained with --distill.rationales.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from cotrain.errors import ConfigError, CotrainError


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--run", required=True, help="Folder of a finished run.")
    add("--user", help="Raw id of a user of the run's data.")
    add("--k", type=int, default=10, help="Items that are recommended. Default: 10.")
    add("--explain", action="store_true", help="Say why.")
    add("--reasons", type=int, default=1, help="Reasons of each item. Default: 1.")
    add("--pool", type=int, default=50, help="The user's nearest reasons, from which those of an "
        "item are chosen. Default: 50.")  # fmt: skip
    add("--exclude-own", action="store_true", help="Leave out reasons that were written for "
        "interactions of the same user.")  # fmt: skip
    add("--store", help="Where the encoded rationales are, if they were moved.")
    add("--agreement", action="store_true", help="Measure how often a reason's source item shares "
        "a category with the recommended item, over up to 1,000 test users, against random "
        "reasons.")  # fmt: skip
    add("--json", action="store_true", help="One JSON object instead of text.")
    return made


def main(argv: list[str]) -> int:
    """Exit code 0; every failure is an exception."""
    options = parser().parse_args(argv)
    _check(options)
    # Importing the libraries takes seconds; --help and mistakes do not wait for it.
    from cotrain.rationale.answers import FinishedRun, agreement_text, readable

    run = FinishedRun.open(Path(options.run).expanduser())
    user = None if options.user is None else run.user(options.user)
    explainer = None
    if options.explain or options.agreement:
        store = None if options.store is None else Path(options.store).expanduser()
        explainer = run.explainer(store)
    result: dict[str, Any] = {"run": options.run}
    text: list[str] = []
    if user is not None:
        explanation = run.recommend(user, options.k)
        if options.explain and explainer:
            (explanation,) = explainer.explain(
                [user], options.k, reasons=options.reasons, pool=options.pool,
                exclude_own=options.exclude_own,
            )  # fmt: skip
        last = run.last_titles(user)
        result |= dataclasses.asdict(explanation)
        result |= {"interactions": len(run.data.history(user)), "last_titles": last}
        text.append(
            f"User {explanation.user_id}, {result['interactions']:,} interactions, the last: "
            f"{'; '.join(last)}\n\n{readable(explanation)}"
        )
    agreement = run.agreement if options.explain else None
    if options.agreement and explainer:
        agreement = measured(explainer, options)
    if options.explain or options.agreement:
        result["agreement"] = agreement
    if agreement is not None:
        text.append(agreement_text(agreement))
    print(json.dumps(result, ensure_ascii=False) if options.json else "\n\n".join(text))
    return 0


def measured(explainer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The agreement figure, with its interval."""
    from cotrain.evaluation.compare import paired_bootstrap
    from cotrain.rationale.agreement import measure_agreement

    found = measure_agreement(explainer, options.k, pool=options.pool)
    return found.as_report(lambda one, other: paired_bootstrap(one, other).as_dict())


def _check(options: argparse.Namespace) -> None:
    for name in ("k", "reasons", "pool"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; expected 1 or more.")
    if options.user is None and not options.agreement:
        raise ConfigError("There is nothing to do: name a --user, or ask for --agreement.")
    if options.user is None and options.explain:
        raise ConfigError("--explain needs the --user to whom it is explained.")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
