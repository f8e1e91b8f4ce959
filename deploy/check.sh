#!/usr/bin/env bash
# Validates deploy/ with tools that pip does not bring: promtool, systemd-analyze, docker compose and kubectl. Each is run
# where it is installed and named where it is not; no cluster, daemon or network is needed. The rest is tests/deploy.
set -uo pipefail
cd "$(dirname "$0")" || exit
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

check() {  # WHAT COMMAND...
  local what=$1
  shift
  if "$@" >"$work/said" 2>&1; then
    echo "passed   $what"
  else
    echo "FAILED   $what"
    sed 's/^/         /' "$work/said"
    failed=1
  fi
}

not_run() { echo "not run  $1: $2 is not installed"; }

if command -v promtool >/dev/null; then
  check "promtool check rules" promtool check rules prometheus/alerts.yaml
  check "promtool test rules" promtool test rules prometheus/alerts_test.yaml
else
  not_run "the rules and their unit tests" "promtool (Debian: prometheus)"
fi

if command -v systemd-analyze >/dev/null; then
  # The programs are not on this machine; everything else of the units is looked at.
  for unit in systemd/*.service; do
    sed -E 's#^ExecStart=\S+#ExecStart=/bin/true#' "$unit" >"$work/$(basename "$unit")"
  done
  check "systemd-analyze verify" systemd-analyze verify "$work"/*.service
  check "systemd-analyze security, the sidecar at 2.0 or better" \
    systemd-analyze security --offline=yes --no-pager --threshold=20 "$work/weight-sync.service"
else
  not_run "the units" systemd-analyze
fi

compose=()
if docker compose version >/dev/null 2>&1; then
  compose=(docker compose)
elif command -v docker-compose >/dev/null; then
  compose=(docker-compose)
fi
if ((${#compose[@]})); then
  check "compose config" env MODEL=/srv/model "${compose[@]}" --file compose/compose.yaml --profile trainer config --quiet
else
  not_run "compose.yaml" "docker compose"
fi

if command -v kubectl >/dev/null; then
  for folder in kubernetes kubernetes/fleet; do
    check "kubectl kustomize $folder" kubectl kustomize "$folder"
    if kubectl kustomize "$folder" >"$work/rendered.yaml" 2>/dev/null && command -v kubernetes-validate >/dev/null; then
      check "kubernetes-validate of what it renders" kubernetes-validate --strict "$work/rendered.yaml"
    fi
  done
else
  not_run "the rendered manifests" kubectl
fi
exit "$failed"
