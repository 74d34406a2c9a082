#!/usr/bin/env bash
# What a GPU should show before a long run on it, in less than ten minutes. It ends with a table.
#
#     bash bench/gpu.sh                           on one GPU and, if there are more, on two
#     DEVICE=cpu SIZE=tiny bash bench/gpu.sh      the same commands on a CPU, with tiny models
#
# It writes to out/gpu, or to OUT. docs/GPU.md says what the rows mean.
set -o pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda} OUT=${OUT:-out/gpu}
TOWN=$OUT/tinytown PYTHON=${PYTHON:-python3}
model=110M sizes="110M 1B" decoded=7B lr=3e-4
if [ "$SIZE" = tiny ]; then model=tiny sizes=tiny decoded=tiny lr=1e-3; fi

# try: print a command and run it. If it fails, that is a row of the table, and the others still run.
try() {
    printf '\n== %s s: python %s\n' $SECONDS "$*"
    $PYTHON "$@" || echo "| \`$*\` | **failed** with exit code $? | |"
}
gpu() { try -m bench.gpu "$@"; }
stage() { gpu stage "$@" --device $DEVICE --overwrite; }
both() { try -m torch.distributed.run --standalone --nproc_per_node=2 -m bench.gpu "$@"; }

everything() {
    $PYTHON -m bench.gpu machine $DEVICE || return

    # Every stage, with its peak of memory; PPO's first importance ratio.
    try -m tinytown $TOWN --dialogues 600
    try -m data.corpus --overwrite --out $OUT/tokens --data $TOWN/encyclopedia.jsonl:0.2 \
        $TOWN/stories.jsonl:0.1
    pretrain="train_pretrain.py --size $model --data $OUT/tokens --lr $lr --warmup-steps 5"
    pretrain+=" --max-steps 20 --batch-size 4 --log-every 1 --eval-every 20 --eval-tokens 1024"
    stage $pretrain --out $OUT/pretrain
    stage train_sft.py --init $OUT/pretrain --data $TOWN/dialogues.jsonl:0.3 --epochs 1 --lr $lr \
        --out $OUT/sft
    try -m data.preferences --chat $OUT/sft --other $OUT/pretrain --device $DEVICE --overwrite \
        --prompts $TOWN/compare-v1.jsonl:0.005 --max-new-tokens 24 --out $OUT/pairs.jsonl
    for kind in helpfulness safety; do
        stage train_rm.py --kind $kind --init $OUT/sft --data $TOWN/contrasts.jsonl:0.03 \
            $OUT/pairs.jsonl --lr 1e-4 --out $OUT/rm
    done
    prompts="--init $OUT/sft --rm $OUT/rm --prompts $TOWN/prompts-v1.jsonl:0.05 --max-new-tokens 32"
    stage train_rlhf.py $prompts --samples 2 --out $OUT/v1
    stage train_rlhf.py $prompts --method ppo --val-prompts $TOWN/prompts-val.jsonl:0.05 \
        --iterations 2 --batch-size 16 --mini-batch 8 --out $OUT/v2
    try llama2.py chat $OUT/v2 --device $DEVICE --max-new-tokens 24 -p "What is 7 + 5?"

    # Some operations of GPUs add in any order, so equal runs may differ.
    stage $pretrain --out $OUT/again
    gpu compare "the same run again" $OUT/pretrain $OUT/again "0, or little"
    gpu stop 10 $pretrain --out $OUT/resumed --device $DEVICE --overwrite
    try $pretrain --out $OUT/resumed --device $DEVICE --resume
    gpu compare "stopped and resumed" $OUT/pretrain $OUT/resumed "as the row above"

    # Speed.
    for size in $sizes; do gpu train $DEVICE $size; done
    gpu decode $DEVICE $decoded

    # Two processes, one per GPU.
    count='import torch; print(torch.cuda.device_count())'
    if [ $DEVICE = cpu ] || [ "$($PYTHON -c "$count")" -gt 1 ]; then
        for engine in "" --shard; do
            both stage $pretrain $engine --out $OUT/two$engine --device $DEVICE --overwrite
            gpu compare "two processes${engine:+ $engine}" $OUT/pretrain $OUT/two$engine \
                "losses: below 0.002, in float32 1e-5"
            for size in $sizes; do both train $DEVICE $size $engine; done
        done
    fi
}

mkdir -p $OUT
everything 2>&1 | tee $OUT/log.txt || exit
echo
{
    printf '| bench/gpu.sh, %s s | measured | expected |\n|---|---|---|\n' $SECONDS
    grep '^| .* |$' $OUT/log.txt
} | tee $OUT/table.md
! grep -q '\*\*failed\*\*' $OUT/table.md
