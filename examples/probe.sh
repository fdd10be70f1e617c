#!/bin/sh
# Which devices of this host (or of the command line) can be migrated, and why not.
#
#     examples/probe.sh [DEVICE...]
set -eu
svq=${SVQ:-svq}

if [ $# -eq 0 ]; then
  "$svq" probe -j --open
else
  "$svq" probe -j "$@"
fi | jq -r '.devices[] | [
  .address,
  .device_name // "-",
  if .error then "error: " + .error.message
  elif .migratable.possible then "can be migrated"
  else "no: " + ([.migratable.reasons[] | .text + (if .remedy then " (" + .remedy + ")" else "" end)] | join("; "))
  end
] | @tsv'
