"""Turn rationales into vectors that training and explanations use.

    python scripts/encode_rationales.py --rationales rationales/ml-100k
    python scripts/encode_rationales.py --rationales FILE.jsonl --output STORE --dtype float32
    python scripts/encode_rationales.py --rationales FILE.jsonl --encoder teacher \\
        --teacher.model smollm2-135m-instruct

Killed or interrupted, the same command goes on from where it was. `--help` explains every setting.
"""

import sys

from cotrain import config as configuration
from cotrain.config import EncodeConfig
from cotrain.errors import CotrainError


def main(argv: list[str]) -> int:
    """Exit code 0; every failure is an exception."""
    # Importing the libraries takes seconds; --help and mistakes in the settings do not wait for it.
    config = configuration.parse_as(EncodeConfig, argv, prog="encode_rationales.py")
    from cotrain.rationale.encode import encode

    encode(config, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CotrainError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
