#!/bin/bash
#SBATCH --job-name=swav_400ep_pretrain
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=450G
#SBATCH --time=25:00:00 --requeue --open-mode=append --signal=USR1@180 --output=%x-%j.log
# Published result: 74.6 % ImageNet linear top-1; 400 epochs, 2x224 + 6x96 crops, global batch 4096.
# Published time: 24 hours on 64 V100 GPUs (3 min 40 s an epoch).
#   DATASET_PATH=/imagenet/train EXPERIMENT_PATH=/runs/mine sbatch scripts/swav_400ep_pretrain.sh
set -eu
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-8}"
# Until training begins the signal is ignored: it must not kill a process that is still starting up.
exec srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' - "${PYTHON:-.venv/bin/python}" -u main_swav.py \
    --data_path "${DATASET_PATH:?set it to the folder of training images}" \
    --dump_path "${EXPERIMENT_PATH:?set it to the run directory}" \
    --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1. 0.14 \
    --crops_for_assign 0 1 --temperature 0.1 --epsilon 0.05 --sinkhorn_iterations 3 --feat_dim 128 \
    --nmb_prototypes 3000 --queue_length 0 --epochs 400 --batch_size 64 --base_lr 4.8 --final_lr 0.0048 \
    --freeze_prototypes_niters 313 --wd 0.000001 --warmup_epochs 10 --start_warmup 0.3 --arch resnet50 \
    --use_fp16 true --sync_bn apex "$@"
