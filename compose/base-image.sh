#!/bin/sh
# All that `docker compose up` needs on a Debian machine that reaches its package mirror but no container registry:
# Docker Engine, Compose v2, a base image, and the CPU build of torch in wheels/.
#
#   sudo sh compose/base-image.sh       # safe to repeat: a part that already works is left as it is
#
# BASE_IMAGE      name to give the base image; goes into .env, where Compose reads it   (default debian-python:local)
# COMPOSE_SUITE   Debian release to take Compose v2 from, where this one has only v1    (default trixie)
set -eu

base_image=${BASE_IMAGE:-debian-python:local}
compose_suite=${COMPOSE_SUITE:-trixie}
plugins=/usr/local/lib/docker/cli-plugins
engine_log=/var/log/dockerd.log
repository=$(cd "$(dirname "$0")/.." && pwd)

say() { printf 'base-image: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }
work=
trap '[ -z "$work" ] || rm -rf --one-file-system "$work"' EXIT

setting() { sed -n "s/^$1=//p" "$repository/compose/mesh.env"; }

# ---- packages

apt_updated=
refresh_package_lists() {
    [ -n "$apt_updated" ] || apt-get -q update || say "some package lists could not be refreshed; going on"
    apt_updated=yes
}

install_packages() {
    refresh_package_lists
    DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends "$@"
}

# The mirror that this machine itself uses for Debian's main archive, whatever the format of its source lists.
debian_mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' \
        "Codename: $codename" 'Component: main' | head -n 1
}

# ---- engine

engine_answers() { docker info >/dev/null 2>&1; }
wait_for_engine() {
    tries=$1
    while [ "$tries" -gt 0 ]; do
        if engine_answers; then return 0; fi
        tries=$((tries - 1)); sleep 1
    done
    return 1
}

ensure_engine() {
    if engine_answers; then say "engine: already running"; return; fi
    if ! command -v dockerd >/dev/null; then
        say "engine: installing docker.io"
        install_packages docker.io iptables ca-certificates
        if wait_for_engine 5; then return; fi      # the package may have started it
    fi
    [ -d /sys/fs/cgroup/memory ] || [ -e /sys/fs/cgroup/cgroup.controllers ] || die "no cgroups are mounted in /sys/fs/cgroup"
    if [ -d /run/systemd/system ]; then
        say "engine: starting docker.service"
        systemctl start docker
    else
        say "engine: starting dockerd in the background, log in $engine_log"
        setsid dockerd >>"$engine_log" 2>&1 </dev/null &
    fi
    wait_for_engine 60 || die "the engine does not answer; see $engine_log or journalctl -u docker"
}

# Compose is taken out of its package, not installed: an older docker-compose package can stay beside it.
ensure_compose() {
    if docker compose version >/dev/null 2>&1 && docker buildx version >/dev/null 2>&1; then
        say "compose: already present"; return
    fi
    refresh_package_lists
    mirror=$(debian_mirror)
    [ -n "$mirror" ] || die "no Debian mirror in the package sources of this machine"
    case $(apt-cache policy docker-compose | awk '/Candidate:/ {print $2}') in
        2.*) say "compose: installing docker-compose and docker-buildx"; install_packages docker-compose docker-buildx; return ;;
    esac
    say "compose: taking docker-compose and docker-buildx from Debian $compose_suite"
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs" "$work/root"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $compose_suite main" >"$work/sources.list"
    private_apt() {
        apt-get -q -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
            -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root "$@"
    }
    private_apt update
    (cd "$work/debs" && private_apt download docker-compose docker-buildx)
    mkdir -p "$plugins"
    for package in "$work"/debs/*.deb; do dpkg-deb -x "$package" "$work/root"; done
    for plugin in docker-compose docker-buildx; do
        install -m 755 "$work/root/usr/libexec/docker/cli-plugins/$plugin" "$plugins/$plugin"
    done
    docker compose version && docker buildx version || die "Compose does not run; see $plugins"
}

# ---- base image: Debian with python3 and this machine's own certificate authorities, so that pip works behind an
# inspecting proxy

ensure_base_image() {
    if docker image inspect "$base_image" >/dev/null 2>&1; then say "base image: $base_image already present"; return; fi
    command -v debootstrap >/dev/null || install_packages debootstrap
    [ -n "$(debian_mirror)" ] || refresh_package_lists
    mirror=$(debian_mirror)
    [ -n "$mirror" ] || die "no Debian mirror in the package sources of this machine"
    root=$work/rootfs
    say "base image: building $base_image from Debian $codename"
    debootstrap --variant=minbase --include=ca-certificates,python3-venv "$codename" "$root" "$mirror" >"$work/debootstrap.log" 2>&1 \
        || { tail -n 20 "$work/debootstrap.log" >&2; die "debootstrap failed"; }
    if [ -d /usr/local/share/ca-certificates ]; then
        cp -RL /usr/local/share/ca-certificates/. "$root/usr/local/share/ca-certificates/"
        chroot "$root" update-ca-certificates
    fi
    tar -C "$root" -c --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' --exclude='./var/cache/apt/*' \
        --exclude='./var/lib/apt/lists/*' --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' \
        --exclude='./usr/share/locale/*' . | docker import --change 'CMD ["python3"]' - "$base_image"
}

name_base_image_for_compose() {
    if grep -qs '^BASE_IMAGE=' "$repository/.env"; then return; fi
    echo "BASE_IMAGE=$base_image" >>"$repository/.env"
    say "wrote BASE_IMAGE=$base_image into .env"
}

# ---- torch: the build that the image asks for, for the base image's Python

some_pip() {
    for python in "$repository/.venv/bin/python" python3; do
        if "$python" -m pip --version >/dev/null 2>&1; then echo "$python"; return; fi
    done
    command -v python3 >/dev/null && python3 -c 'import ensurepip' 2>/dev/null || install_packages python3-venv >&2
    python3 -m venv "$work/venv"
    echo "$work/venv/bin/python"
}

ensure_torch_wheel() {
    torch=${TORCH:-$(setting TORCH)}
    if ls "$repository"/wheels/torch-"$torch"-*.whl >/dev/null 2>&1; then say "torch: $torch already in wheels/"; return; fi
    python=$(some_pip)
    version=$(docker run --rm "$base_image" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    download() {
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --python-version "$version" --dest "$repository/wheels" "$@" "torch==$torch"
    }
    say "torch: fetching $torch for Python $version into wheels/"
    # First from what pip is set up with here; torch's own index is the one that everybody else needs.
    download || download --index-url "$(setting TORCH_INDEX_URL)" \
        || say "torch: $torch could not be fetched; the build of the worker image will try $(setting TORCH_INDEX_URL)" >&2
}

[ "$(id -u)" = 0 ] || die "run as root"
[ -r /etc/debian_version ] || die "this is not a Debian machine"
. /etc/os-release
codename=$VERSION_CODENAME
work=$(mktemp -d)
chmod 755 "$work"
ensure_engine
ensure_compose
ensure_base_image
name_base_image_for_compose
ensure_torch_wheel
say "done: $(docker version --format 'engine {{.Server.Version}}'), compose $(docker compose version --short)"
