#!/bin/bash
#SBATCH --job-name=sela_cifar
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8 --mem=50G
#SBATCH --time=48:00:00 --requeue --open-mode=append --signal=USR1@180 --output=%x-%j.log
# No result was published with this script; CIFAR-10 images are enlarged to 256 pixels and cropped to 224.
#   DATASET_PATH=/cifar10/train EXPERIMENT_PATH=/runs/mine sbatch scripts/sela_cifar.sh
set -eu
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-8}"
# Until training begins the signal is ignored: it must not kill a process that is still starting up.
exec srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' - "${PYTHON:-.venv/bin/python}" -u main_sela.py \
    --version 1 --cifar true --data_path "${DATASET_PATH:?set it to the folder of training images}" \
    --dump_path "${EXPERIMENT_PATH:?set it to the run directory}" \
    --arch alexnet --hc 10 --ncl 128 --nopts 400 --epochs 400 --batch_size 128 --base_lr 0.03 "$@"
