#!/bin/bash
#SBATCH --job-name=selfclassifier_800ep_pretrain
#SBATCH --nodes=11 --ntasks-per-node=6 --gpus-per-node=6 --cpus-per-task=16 --mem=128G
#SBATCH --time=48:00:00 --requeue --open-mode=append --signal=USR1@180 --output=%x-%j.log
# Published result: 74.1 % ImageNet linear top-1, clusters NMI 73.3, AMI 53.1, ARI 29.5, accuracy 41.1; 800 epochs,
# 2x224 + 6x96 crops, global batch 4092 in single precision (--use_fp16 true is faster, the ablations had it).
#   DATASET_PATH=/imagenet/train EXPERIMENT_PATH=/runs/mine sbatch scripts/selfclassifier_800ep_pretrain.sh
set -eu
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-16}"
# Until training begins the signal is ignored: it must not kill a process that is still starting up.
exec srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' - "${PYTHON:-.venv/bin/python}" -u main_selfclassifier.py \
    --data_path "${DATASET_PATH:?set it to the folder of training images}" \
    --dump_path "${EXPERIMENT_PATH:?set it to the run directory}" \
    --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.4 0.05 --max_scale_crops 1 0.4 \
    --cls_size 1000 2000 4000 8000 --row_tau 0.1 --col_tau 0.05 --queue_len 262144 --num_hidden 2 --hidden_mlp 4096 \
    --feat_dim 128 --use_bn true --epochs 800 --batch_size 62 --optimizer lars --base_lr 3.2 --start_warmup 0.2 \
    --final_lr 0.0032 --warmup_epochs 10 --wd 1e-6 --arch resnet50 --sync_bn apex --syncbn_process_group_size 22 \
    --use_fp16 false --workers 15 --log_freq 16 "$@"
