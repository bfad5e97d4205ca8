# Sourced by quickstart.sh and test.sh: makes .venv with this package in it, once, and activates it.
# Set `extra` first, to the optional dependencies wanted or to nothing (not an argument: a sourced
# file without arguments sees those of its caller). PYTHON chooses the interpreter (default python3).

if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: cotrain needs Python 3.10 or newer; set PYTHON to such an interpreter." >&2
        exit 1
    }
    "${PYTHON:-python3}" -m venv .venv || {
        echo "error: python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv." >&2
        exit 1
    }
fi
source .venv/bin/activate

# Installed is what this pyproject.toml asked for; the stamp spares a second run the package index.
stamp=.venv/installed-${extra:-plain}
if ! cmp -s pyproject.toml "$stamp"; then
    echo "Installing cotrain into .venv (about 2 GB, a few minutes) …"
    python -m pip install --disable-pip-version-check --editable ".${extra:+[$extra]}"
    cp pyproject.toml "$stamp"
fi
