#!/bin/sh
# Looks at the rings of a busy relay: are they in order (exit 6 when not), and how full are they?
set -eu
svq=${SVQ:-svq}
folder=$(mktemp -d)
SVQ_RUNTIME_DIR=$folder
export SVQ_RUNTIME_DIR
trap '"$svq" relay stop disk >/dev/null 2>&1 || :; rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM

"$svq" relay start -q --name disk --front "unix:$folder/front" --device sim:blk,latency=200us --force-shadow >/dev/null
"$svq" drive -q "unix:$folder/front" --duration "${DURATION:-5s}" --depth 16 >/dev/null &
guest=$!
until "$svq" relay status -j disk | jq -e '[.queues[] | .chains] | add > 0' >/dev/null; do sleep 0.05; done
"$svq" vring verify -q disk
"$svq" vring dump -j disk | jq -r '.queues[] | "queue \(.index) \(.side): \(.layout), \(.num) descriptors, avail \(.avail_idx), used \(.used_idx)"'
wait "$guest"
