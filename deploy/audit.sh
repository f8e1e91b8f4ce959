#!/usr/bin/env bash
# Installs the sidecar alone into a venv of its own, writes what is in it (dist/sbom.json, CycloneDX), and asks the
# advisory database of PyPI about it. The last needs a network; without one it fails and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv/base" "$venv/tools"
"$venv/base/bin/pip" install --quiet .
"$venv/tools/bin/pip" install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1
mkdir -p dist
"$venv/tools/bin/cyclonedx-py" environment --output-reproducible --output-file dist/sbom.json "$venv/base/bin/python"
"$venv/base/bin/pip" freeze --exclude sglang-weight-sync >"$venv/requirements.txt"
echo "dist/sbom.json: $(wc -l <"$venv/requirements.txt") packages"
"$venv/tools/bin/pip-audit" --disable-pip --no-deps --requirement "$venv/requirements.txt"
