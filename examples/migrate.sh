#!/bin/sh
# Migrates a guest under load from one process to another, as between two hosts (there: tcp:HOST:PORT on both sides), and
# holds the downtime against a limit: ends with 1 when it took longer.
#
#     examples/migrate.sh [LIMIT_MS]
set -eu
svq=${SVQ:-svq}
limit_ms=${1:-5000}
folder=$(mktemp -d)
trap 'kill "$destination" 2>/dev/null || :; rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM

# Both sides see the same disk, as migrated guests do.
truncate -s 64M "$folder/disk.img"
disk=sim:blk,file=$folder/disk.img
"$svq" migrate listen -q "unix:$folder/link" --device "$disk" >/dev/null &
destination=$!
until [ -S "$folder/link" ]; do sleep 0.05; done
"$svq" migrate run -j --to "unix:$folder/link" --device "$disk" --duration 2s --warmup 500ms --mem 32MiB --progress json \
  2>"$folder/progress" >"$folder/report"
jq -r '"\(.outcome): \(.rounds | length) rounds, downtime \(.downtime_us.total / 1000) ms, memory identical: \(.memory_identical)"' \
  "$folder/report"
jq -e --argjson limit "$limit_ms" '.downtime_us.total <= $limit * 1000' "$folder/report" >/dev/null
