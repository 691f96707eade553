#!/usr/bin/env bash
# stop.sh FOLDER: ends the SLURM that start.sh FOLDER started.
here=$1
for pid in slurmd.pid slurmctld.pid munge/pid; do [ -f "$here/$pid" ] && kill "$(cat "$here/$pid")" 2>/dev/null; done
exit 0
