#!/bin/bash
# SwAV on CIFAR-10 with two CPU cores.
#
#   DATASET_PATH=cifar10/train bash scripts/swav_cifar10_cpu.sh --dump_path runs/cifar10_cpu
#
# DATASET_PATH is a folder with the 50,000 training images, in class folders or not. Flags given here are passed on.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
exec "${PYTHON:-$root/.venv/bin/python}" "$root"/main_swav.py --data_path "${DATASET_PATH:?set it to the folder of training images}" \
    --arch conv4 --hidden_mlp 256 --feat_dim 64 --nmb_prototypes 100 --epsilon 0.03 --freeze_prototypes_niters 0 \
    --nmb_crops 2 --size_crops 32 --min_scale_crops 0.4 --max_scale_crops 1 --color_jitter 0.3 --blur_p 0 \
    --optimizer adamw --base_lr 3e-3 --warmup_epochs 1 --epochs 6 --batch_size 256 --workers 0 --device cpu \
    --dump_path runs/swav_cifar10_cpu "$@"
