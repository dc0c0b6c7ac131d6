#!/bin/bash
#SBATCH --job-name=brumby
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8
#SBATCH --exclusive --mem=0    # all cores and all memory of each node
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300   # five minutes before the time is up
#SBATCH --requeue --open-mode=append
# A run longer than a job: saves before the time limit, queues again, and goes on where it was.
#   EXPERIMENT=brumby_14b RUN=runs/brumby_14b sbatch docs/examples/slurm.sh
: "${EXPERIMENT:=brumby_14b}" "${RUN:=runs/$EXPERIMENT}"
if [ -d "$RUN" ]; then what="resume=$RUN"; else what="experiment=$EXPERIMENT"; fi

requeue=
trap 'requeue=yes; kill -USR1 "$launch"' USR1
trap 'kill -TERM "$launch"' TERM
brumby launch "$what" ranks_per_host="$SLURM_GPUS_ON_NODE" grace=240 &
launch=$!
while true; do  # a signal ends `wait` with 138 or 143, not the launch
    wait "$launch"
    code=$?
    [ $code = 138 ] || [ $code = 143 ] || break
done
if [ $code = 130 ] && [ $requeue ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
