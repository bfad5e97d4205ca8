r"""Make a data set ready for training, from the files its publisher ships.

    python scripts/prepare_data.py movielens --input ml-20m.zip --name ml-20m \
        --min-user-interactions 5 --min-item-interactions 5
    python scripts/prepare_data.py amazon --input reviews_Beauty_5.json.gz \
        --items meta_Beauty.json.gz --name amazon-beauty
    python scripts/prepare_data.py recbole --input steam.inter --name steam
    python scripts/prepare_data.py tables --input clicks.csv --items products.csv --name mine

It prints what it read, what it dropped and why, and runs then find the set with --data.name NAME.
"""

import argparse
import dataclasses
import sys
import typing

from cotrain.data.preparation import PrepareOptions, prepare
from cotrain.data.readers import READERS
from cotrain.errors import CotrainError


def parser() -> argparse.ArgumentParser:
    """One option for each field of `PrepareOptions`."""
    hints = typing.get_type_hints(PrepareOptions)
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("source", choices=list(READERS), help="Whose files they are.")
    for field in dataclasses.fields(PrepareOptions)[1:]:
        name = "--" + field.name.replace("_", "-")
        kind = hints[field.name]
        text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            made.add_argument(name, action="store_true", help=text)
            continue
        types = typing.get_args(kind)
        literal = typing.get_origin(kind) is typing.Literal
        made.add_argument(
            name,
            required=field.default == "",
            default=field.default,
            type=str if literal else types[0] if types else kind,
            choices=types if literal else None,
            help=text if field.default in (None, "") else f"{text} Default: {field.default}.",
        )
    return made


def main(argv: list[str]) -> int:
    """Exit code 0; every failure is an exception."""
    options = PrepareOptions(**vars(parser().parse_args(argv)))
    prepare(options, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; no set was written")
