#!/usr/bin/env bash
# Writes demo.txt, test.txt and eval.txt from fresh environments: lock.sh PYTHON
# The pin of torch stays as it is: change it in demo.txt by hand, then run this. So do data.txt and triton.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$1" -m venv "$scratch/env"
pip="$scratch/env/bin/python -m pip --disable-pip-version-check --no-input"

# pip itself, our own package, and what differs between builds of torch are not pinned
pins() {
    $pip freeze --all | grep -vE '^(pip==|ssmorph|triton==|nvidia-|cuda-)' | sed 's/+[a-z0-9.]*$//' | LC_ALL=C sort -f
}

torch=$(grep '^torch==' requirements/demo.txt)
$pip install --quiet "$torch" 'setuptools>=77'
$pip install --quiet '.[demo]'
pins >"$scratch/demo"
$pip install --quiet '.[test]'
pins >"$scratch/all"
$pip install --quiet '.[eval]'
pins >"$scratch/eval"

{ echo "# Made by \`make lock\`: what \`make demo\` installs."; cat "$scratch/demo"; } >requirements/demo.txt
{
    echo "# Made by \`make lock\`: what \`make test\` installs on top of demo.txt."
    echo "-r demo.txt"
    grep -vxFf "$scratch/demo" "$scratch/all"
} >requirements/test.txt
{
    echo "# Made by \`make lock\`: what \`make harness\` installs on top of test.txt."
    echo "-r test.txt"
    grep -vxFf "$scratch/all" "$scratch/eval"
} >requirements/eval.txt
