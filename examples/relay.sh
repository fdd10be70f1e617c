#!/bin/sh
# A relay between a guest and a disk, switched to shadow mode and back while the guest works, and what that cost it.
# "svq drive" stands for the guest; a VMM would connect to the same socket.
set -eu
svq=${SVQ:-svq}
folder=$(mktemp -d)
SVQ_RUNTIME_DIR=$folder
export SVQ_RUNTIME_DIR
trap '"$svq" relay stop disk >/dev/null 2>&1 || :; rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM

"$svq" relay start -q --name disk --front "unix:$folder/front" --device sim:blk --mode passthrough >/dev/null
"$svq" drive -j "unix:$folder/front" --duration "${DURATION:-5s}" >"$folder/report" &
guest=$!
until "$svq" relay status -j disk | jq -e '.state == "running"' >/dev/null; do sleep 0.05; done
for mode in shadow passthrough; do
  "$svq" relay set -j disk --mode "$mode" |
    jq -r '.queues[] | "queue \(.index) is in \(.mode) after \(.switches.drain_us) us of draining and \(.switches.switch_us) us of switching"'
done
wait "$guest"
jq -r '.requests | "\(.completed) requests, \(.lost) lost, \(.corrupted) corrupted"' "$folder/report"
jq -e '.requests | .lost + .corrupted + .duplicated == 0' "$folder/report" >/dev/null
