# Sourced by the other scripts: creates a virtual environment with this package once, and keeps it up to date.
#   PYTHON        the interpreter that creates it (3.10 or newer; default python3)
#   VENV          its folder (default .venv in the repository)
#   CONSTRAINTS   pip's constraints (default scripts/constraints.txt: the torch that the suite runs on)
# The packages are installed again when pyproject.toml or the constraints have changed since the last install.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
CONSTRAINTS=${CONSTRAINTS:-scripts/constraints.txt}
if [ ! -x "$VENV/bin/python" ]; then
    echo "Making the virtual environment $VENV"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
    "${PYTHON:-python3}" -m venv "$VENV"
fi
if ! cat pyproject.toml "$CONSTRAINTS" | cmp -s - "$VENV/installed.toml"; then
    echo "Installing titan_attent and its dependencies into $VENV. For Linux, torch is a CUDA build of several GB"
    "$VENV/bin/python" -m pip install --constraint "$CONSTRAINTS" --editable '.[dev]'
    cat pyproject.toml "$CONSTRAINTS" > "$VENV/installed.toml"
    echo "Installed. In your own shell, activate it with: source $VENV/bin/activate"
fi
export PATH="$(cd "$VENV" && pwd)/bin:$PATH"
