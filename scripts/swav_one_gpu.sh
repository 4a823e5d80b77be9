#!/bin/bash
# SwAV on your own photographs with one GPU: the published recipe for batches of 256, as 4 accumulated batches of 64.
#
#   DATASET_PATH=photos bash scripts/swav_one_gpu.sh --dump_path runs/photos
#
# Not measured yet. With fewer than some 100,000 images take fewer prototypes (--nmb_prototypes 300) and more --epochs.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
exec "${PYTHON:-$root/.venv/bin/python}" "$root"/main_swav.py --data_path "${DATASET_PATH:?set it to the folder of images}" \
    --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1 0.14 --batch_size 64 \
    --accumulate 4 --base_lr 0.6 --final_lr 0.0006 --warmup_epochs 0 --freeze_prototypes_niters 5005 \
    --queue_length 3840 --epoch_queue_starts 15 --epochs 200 --dump_path runs/swav_one_gpu "$@"
