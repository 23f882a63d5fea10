#!/bin/bash
#SBATCH --job-name=linearize
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# One torchrun per node, one process per GPU. The same job, submitted again or requeued, continues where it stopped;
# --out must be on a file system that all nodes share. Usage: sbatch docs/slurm_convert.sh TEACHER DATA OUT [--set ...]
set -euo pipefail

TEACHER=$1 DATA=$2 OUT=$3
shift 3
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))

srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$FIRST:29500" \
  -m linearize convert "$TEACHER" --data "$DATA" --out "$OUT" "$@"
