#!/usr/bin/env bash
# Makes a host ready for a launch: mounts the buckets, installs the shipped code. What is there
# already is left as it is, so it may be run again.
#
#   bash FOLDER/code/gpt_jax/launch/host_setup.sh EXTRA MOUNTS [BUCKET...]
#
# EXTRA is the extra of the package that brings the accelerator: tpu, gpu or nothing.
set -euo pipefail
extra=$1 mounts=$2
shift 2
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)

install_gcsfuse() {
  local keys=/usr/share/keyrings/cloud.google.asc repository
  repository="gcsfuse-$(lsb_release -c -s)"
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" >/dev/null
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt $repository main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A new machine is still upgrading itself: wait for its lock.
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq gcsfuse
}

for bucket in "$@"; do
  if mountpoint -q "$mounts/$bucket"; then continue; fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  sudo mkdir -p "$mounts/$bucket"
  sudo chown "$(id -u)" "$mounts/$bucket"
  # Nothing is cached: a host sees at once what another has written. A checkpoint becomes valid by
  # the renaming of its folder.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
    "$bucket" "$mounts/$bucket" >&2
done

if [ ! -e "$folder/venv/installed" ]; then
  # The images of TPU VMs have an older Python than the package needs; uv brings one.
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  PATH=$HOME/.local/bin:$PATH
  uv venv --quiet --clear --python 3.12 "$folder/venv"
  uv pip install --quiet --python "$folder/venv/bin/python" --editable \
    "$folder/code${extra:+[$extra]}"
  touch "$folder/venv/installed"
fi
