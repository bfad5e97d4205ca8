"""Write reasons for training interactions, by the teacher or by a server; goes on after a kill.

    python scripts/generate_rationales.py                     # the quickstart recipe, 10 % of them
    python scripts/generate_rationales.py --config RECIPE.yaml --rationale.rows 300 --output FOLDER
    OPENAI_API_KEY=… python scripts/generate_rationales.py --rationale.backend endpoint \\
        --rationale.endpoint_url http://127.0.0.1:8000/v1 --rationale.endpoint_model NAME

`--help` explains every setting. A recipe of a run serves here too; data and teacher are the same.
"""

import sys
from pathlib import Path

from cotrain.config import GenerateConfig, parse_as
from cotrain.errors import CotrainError

QUICKSTART = Path(__file__).parent / "recipes" / "quickstart.yaml"


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 130 interrupted."""
    config = parse_as(GenerateConfig, argv, QUICKSTART, "generate_rationales.py")
    # Importing the libraries takes seconds; --help and mistakes in the settings do not wait for it.
    from cotrain.rationale.generate import Interrupted, generate

    try:
        generate(config)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
