#!/usr/bin/env bash
# Runs a script on every GPU of this host (on every core if it has no GPU), or on several hosts.
#
#   launch/torchrun.sh train.py --lr 0.1
#   RANKS=4 launch/torchrun.sh train.py
#   RESTARTS=3 launch/torchrun.sh examples/recovery.py
#   HOSTS=2 MASTER_ADDR=host0 launch/torchrun.sh train.py       # the same on each host
set -euo pipefail
RANKS=${RANKS:-auto}                  # on each host
HOSTS=${HOSTS:-1}
MASTER_ADDR=${MASTER_ADDR:-localhost} # one of the hosts, where all of them meet
MASTER_PORT=${MASTER_PORT:-29500}
RESTARTS=${RESTARTS:-0}               # maximum number of restarts
meet=(--rdzv-backend c10d --rdzv-id "${JOB_ID:-syncbn}" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
[ "$HOSTS" = 1 ] && meet=(--standalone)
# torchrun's own store keeps dead ranks' addresses across a restart (pytorch issue 135712), so rank 0 makes a new one.
[ "$RESTARTS" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$HOSTS" --nproc-per-node "$RANKS" --max-restarts "$RESTARTS" "${meet[@]}" "$@"
