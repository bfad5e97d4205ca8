"""What a finished run recommends: to one of its users, to a new one, or to a file of them.

    python scripts/recommend.py --run runs/NAME --user 42
    python scripts/recommend.py --run runs/NAME --user 42 --k 5 --explain --json
    python scripts/recommend.py --run runs/NAME --items 50,181 --categories Comedy Drama
    python scripts/recommend.py --run runs/NAME --title "Toy Story (1995)" --title "Fargo (1996)"
    python scripts/recommend.py --run runs/NAME --histories users.parquet --output lists.parquet
    python scripts/recommend.py --run runs/NAME --agreement      # do reasons fit, over test users

Reasons need a run that was trained with --distill.rationales. A file of histories has a row for
each user: `user_id`, and `item_ids`, oldest first: lists in Parquet and JSON lines, in CSV and TSV
text joined by bars (50|181).
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
    # fmt: off
    add = made.add_argument
    add("--run", required=True, help="Folder of a finished run.")
    add("--k", type=int, default=10, help="Items that are recommended. Default: 10.")
    add("--json", action="store_true", help="One JSON object instead of text.")
    add = made.add_argument_group("to whom").add_argument
    add("--user", help="Raw id of a user of the run's data.")
    add("--items", dest="named", action="append", type=lambda text: ("id", text), metavar="A,B,C",
        help="Raw ids that a new user took, oldest first. May be repeated, and mixed with --title.")
    add("--title", dest="named", action="append", type=lambda text: ("title", text),
        metavar="TITLE", help="Title of an item that a new user took; one for each, oldest first.")
    add("--histories", help="File of users: Parquet, CSV, TSV or JSON lines (.jsonl).")
    add = made.add_argument_group("from what").add_argument
    add("--keep-seen", action="store_true", help="Also recommend what is in the history.")
    add("--categories", nargs="+", default=[], help="Only items of one of these categories.")
    add("--allow", help="File with the ids of the only items, one a line.")
    add("--deny", help="File with the ids of items that are left out, one a line.")
    add = made.add_argument_group("for a file of users").add_argument
    add("--output", help="File for the answers, of any of these kinds.")
    add("--user-column", default="user_id", help="Default: user_id.")
    add("--items-column", default="item_ids", help="Default: item_ids.")
    add("--strict", action="store_true",
        help="Ids that no item has are an error; otherwise they are skipped and counted.")
    add("--overwrite", action="store_true", help="Write over an existing --output.")
    add = made.add_argument_group("why").add_argument
    add("--explain", action="store_true", help="Say why.")
    add("--reasons", type=int, default=1, help="Reasons of each item. Default: 1.")
    add("--pool", type=int, default=50, help="The user's nearest reasons, from which those of an "
        "item are chosen. Default: 50.")
    add("--exclude-own", action="store_true",
        help="Leave out reasons that were written for interactions of the same user.")
    add("--store", help="Where the encoded rationales are, if they were moved.")
    add("--agreement", action="store_true", help="Measure how often a reason's source item shares "
        "a category with the recommended item, over up to 1,000 test users, against random "
        "reasons.")
    # fmt: on
    return made  # fmt: skip


def main(argv: list[str]) -> int:
    """Exit code 0; every failure is an exception."""
    options = parser().parse_args(argv)
    _check(options)
    # Importing the libraries takes seconds; --help and mistakes do not wait for it.
    from cotrain.rationale.answers import FinishedRun

    run = FinishedRun.open(Path(options.run).expanduser())
    allowed, notes = run.lookup.allowed(
        options.categories, _path(options.allow), _path(options.deny), options.strict
    )
    for note in notes:
        print(note, file=sys.stderr)
    answer_file(run, options, allowed) if options.histories else answer(run, options, allowed)
    return 0


def answer(run: Any, options: argparse.Namespace, allowed: Any) -> None:
    """Print what one user gets, or how well reasons fit, or both."""
    from cotrain.rationale.answers import agreement_text, readable

    result: dict[str, Any] = {"run": options.run}
    text: list[str] = []
    user = None if options.user is None else run.user(options.user)
    history = None if user is None else run.data.history(user)
    if options.named:
        history = run.lookup.indices(_split(options.named, run.lookup.by_id))
    explainer = None
    if options.explain or options.agreement:
        explainer = run.explainer(_path(options.store))
    if history is not None:
        among = {"exclude_seen": not options.keep_seen, "allowed": allowed}
        if options.explain and explainer:
            (found,) = explainer.explain_histories(
                [history], options.k, users=None if user is None else [user], **among,
                reasons=options.reasons, pool=options.pool, exclude_own=options.exclude_own,
            )  # fmt: skip
        else:
            user_id = None if user is None else run.data.user_ids[user]
            found = run.recommend(history, options.k, user_id=user_id, **among)
        last = run.last_titles(history)
        result |= dataclasses.asdict(found)
        result |= {"interactions": len(history), "last_titles": last}
        who = "New user" if user is None else f"User {found.user_id}"
        text.append(
            f"{who}, {len(history):,} interactions, the last: {'; '.join(last)}\n\n"
            f"{readable(found)}"
        )
    agreement = run.agreement if options.explain else None
    if options.agreement and explainer:
        agreement = measured(explainer, options)
    if options.explain or options.agreement:
        result["agreement"] = agreement
    if agreement is not None:
        text.append(agreement_text(agreement))
    print(json.dumps(result, ensure_ascii=False) if options.json else "\n\n".join(text))


def answer_file(run: Any, options: argparse.Namespace, allowed: Any) -> None:
    """Write what the users of a file get, print what came of it."""
    from cotrain.data.histories import HistoryFile
    from cotrain.student.bulk import recommend_file

    source = HistoryFile(
        Path(options.histories).expanduser(), options.user_column, options.items_column
    )
    target = Path(options.output).expanduser()
    summary = recommend_file(
        run.recommender, source, target, options.k, exclude_seen=not options.keep_seen,
        allowed=allowed, strict=options.strict, overwrite=options.overwrite,
    )  # fmt: skip
    if options.json:
        facts = dataclasses.asdict(summary) | {"run": options.run, "output": str(target)}
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(f"{summary.text()}\nWritten: {target}")


def measured(explainer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The agreement figure, with its interval."""
    from cotrain.evaluation.compare import paired_bootstrap
    from cotrain.rationale.agreement import measure_agreement

    found = measure_agreement(explainer, options.k, pool=options.pool)
    return found.as_report(lambda one, other: paired_bootstrap(one, other).as_dict())


def _split(named: list[tuple[str, str]], known: dict[str, int]) -> list[tuple[str, str]]:
    """Lists of ids one by one; an id that has a comma itself may stand alone."""
    return [
        (kind, part)
        for kind, text in named
        for part in ([text] if kind == "title" or text in known else text.split(","))
    ]


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


def _check(options: argparse.Namespace) -> None:
    for name in ("k", "reasons", "pool"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; expected 1 or more.")
    someone = [
        name
        for name, value in (
            ("--user", options.user), ("--items or --title", options.named),
            ("--histories", options.histories),
        )
        if value is not None
    ]  # fmt: skip
    if len(someone) > 1:
        raise ConfigError(f"{' and '.join(someone)} name different users; give one of them.")
    if not someone and not options.agreement:
        raise ConfigError(
            "There is nothing to do: name a --user, --items, --title or --histories, or ask for "
            "--agreement."
        )
    if not someone and options.explain:
        raise ConfigError("--explain needs the --user to whom it is explained, or --items.")
    if options.histories and (options.explain or options.agreement):
        raise ConfigError("--histories has no room for reasons; leave --explain and --agreement.")
    if bool(options.histories) != bool(options.output):
        raise ConfigError("--histories and --output belong together: from one file to another.")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
