"""The virtual environment that RecTools needs: its numpy is below 2, ours is not.

Made once in the cache folder, with the same version of torch as this process, so that a comparison
is one of programs and not of kernels.
"""

import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import torch
from filelock import FileLock

from cotrain.assets import cache_root
from cotrain.errors import CotrainError

RECTOOLS_VERSION = "0.19.0"
NAME = "benchmark-rectools"
# Written last, so that an interrupted installation is not taken for a finished one.
STAMP = "installed.txt"


def requirements(torch_version: str) -> list[str]:
    """What is installed: RecTools and whatever its speed depends on, each at one version.

    Args:
        torch_version: As in `torch.__version__`. A local part (`+cpu`) is left out, because not
            every index names its builds alike; pip prefers a local build where one is offered.
    """
    return [
        f"rectools[torch]=={RECTOOLS_VERSION}",
        f"torch=={torch_version.partition('+')[0]}",
        # RecTools itself asks for numpy 2 from Python 3.13 on.
        "numpy==1.26.4; python_version < '3.13'",
        "numpy==2.1.3; python_version >= '3.13'",
        "pandas==2.2.3",
        "scipy==1.14.1",
        "pytorch-lightning==2.5.2",
    ]


def rectools_python() -> Path:
    """Interpreter of the environment, which is made first if the cache lacks it.

    Raises:
        CotrainError: This Python is too new for RecTools, an environment cannot be made, or pip
            fails.
    """
    folder = cache_root() / NAME
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wanted = "\n".join([f"python {sys.version.split()[0]}", *requirements(torch.__version__), ""])
    stamp = folder / STAMP
    if _text(stamp) == wanted:
        return python
    if sys.version_info >= (3, 14):
        raise CotrainError(
            f"RecTools {RECTOOLS_VERSION} runs on Python 3.9 to 3.13; this is "
            f"{sys.version.split()[0]}. Run the benchmark with an older Python."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{NAME}.lock"):
        if _text(stamp) != wanted:  # another process may have made it while this one waited
            _install(folder, python)
            stamp.write_text(wanted, encoding="utf-8")
    return python


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _install(folder: Path, python: Path) -> None:
    print(
        f"Installing RecTools {RECTOOLS_VERSION} into {folder}, once (about 1.5 GB with a CPU "
        "build of torch, a few minutes) …",
        file=sys.stderr,
        flush=True,
    )
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CotrainError(
            f"A virtual environment could not be made in {folder}: {error}. On Debian and Ubuntu "
            "`apt install python3-venv` helps; COTRAIN_HOME names another cache folder."
        ) from error
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += requirements(torch.__version__)
    # What pip says is the progress; it goes to stderr, away from the benchmark's result.
    if subprocess.run(command, stdout=sys.stderr, stdin=subprocess.DEVNULL).returncode:
        raise CotrainError(
            f"pip could not install {' '.join(requirements(torch.__version__))}; what it said is "
            "above. The benchmark needs a package index (PIP_INDEX_URL for one other than PyPI); "
            "run it again when there is one."
        )
    print(f"RecTools: ready in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
