#!/bin/sh
# What tests/test_browser.py needs: playwright, which comes with the dev extra, and a Chromium, from the system's packages.
# `sh tests/browser_deps.sh PYTHON`; fails with one sentence when either cannot be had.
python=${1:-python3}
"$python" -c 'import playwright' || { echo "browser-deps: playwright is missing; pip install -c constraints.txt -e '.[dev]'" >&2; exit 1; }
found() { for name in chromium chromium-browser google-chrome; do command -v "$name" && return; done; return 1; }
if [ -n "$AUDIOREPRO_CHROMIUM" ]; then
    command -v "$AUDIOREPRO_CHROMIUM" && exit 0
    echo "browser-deps: AUDIOREPRO_CHROMIUM=$AUDIOREPRO_CHROMIUM is no program" >&2; exit 1
fi
found && exit 0
by_hand="install Chromium or Chrome yourself and have it on the PATH, or name it in AUDIOREPRO_CHROMIUM"
command -v apt-get > /dev/null || { echo "browser-deps: no Chromium and no apt-get here; $by_hand" >&2; exit 1; }
sudo=
if [ "$(id -u)" != 0 ]; then
    command -v sudo > /dev/null || { echo "browser-deps: no Chromium, and apt-get needs root or sudo; $by_hand" >&2; exit 1; }
    sudo="sudo -n"; [ -t 0 ] && sudo=sudo
fi
get() { $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; }
get || { $sudo apt-get update -qq && get; } || { echo "browser-deps: apt-get could not install chromium; $by_hand" >&2; exit 1; }
found || { echo "browser-deps: apt-get installed chromium, but it is not on the PATH; $by_hand" >&2; exit 1; }
