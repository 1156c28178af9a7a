#!/usr/bin/env bash
# A base for the Dockerfile made of Debian's packages, for machines that reach no registry, and the proof that podman runs it here.
# As root, with podman, runc and debootstrap; `make image-base` installs them. The tests of the images use it when it is there.
set -euo pipefail
CONTAINERS_CONF=${CONTAINERS_CONF:-$(cd "$(dirname "$0")" && pwd)/containers.conf}
export CONTAINERS_CONF
image=localhost/cllmr-base:bookworm

if ! podman image exists "$image"; then
  root=$(mktemp -d)
  # a debootstrap that was interrupted leaves /proc mounted there
  trap 'umount "$root/debian/proc" 2> /dev/null || true; rm -rf --one-file-system "$root"' EXIT
  debootstrap --variant=minbase --include=ca-certificates,python3-venv bookworm "$root/debian" > "$root/log" \
    || { tail -n 20 "$root/log" >&2; exit 1; }
  rm -rf "$root"/debian/var/cache/apt/archives/*.deb "$root"/debian/var/lib/apt/lists/*
  tar --create --directory "$root/debian" . | podman import --quiet - "$image" > /dev/null
fi
podman run --rm --network none --read-only --cap-drop all --memory 256m "$image" python3 --version
