#!/bin/bash
# Two machines with eight GPUs each: sbatch examples/cluster/slurm.sh run.yaml --set training.sharding=hybrid
# Requeued after a stop, it goes on from the last checkpoint; the run folder must be on a disk that all machines share.
#SBATCH --job-name=regraft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --requeue
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${PORT:-29500}" \
  -m regraft.engine train "$@"
