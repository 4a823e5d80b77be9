#!/bin/bash
#SBATCH --job-name=swav_200ep_bs256_pretrain
#SBATCH --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=4 --mem=150G
#SBATCH --time=72:00:00 --requeue --open-mode=append --signal=USR1@180 --output=%x-%j.log
# Published result: 72.7 % ImageNet linear top-1; 200 epochs, 2x224 + 6x96 crops, global batch 256.
# Published time: 174 hours on 4 V100 GPUs (52 min 10 s an epoch); a job that meets its limit goes on in the next.
#   DATASET_PATH=/imagenet/train EXPERIMENT_PATH=/runs/mine sbatch scripts/swav_200ep_bs256_pretrain.sh
set -eu
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-4}"
# Until training begins the signal is ignored: it must not kill a process that is still starting up.
exec srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' - "${PYTHON:-.venv/bin/python}" -u main_swav.py \
    --data_path "${DATASET_PATH:?set it to the folder of training images}" \
    --dump_path "${EXPERIMENT_PATH:?set it to the run directory}" \
    --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1. 0.14 \
    --crops_for_assign 0 1 --temperature 0.1 --epsilon 0.05 --sinkhorn_iterations 3 --feat_dim 128 \
    --nmb_prototypes 3000 --queue_length 3840 --epoch_queue_starts 15 --epochs 200 --batch_size 64 --base_lr 0.6 \
    --final_lr 0.0006 --freeze_prototypes_niters 5005 --wd 0.000001 --warmup_epochs 0 --arch resnet50 \
    --use_fp16 true --sync_bn pytorch "$@"
