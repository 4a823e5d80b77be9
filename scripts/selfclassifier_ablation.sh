#!/bin/bash
#SBATCH --job-name=selfclassifier_ablation
#SBATCH --nodes=11 --ntasks-per-node=6 --gpus-per-node=6 --cpus-per-task=16 --mem=128G
#SBATCH --time=24:00:00 --requeue --open-mode=append --signal=USR1@180 --output=%x-%j.log
# The 33 published ablations of the 100-epoch recipe, which differ from it by the flags of the table below. All but the
# batch sizes also have no BatchNorm in the head and use mixed precision, unlike that recipe: so they were published.
# Their results are in the paper's tables only; the recipe itself reaches 72.4 % ImageNet linear top-1.
#   DATASET_PATH=/imagenet/train EXPERIMENT_PATH=/runs/mine sbatch scripts/selfclassifier_ablation.sh wd_1e-5
#   ... sbatch --nodes=8 --ntasks-per-node=4 --gpus-per-node=4 scripts/selfclassifier_ablation.sh bs_1024
set -eu
name="${1:?name an ablation: scripts/selfclassifier_ablation.sh wd_1e-5}"
shift
nodes=11
common="--use_bn false --use_fp16 true"
two_views="--nmb_crops 2 --size_crops 224 --min_scale_crops 0.14 --max_scale_crops 1"
rate() { echo "--base_lr $1 --start_warmup $2 --final_lr $3"; }
same() { printf -- "--cls_size"; for _ in $(seq "$1"); do printf " %s" "$2"; done; }

case "$name" in
    no_multicrop)              flags="$two_views" ;;
    no_nn)                     flags="--no_nn_aug" ;;
    no_nn_no_multicrop)        flags="$two_views --no_nn_aug" ;;
    bs_256)                    nodes=2 common="-b 128 --sync_bn pytorch --warmup_epochs 0"
                               flags="$(rate 0.3 0.3 0.0003) --queue_len 16384" ;;
    bs_512)                    nodes=4 common="-b 128 --sync_bn pytorch --warmup_epochs 0"; flags="$(rate 0.6 0.3 0.0006)" ;;
    bs_1024)                   nodes=8 common="-b 128 --syncbn_process_group_size 16"; flags="$(rate 1.2 0.3 0.0012)" ;;
    bs_2048)                   nodes=16 common="-b 128 --syncbn_process_group_size 32"; flags="$(rate 2.4 0.3 0.0024)" ;;
    1x1k)                      flags="$(same 1 1000)" ;;
    1x2k)                      flags="$(same 1 2000)" ;;
    1x4k)                      flags="$(same 1 4000)" ;;
    1x8k)                      flags="$(same 1 8000)" ;;
    5x1k)                      flags="$(same 5 1000)" ;;
    10x1k)                     flags="$(same 10 1000)" ;;
    15x1k)                     flags="$(same 15 1000)" ;;
    fixed_cls)                 flags="--fixed_cls" ;;
    base_lr_0.1)               flags="$(rate 1.6 0.1 0.0016)" ;;
    base_lr_0.2)               flags="$(rate 3.2 0.2 0.0032)" ;;
    base_lr_0.4)               flags="$(rate 6.4 0.4 0.0064)" ;;
    dim_256)                   flags="--feat_dim 256" ;;
    hidden_dim_8192)           flags="--hidden_mlp 8192" ;;
    hidden_dim_8192_dim_256)   flags="--hidden_mlp 8192 --feat_dim 256" ;;
    no_mlp)                    flags="--num_hidden 0 --feat_dim 2048 --queue_len 131072" ;;
    num_hidden_3)              flags="--num_hidden 3" ;;
    num_hidden_3_dim_256)      flags="--num_hidden 3 --feat_dim 256" ;;
    q_len_128K)                flags="$(rate 3.2 0.2 0.0032) --queue_len 131072" ;;
    q_len_512K)                flags="--queue_len 524288" ;;
    q_len_1M)                  flags="--queue_len 1048576" ;;
    col_tau_3e-2_row_tau_1e-1) flags="--col_tau 0.03" ;;
    col_tau_3e-2_row_tau_7e-2) flags="--col_tau 0.03 --row_tau 0.07" ;;
    col_tau_5e-2_row_tau_7e-2) flags="--row_tau 0.07" ;;
    wd_1e-5)                   flags="--wd 1e-5" ;;
    wd_5e-5)                   flags="--wd 5e-5" ;;
    wd_5e-6)                   flags="--wd 5e-6" ;;
    *) echo "$name: not an ablation; the table in scripts/selfclassifier_ablation.sh has their names" >&2; exit 2 ;;
esac
if [ "${SLURM_JOB_NUM_NODES:-$nodes}" != "$nodes" ]; then
    echo "$name: published on $nodes nodes, pass --nodes=$nodes (bs_*: and --ntasks-per-node=4) to sbatch" >&2
    exit 2
fi
# shellcheck disable=SC2086  # the table's flags are words
exec "${BASH:-bash}" scripts/selfclassifier_100ep_pretrain.sh $common $flags "$@"
