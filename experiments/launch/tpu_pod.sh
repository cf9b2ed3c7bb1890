#!/bin/bash
# One run on all hosts of a Cloud TPU slice: TPU=my-slice ZONE=us-central2-b experiments/launch/tpu_pod.sh summarize
# The checkout with its packages lies in ~/rlhfjax of every host; RUN_DIR on a file system that all of them mount
# (Filestore; a bucket is none). Called again it resumes. The hosts find each other through Google's metadata.

set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${RUN_DIR:=/mnt/runs/first}"
how="--mesh.fsdp 8" # not part of what a run is: given again when it is resumed
run=$(printf '%q' "$RUN_DIR")
begin="$(printf '%q ' "$@")--run-dir $run"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
cd ~/rlhfjax || exit 2
if [ -f $run/config.yaml ]; then exec python experiments/run.py --resume $run $how; fi
exec python experiments/run.py $begin $how
"
