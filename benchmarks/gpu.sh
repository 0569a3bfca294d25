#!/usr/bin/env bash
# Every GPU figure of this project, in at most nine minutes: `benchmarks/gpu.sh [FOLDER]`. Where there is no card, the same scripts
# in small on the CPU, so that they are known to run.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-artifacts/gpu}
python=${PYTHON:-python}
mkdir -p "$folder"

step() { # seconds, title, command
  local seconds=$1 title=$2
  shift 2
  echo "== $title: $*"
  timeout "$seconds" "$@" || echo "== $title: ended with $? (124: after $seconds s)"
}

if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  step 60 "2B, random weights" "$python" benchmarks/random_backbone.py configs/qwen3-vl-2b.yaml "$folder/2b"
  step 120 "2B, export" "$python" benchmarks/export_gpu.py configs/qwen3-vl-2b.yaml --set "backbone.name=$folder/2b" --folder "$folder/2b-export" \
    --items 3000 --methods forward tpad
  step 60 "2B, training steps" "$python" benchmarks/distill.py configs/qwen3-vl-2b.yaml --set "backbone.name=$folder/2b"
  step 30 "256M, random weights" "$python" benchmarks/random_backbone.py configs/smolvlm-256m.yaml "$folder/256m"
  step 90 "256M, export" "$python" benchmarks/export_gpu.py configs/smolvlm-256m.yaml --set "backbone.name=$folder/256m" --folder "$folder/256m-export" \
    --methods forward tpad
  step 90 "indexes, built on the card" "$python" benchmarks/index.py --items 1000000 --index flat,ivf,ivfpq --sessions 50
  step 90 "a short distillation" "$python" -m cli distill --run "$folder/shop"
else
  echo "no card here: the CPU forms"
  step 300 "export" "$python" benchmarks/export.py compare --folder "$folder/export" --items 64 --rounds 1 --methods plain tpad
  step 300 "indexes" "$python" benchmarks/index.py --items 5000 --index flat,ivf,ivfpq --sessions 20
fi
