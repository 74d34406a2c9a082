#!/usr/bin/env bash
# The whole paper at laptop size, in the order of Figure 4.
#
#     make                                    the same, in a virtual environment
#     make quick, or QUICK=1 bash paper.sh    in minutes, to out/quick: fewer texts and steps, V1 by
#                                             rejection sampling, V2 by PPO with the same reward
#                                             models, no Ghost Attention
#     OUT=out/seed2 SEED=2 bash paper.sh      another town, other initial weights, other samples
#
# You can run it again at any time: it skips finished runs and resumes interrupted ones.
set -eo pipefail
OUT=${OUT:-out${QUICK:+/quick}} SEED=${SEED:-1}
TOWN=$OUT/tinytown

# say: print a command and run it. run: the same with the seed. examine NAME: an evaluation, whose
# table also goes to the summary and whose numbers go to results/NAME.json. few: options of a quick
# run. $threads is empty (all cores) or OMP_NUM_THREADS=...
say() { printf '\n== %s s: %s\n' $SECONDS "$*"; env $threads ${PYTHON:-python3} "$@"; }
few() { [ -z "$QUICK" ] || echo "$@"; }
run() { say "$@" --seed "$seed"; }
examine() { run -m "${@:2}" --json "$OUT/results/$1.json" | tee -a "$summary"; }

# Run functions one after another in the background, with their own log and summary. `set -m` gives
# them a process group of their own. The trap ends that group when this script exits for any reason,
# such as Ctrl-C: its training script then saves first. The next run resumes both sides.
in_background() {
    printf '\n== %s s: in the background: %s; see %s\n' $SECONDS "$*" "$OUT/beside.log"
    set -m
    (summary=$OUT/summary-beside.txt; for part in "$@"; do $part; done) >> "$OUT/beside.log" 2>&1 &
    set +m
    background=$!
    trap 'kill -- -$background 2> /dev/null || true' EXIT
}
wait_for_background() { wait $background || { cat "$OUT/beside.log"; exit 1; }; }

# Threads of PyTorch that wait for each other spin. Briefly is as fast, and many times as fast beside
# other work, which then gets the core.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
summary=$OUT/summary.txt threads= seed=$SEED
half=OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + 1) / 2 ))}
mkdir -p "$OUT/results" && rm -f "$OUT"/summary*.txt "$OUT/beside.log"

# Tinytown: texts, dialogues and prompts of a toy world whose facts are known.
run -m tinytown "$TOWN"

# §2: tokenize the texts and pretrain a base model. The encyclopedia, the source of facts, is seen
# eight times as often as its size.
say -m data.corpus --out "$OUT/pretrain/tokens" --data "$TOWN/encyclopedia.jsonl:8" \
    "$TOWN/stories.jsonl${QUICK:+:0.5}" "$TOWN/web.jsonl${QUICK:+:0.2}" \
    "$TOWN/arithmetic.jsonl${QUICK:+:0.5}"
run train_pretrain.py --resume $(few --max-steps 600) --data "$OUT/pretrain/tokens" \
    --out "$OUT/pretrain"
examine recall evaluate.answers "$OUT/pretrain" --probes "$TOWN/probes.jsonl"

# §3.1: supervised fine-tuning on dialogues makes it a chat model.
run train_sft.py --resume $(few --epochs 1 --val-fraction 0.01) --init "$OUT/pretrain" \
    --data "$TOWN/dialogues.jsonl${QUICK:+:2.2}" "$TOWN/replay.jsonl:2" --out "$OUT/sft"
if [ -z "$QUICK" ]; then
    examine sft evaluate.answers "$OUT/pretrain" "$OUT/sft" --show 1 \
        --prompts "$TOWN/held-out.jsonl"
fi

# §3.2: five rounds of RLHF, V1 to V5. In each, the two newest models answer and the annotator
# compares their answers. Both reward models continue training on these pairs and on some of the
# earlier ones. Then the chat model is trained with the reward models.
chat=$OUT/sft other=$OUT/pretrain
blend=0.7       # before V1: the other model's weights are 70% of the way from --other to --chat
helpfulness=$OUT/sft safety=$OUT/sft rm_lr=5e-4
contrasts=$TOWN/contrasts.jsonl${QUICK:+:0.5}   # pairs of annotators; later rounds see 30% of them
replay=() earlier=()
train_reward_models() {
    run -m data.preferences --chat "$chat" --other "$other" --blend $blend \
        --prompts "$TOWN/compare-v$v.jsonl${QUICK:+:0.25}" --out "$OUT/preferences/v$v.jsonl"
    rm=$OUT/rm/v$v
    for kind in helpfulness safety; do
        run train_rm.py --resume --kind $kind --init "${!kind}" --lr $rm_lr --out "$rm" \
            --data "$OUT/preferences/v$v.jsonl" "$contrasts" "${replay[@]}"
    done
    helpfulness=$rm/helpfulness safety=$rm/safety rm_lr=3e-4
    replay+=("$OUT/preferences/v$v.jsonl:0.15") contrasts=$TOWN/contrasts.jsonl:0.3
}
train_version() {       # options of train_rlhf.py
    run train_rlhf.py --resume "$@" --init "$chat" --rm "$rm" --out "$OUT/rlhf/v$v" \
        --prompts "$TOWN/prompts-v$v.jsonl${QUICK:+:0.5}" \
        --val-prompts "$TOWN/prompts-val.jsonl" --earlier "${earlier[@]}"
    other=$chat chat=$OUT/rlhf/v$v blend=0
    earlier+=("$OUT/rlhf/v$v")
}
a_round() {
    v=$1 seed=$((100 * SEED + $1))      # each round has random numbers of its own
    method=rejection-sampling
    if [ $v = 5 ]; then method=ppo; fi  # it continues from rejection sampling's result
    train_reward_models
    train_version --method $method
    seed=$SEED
}
if [ "$QUICK" ]; then
    v=1
    train_reward_models
    train_version
    v=2
    train_version --method ppo --iterations 6 --eval-every 6
    examine quick evaluate.answers "$OUT/sft" "$OUT"/rlhf/v{1,2} --show 1 \
        --prompts "$TOWN/held-out.jsonl"
    echo "Now talk to it: ${PYTHON:-python3} llama2.py chat $OUT/rlhf/v2"
    exit
fi
for v in 1 2 3; do a_round $v; done

# Table 8: the accuracy of V1's reward models on pairs with new prompts.
table_8() {
    run -m data.preferences --chat "$OUT/sft" --other "$OUT/pretrain" --blend 0.7 \
        --prompts "$TOWN/compare-test.jsonl" --out "$OUT/preferences/test.jsonl"
    examine reward-models evaluate.reward_models "$OUT/rm/v1/helpfulness" "$OUT/rm/v1/safety" \
        --data "$OUT/preferences/test.jsonl" --truths "$TOWN/compare-test.jsonl"
}

# §3.3: Ghost Attention, starting from V3. First V3 learns to follow an instruction in the same
# message, to stop when it is taken back, and to hold long dialogues. Then Ghost Attention teaches it
# to keep to an instruction of the first message, and dialogues without one to play no role unasked.
# The best answers of V1 to V3 and texts of §2 are mixed in against forgetting.
ghost_attention() {
    run train_sft.py --resume --no-pack --init "$OUT/rlhf/v3" --seq-len 1024 --epochs 1 \
        --batch-size 4 --out "$OUT/instructed" --data "$TOWN/instructed.jsonl" \
        "$TOWN/stopped.jsonl:0.5" "$TOWN/long-dialogues.jsonl" \
        "$OUT"/rlhf/v{1,2,3}/best.jsonl "$TOWN/replay.jsonl"
    run -m data.ghost_attention --chat "$OUT/instructed" --data "$TOWN/long-dialogues.jsonl" \
        --instructions "$TOWN/instructions.jsonl" --out "$OUT/gatt/dialogues.jsonl"
    run train_sft.py --resume --no-pack --init "$OUT/instructed" --seq-len 1024 --epochs 1 \
        --batch-size 3 --out "$OUT/gatt" --data "$OUT/gatt/dialogues.jsonl" \
        "$TOWN/instructed.jsonl:0.1" "$TOWN/stopped.jsonl:2" "$TOWN/long-dialogues.jsonl:2" \
        "$OUT"/rlhf/v{1,2,3}/best.jsonl "$TOWN/replay.jsonl"
    examine obedience evaluate.answers "$OUT/instructed" "$OUT/gatt" --count 40 \
        --max-new-tokens 48 --obedience "$TOWN/obedience.jsonl"
    examine gatt evaluate.answers "$OUT/rlhf/v3" "$OUT/gatt" --prompts "$TOWN/held-out.jsonl"
}

# A control for V5: rejection sampling with as many samples as PPO. What does PPO bring?
control() {
    run train_rlhf.py --resume --init "$OUT/rlhf/v4" --rm "$OUT/rm/v5" \
        --prompts "$TOWN/prompts-v5-rejection.jsonl" --earlier "$OUT"/rlhf/v{1,2,3,4} \
        --out "$OUT/rlhf/v5-rejection"
}

# Ordinary conversations of eight turns, and what the reward models know.
conversations() {
    examine conversations evaluate.conversations "$OUT/sft" "$OUT/rlhf/v5" "$OUT/gatt" \
        --temperatures 0 --rm "$OUT/rm/v5/helpfulness" \
        --conversations "$TOWN/conversations.jsonl"
    examine knowledge evaluate.knowledge "$OUT/rm/v1/helpfulness" "$OUT/rm/v5/helpfulness" \
        --chat "$OUT/sft" --asked "$TOWN/compare-v5.jsonl" --never-asked "$TOWN/held-out.jsonl"
}

# Table 8 and Ghost Attention need nothing of V4 and V5 and take about as long, so they run at the
# same time. Each side gets half of the cores, because a model this small cannot use many cores well.
threads=$half
in_background table_8 ghost_attention
for v in 4 5; do a_round $v; done
control
wait_for_background

# The evaluations, in the same way on both halves of the cores.
in_background conversations
examine ppo evaluate.answers --samples "$OUT/rlhf/v5/samples.jsonl" \
    --prompts "$TOWN/prompts-val.jsonl"
examine scoreboard evaluate.scoreboard "$OUT/sft" "$OUT"/rlhf/v{1,2,3,4,5} \
    --controls "$OUT/rlhf/v5-rejection" --against "$OUT/sft" --rm "$OUT/rm/v5" \
    --prompts "$TOWN/held-out.jsonl"
wait_for_background
cat "$OUT/summary-beside.txt" >> "$summary"

printf '\n\nAll results:\n'
cat "$summary"
say -m evaluate.summary "$OUT"
