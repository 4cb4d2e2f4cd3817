#!/usr/bin/env bash
# Makes docs/pictures/tensorboard.png: TensorBoard's page "Custom scalars" of the runs in a folder, in a browser without a screen.
#   bash scripts/tensorboard_picture.sh [FOLDER [FILE]]      default: outputs/quickstart docs/pictures/tensorboard.png
# CHROMIUM is the browser (default chromium; Debian: apt-get install chromium).
set -euo pipefail
FOLDER=${1:-outputs/quickstart} FILE=${2:-docs/pictures/tensorboard.png} PORT=${PORT:-6123}
tensorboard --logdir "$FOLDER" --port "$PORT" --load_fast=false --reload_interval 5 &
trap "kill $!" EXIT
until curl -sf "http://localhost:$PORT/data/plugin/custom_scalars/layout" | grep -q category; do sleep 1; done
"${CHROMIUM:-chromium}" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --window-size=1500,1500 --virtual-time-budget=60000 \
    --screenshot="$FILE" "http://localhost:$PORT/#custom_scalars"
