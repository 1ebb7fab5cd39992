#!/usr/bin/env bash
# ffmpeg for tests/media_matrix.py, from Debian's packages. Never fails: where it cannot be had it says so, and the tests that need it are
# skipped with that reason (and a warning in the tests' summary).
set -uo pipefail
have() { command -v "$1" > /dev/null; }
fetch() { timeout --kill-after=10 "$1" apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60 "${@:2}" >> "$log" 2>&1; }

have ffmpeg && exit 0
if [ "$(id -u)" != 0 ] || ! have apt-get; then echo 'ffmpeg.sh: needs root and apt-get; the tests of made videos are skipped'; exit 0; fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
fetch 120 update
fetch 300 install -y --no-install-recommends ffmpeg
if have ffmpeg; then echo "ffmpeg.sh: $(ffmpeg -version | head -n 1)"; else echo 'ffmpeg.sh: not installed, the tests of made videos are skipped:'; tail -n 5 "$log"; fi
rm -f "$log"
