#!/bin/bash
#SBATCH --job-name=sela_augpp_r50_1k
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=24 --mem=100G
#SBATCH --time=240:00:00 --requeue --open-mode=append --signal=USR1@180 --output=%x-%j.log
# Published result: 63.5 % ImageNet linear top-1; labels against the classes: accuracy 30.5 %, NMI 65.7, adjusted NMI 42.0,
# adjusted Rand index 16.2.
# No script was ever published: "MoCo-v2's augmentation, 280 epochs, three drops of the learning rate as in CMC", whose
# drops at 120, 160 and 200 of 240 epochs are scaled here; learning rate and batch are those of the other scripts.
#   DATASET_PATH=/imagenet/train EXPERIMENT_PATH=/runs/mine sbatch scripts/sela_augpp_r50_1k.sh
set -eu
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-24}"
# Until training begins the signal is ignored: it must not kill a process that is still starting up.
exec srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' - "${PYTHON:-.venv/bin/python}" -u main_sela.py \
    --version 1 --data_path "${DATASET_PATH:?set it to the folder of training images}" \
    --dump_path "${EXPERIMENT_PATH:?set it to the run directory}" \
    --arch resnet50 --hc 1 --ncl 1000 --nopts 100 --augs 3 --min_scale_crops 0.2 --color_jitter 0.4 \
    --hue_jitter 0.1 --color_jitter_p 0.8 --gray_p 0.2 --blur_p 0.5 --epochs 280 \
    --lr_drops 140 187 233 --batch_size 256 --base_lr 0.08 --wd 1e-5 --workers 24 "$@"
