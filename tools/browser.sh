#!/bin/sh
# Find a Chromium for the browser tests, or install one: sh tools/browser.sh .venv/bin
# As root on Debian it is Debian's package, else Playwright's own build. Exit code 1, with the reason, where neither can be had.
for name in chromium chromium-browser google-chrome chrome; do
    if found=$(command -v "$name"); then
        echo "browser tests run in $found"
        exit 0
    fi
done
if [ -n "${ZIPPER_AD_CHROMIUM:-}" ] && [ -x "$ZIPPER_AD_CHROMIUM" ]; then
    echo "browser tests run in $ZIPPER_AD_CHROMIUM"
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    if timeout 300 apt-get update -qq && timeout 600 apt-get install -y -qq --no-install-recommends chromium >/dev/null; then
        echo "browser tests run in $(command -v chromium), just installed"
        exit 0
    fi
fi
if timeout 600 "$1/playwright" install chromium; then
    exit 0
fi
echo "No Chromium is here and none could be installed, so the browser tests will be skipped. All others run. See CONTRIBUTING.md, \"A browser\"." >&2
exit 1
