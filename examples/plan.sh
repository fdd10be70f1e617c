#!/bin/sh
# Where the memory of a guest and the shadow rings would lie in a device's address range, before there is a device:
# ends with 6 when something had to be moved away from its guest address.
#
#     examples/plan.sh [LAST]        the last address that the device can use; default 39 bits
set -eu
svq=${SVQ:-svq}
last=${1:-0x7fffffffff}

plan=$("$svq" iova plan -j --region 0x0+2GiB --region 4GiB+6GiB --range "0x0-$last" \
  --reserved 0xfee00000-0xfeefffff=msi --arena rings=8MiB)
printf '%s\n' "$plan" | jq -r '.regions[] | "\(.gpa) -> \(.iova)  \(.size_bytes / 1048576) MiB"'
printf '%s\n' "$plan" | jq -e 'all(.regions[]; .identity)' >/dev/null || exit 6
