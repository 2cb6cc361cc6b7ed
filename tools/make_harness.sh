#!/bin/sh
# Makes build/envs/harness: lm-evaluation-harness on top of the project's own environment, whose
# packages (and the package itself, as it stands) it sees. Used by tests/evaluation/test_harness.py.
set -eu
cd "$(dirname "$0")/.."
TARGET=build/envs/harness
[ -x .venv/bin/python ] || { echo "make_harness.sh: no .venv; run make setup" >&2; exit 1; }
SITE='import sysconfig; print(sysconfig.get_path("purelib"))'
PROJECT=$(.venv/bin/python -c "$SITE")
rm -rf "$TARGET"
.venv/bin/python -m venv "$TARGET"
# addsitedir, not a bare path: the editable installation is a .pth file itself.
echo "import site; site.addsitedir('$PROJECT')" \
  >"$("$TARGET/bin/python" -c "$SITE")/project_environment.pth"
"$TARGET/bin/python" -m pip install -q -c tests/constraints.txt 'lm-eval[api]==0.4.13'
"$TARGET/bin/python" -c 'import lm_eval, trianglemix'
touch "$TARGET/complete"
