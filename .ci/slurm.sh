#!/usr/bin/env bash
# SLURM and munge for tests/slurm, from Debian's packages. Never fails: where they cannot be had it says so, and those tests are skipped.
set -uo pipefail
have() { command -v "$1" > /dev/null; }
installed() { have munged && have slurmctld && have slurmd; }
fetch() { timeout --kill-after=10 "$1" apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60 "${@:2}" >> "$log" 2>&1; }

installed && exit 0
if [ "$(id -u)" != 0 ] || ! have apt-get; then echo 'slurm.sh: needs root and apt-get; the SLURM tests are skipped'; exit 0; fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
fetch 120 update
fetch 300 install -y --no-install-recommends slurm-wlm munge
if installed; then echo "slurm.sh: $(slurmd -V)"; else echo 'slurm.sh: not installed, the SLURM tests are skipped:'; tail -n 5 "$log"; fi
rm -f "$log"
