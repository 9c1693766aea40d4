#!/bin/sh
# Let git merge and compare notebooks cell by cell, in this checkout only. Usage: tools/git_hooks.sh .venv/bin
# nbdev-install-hooks does it; HOME points elsewhere meanwhile, so that the user's own Jupyter settings stay as they are
# (`make lab` brings its own). Then the commands get their path, so that git finds them without an activated environment.
set -eu
bin=$1
[ "$(git rev-parse --show-toplevel 2>/dev/null)" = "$(pwd -P)" ] || { echo "Not the top of a git checkout: no git hooks for notebooks."; exit 0; }
case "$(git config --local --get merge.jupyternotebook.driver || true)" in *"$bin"*) exit 0 ;; esac
hook=$(git rev-parse --git-path hooks)/post-merge
if [ -e "$hook" ]; then echo "$hook exists: left as it is. No git hooks for notebooks."; exit 0; fi
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
HOME=$home PATH="$(pwd -P)/$bin:$PATH" nbdev-install-hooks
printf '#!/bin/sh\n[ ! -x %s/nbdev-trust ] || %s/nbdev-trust\n' "$bin" "$bin" > "$hook"
git config --local merge.jupyternotebook.name "notebooks, cell by cell"
git config --local merge.jupyternotebook.driver "$bin/nbdev-merge %O %A %B %P"
git config --local diff.jupyternotebook.command \
  "d() { if [ -x $bin/nbdev-diff-driver ]; then $bin/nbdev-diff-driver \"\$@\"; else diff -u \"\$2\" \"\$5\"; fi || true; }; d"
