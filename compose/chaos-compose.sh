#!/bin/sh
# A mesh in containers of the shape that a suite wants, hurt by it under load, and removed again.
# Arguments are those of `moemesh chaos run`; without --suite it is the smoke suite. Images are built first,
# which takes seconds where nothing has changed: else an older build would be judged in place of this one.
set -eu
cd "$(dirname "$0")/.."

# Signals go from the host to the containers' processes.
if [ "$(id -u)" = 0 ]; then
    as_root=
elif sudo -n true 2>/dev/null; then
    as_root='sudo -n --preserve-env'
else
    echo 'chaos on containers needs root, or sudo without a password' >&2
    exit 2
fi

suite=smoke
previous=
for argument; do
    [ "$previous" = --suite ] && suite=$argument
    previous=$argument
done
export COMPOSE_PROJECT_NAME="${COMPOSE_PROJECT_NAME:-moemesh-test-chaos}" PORT="${PORT:-8390}"
# The router's state on a small file system, which `disk_full` may fill.
export COMPOSE_FILE="${COMPOSE_FILE:-compose.yaml:compose/compose.chaos.yaml}"
shape=$(.venv/bin/moemesh chaos settings "$suite")
for setting in $shape; do
    export "${setting?}"
done

remove() {
    docker compose down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1 || echo 'some containers could not be removed' >&2
}
trap remove EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

docker compose build --quiet
docker compose up -d --wait --wait-timeout 120
report=chaos-report/compose
mkdir -p "$report"
status=0
$as_root .venv/bin/moemesh chaos run --target docker --output "$report" "$@" || status=$?
docker compose logs --no-color --timestamps >"$report/compose.log"
exit "$status"
