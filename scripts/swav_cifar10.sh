#!/bin/bash
# SwAV on CIFAR-10 with one GPU: ResNet-18 with the small stem, on the 50,000 training images.
#
#   DATASET_PATH=cifar10/train bash scripts/swav_cifar10.sh --dump_path runs/cifar10
#
# Not measured yet: the settings are those of the CPU recipe, scaled to a larger network and a longer training.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
exec "${PYTHON:-$root/.venv/bin/python}" "$root"/main_swav.py --data_path "${DATASET_PATH:?set it to the folder of training images}" \
    --arch resnet18 --stem small --hidden_mlp 2048 --feat_dim 128 --nmb_prototypes 100 --epsilon 0.03 \
    --freeze_prototypes_niters 0 --nmb_crops 2 --size_crops 32 --min_scale_crops 0.2 --max_scale_crops 1 \
    --color_jitter 0.4 --blur_p 0 --optimizer adamw --base_lr 2e-3 --warmup_epochs 5 --epochs 200 \
    --batch_size 512 --workers 8 --dump_path runs/swav_cifar10 "$@"
