#!/bin/sh
# Puts ONNX Runtime's public headers (Debian's libonnxruntime-dev, from trixie on) into
# build/onnxruntime-headers, without installing anything or touching the system's package lists.
set -eu
cd "$(dirname "$0")/.."
TARGET=build/onnxruntime-headers
[ -f "$TARGET/onnxruntime/onnxruntime_cxx_api.h" ] && exit 0
[ -f /usr/include/onnxruntime/onnxruntime_cxx_api.h ] && exit 0
command -v apt-get >/dev/null || {
  echo "no apt-get here; copy the include folder of an ONNX Runtime release to $TARGET/onnxruntime" >&2
  exit 1
}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
chmod 755 "$WORK"
mkdir -p "$WORK/lists/partial" "$WORK/cache/archives/partial"
SITE=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -n 1)
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$KEYS] $SITE trixie main" >"$WORK/sources.list"
apt() {
  apt-get -q -o "Dir::Etc::sourcelist=$WORK/sources.list" -o Dir::Etc::sourceparts=/dev/null \
    -o "Dir::State::lists=$WORK/lists" -o "Dir::Cache=$WORK/cache" "$@"
}
apt update
(cd "$WORK" && apt download libonnxruntime-dev && dpkg -x libonnxruntime-dev_*.deb files)
mkdir -p "$TARGET"
cp -r "$WORK/files/usr/include/onnxruntime" "$TARGET/"
grep -h 'define ORT_API_VERSION' "$TARGET/onnxruntime/onnxruntime_c_api.h"
