#!/bin/bash
#SBATCH --job-name=deepcluster_alexnet
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=12 --mem=100G
#SBATCH --time=72:00:00 --requeue --open-mode=append --signal=USR1@180 --output=%x-%j.log
# Published result: VOC07 classification 70.4 % mAP (fc6-8 on frozen BatchNorm; 72.0 % with its scale and shift trained).
# The paper trains for 500 epochs, the published script for 200 unless told.
#   DATASET_PATH=/imagenet/train EXPERIMENT_PATH=/runs/mine sbatch scripts/deepcluster_alexnet.sh
set -eu
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-12}"
# Until training begins the signal is ignored: it must not kill a process that is still starting up.
exec srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' - "${PYTHON:-.venv/bin/python}" -u main_deepcluster.py \
    --data_path "${DATASET_PATH:?set it to the folder of training images}" \
    --dump_path "${EXPERIMENT_PATH:?set it to the run directory}" \
    --arch alexnet --sobel --nmb_cluster 10000 --base_lr 0.05 --wd 1e-5 --workers 12 "$@"
