#!/bin/bash

# Parameters
#SBATCH --array=0-1%2
#SBATCH --cpus-per-task=1
#SBATCH --job-name=marginface-tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=runs/tiny/slurm/%A_%a.log
#SBATCH --partition=low
#SBATCH --qos=night
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --time=240
#SBATCH --wckey=submitit

# command
export SUBMITIT_EXECUTOR=slurm
trap : TERM USR2
code=0
srun --kill-on-bad-exit=0 --wait=30 bash runs/tiny/slurm/"$SLURM_ARRAY_TASK_ID.sh" || code=$?
case $code in
  0 | 2 | 3) exit "$code" ;;
  75) ;;
  *)
    crashes=runs/tiny/slurm/${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.crashes
    echo "exit code $code" >> "$crashes" || exit "$code"
    [ "$(wc -l < "$crashes")" -le 3 ] || exit "$code"
    ;;
esac
echo "exit code $code, restarts before: ${SLURM_RESTART_COUNT:-0}; requeued"
trap - TERM
scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
exit "$code"
