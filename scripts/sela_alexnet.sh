#!/bin/bash
#SBATCH --job-name=sela_alexnet
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=24 --mem=100G
#SBATCH --time=72:00:00 --requeue --open-mode=append --signal=USR1@180 --output=%x-%j.log
# Published results of AlexNets: 42.1 % ImageNet linear top-1 with --hc 1 --ncl 1000, 43.8 % with --ncl 10000; the published
# script, this one, has 10 heads of 3000 clusters.
# The published --epochs 400 trains for 401, which is said as it is here.
#   DATASET_PATH=/imagenet/train EXPERIMENT_PATH=/runs/mine sbatch scripts/sela_alexnet.sh
set -eu
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-24}"
# Until training begins the signal is ignored: it must not kill a process that is still starting up.
exec srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' - "${PYTHON:-.venv/bin/python}" -u main_sela.py \
    --version 1 --data_path "${DATASET_PATH:?set it to the folder of training images}" \
    --dump_path "${EXPERIMENT_PATH:?set it to the run directory}" \
    --arch alexnet --hc 10 --ncl 3000 --nopts 100 --augs 3 --epochs 401 --batch_size 256 --base_lr 0.08 --lrdrop 150 \
    --wd 1e-5 --workers 24 "$@"
