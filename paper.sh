#!/usr/bin/env bash
# The whole paper at laptop size, from top to bottom: Figure 4, a command an arrow.
#
#     make                                    the same, in a virtual environment
#     OUT=out/seed2 SEED=2 bash paper.sh      another town, other weights, other luck
#
# Run it again at any time: what is finished is not run again, what was interrupted goes on.
set -eo pipefail
OUT=${OUT:-out} SEED=${SEED:-1} TOWN=${OUT:-out}/tinytown
say() { printf '\n== %s s: %s\n' $SECONDS "$*"; env $threads ${PYTHON:-python3} "$@"; }
run() { say "$@" --seed "$SEED"; }
examine() { run -m "$@" | tee -a "$summary"; }
summary=$OUT/summary.txt threads=       # as many as there are cores
mkdir -p "$OUT" && rm -f "$OUT"/summary*.txt

# Tinytown: texts, dialogues, prompts of a world whose truth is known
run -m tinytown "$TOWN"

# §2: texts become tokens, tokens a base model. Facts are seen eight times as often as their size
say -m data.corpus --out "$OUT/pretrain/tokens" --data "$TOWN/encyclopedia.jsonl:8" \
    "$TOWN/stories.jsonl" "$TOWN/web.jsonl" "$TOWN/arithmetic.jsonl"
run train_pretrain.py --resume --data "$OUT/pretrain/tokens" --out "$OUT/pretrain"
examine evaluate.answers "$OUT/pretrain" --probes "$TOWN/probes.jsonl"

# §3.1: dialogues make it a chat model
run train_sft.py --resume --init "$OUT/pretrain" --data "$TOWN/dialogues.jsonl" --out "$OUT/sft"
examine evaluate.answers "$OUT/pretrain" "$OUT/sft" --prompts "$TOWN/held-out.jsonl" --show 1

# §3.2: five rounds. The two newest models answer, the annotator compares. Both reward models learn
# from that, and from a little of what they learned before. Then the chat model learns from them.
chat=$OUT/sft other=$OUT/pretrain blend=0.7     # before V1, the other is 70% of the way to chat
helpfulness=$OUT/sft safety=$OUT/sft rm_lr=5e-4
replay=() earlier=()
a_round() {
    v=$1
    run -m data.preferences --chat "$chat" --other "$other" --blend $blend \
        --prompts "$TOWN/compare-v$v.jsonl" --out "$OUT/preferences/v$v.jsonl"
    for kind in helpfulness safety; do
        run train_rm.py --resume --kind $kind --init "${!kind}" --lr $rm_lr --out "$OUT/rm/v$v" \
            --data "$OUT/preferences/v$v.jsonl" "${replay[@]}"
    done
    method=rejection-sampling
    if [ $v = 5 ]; then method=ppo; fi          # on top of what rejection sampling reached
    run train_rlhf.py --resume --method $method --init "$chat" --rm "$OUT/rm/v$v" \
        --prompts "$TOWN/prompts-v$v.jsonl" --val-prompts "$TOWN/prompts-val.jsonl" \
        --earlier "${earlier[@]}" --out "$OUT/rlhf/v$v"
    other=$chat chat=$OUT/rlhf/v$v blend=0
    helpfulness=$OUT/rm/v$v/helpfulness safety=$OUT/rm/v$v/safety rm_lr=3e-4
    replay+=("$OUT/preferences/v$v.jsonl:0.15") earlier+=("$OUT/rlhf/v$v")
}
for v in 1 2 3 4; do a_round $v; done

# Table 8: V1's reward models, on prompts that were not compared before
table_8() {
    run -m data.preferences --chat "$OUT/sft" --other "$OUT/pretrain" --blend 0.7 \
        --prompts "$TOWN/compare-test.jsonl" --out "$OUT/preferences/test.jsonl"
    examine evaluate.reward_models "$OUT/rm/v1/helpfulness" "$OUT/rm/v1/safety" \
        --data "$OUT/preferences/test.jsonl" --truths "$TOWN/compare-test.jsonl"
}

# §3.3: Ghost Attention, from V3 on. First V3 learns to follow an instruction of the same message,
# and that dialogues may be long; then to keep to an instruction of the first message. The best
# answers so far and texts of §2 keep it from forgetting
ghost_attention() {
    ordinary=("$OUT"/rlhf/v{1,2,3}/best.jsonl "$TOWN/replay.jsonl")
    run train_sft.py --resume --no-pack --init "$OUT/rlhf/v3" --seq-len 1024 --epochs 1 \
        --data "$TOWN/instructed.jsonl" "$TOWN/long-dialogues.jsonl:0.2" "${ordinary[@]}" \
        --out "$OUT/instructed"
    run -m data.ghost_attention --chat "$OUT/instructed" --data "$TOWN/long-dialogues.jsonl" \
        --instructions "$TOWN/instructions.jsonl" --out "$OUT/gatt/dialogues.jsonl"
    run train_sft.py --resume --no-pack --init "$OUT/instructed" --seq-len 1024 --epochs 1 \
        --data "$OUT/gatt/dialogues.jsonl" "$TOWN/instructed.jsonl:0.2" "${ordinary[@]}" \
        --batch-size 8 --out "$OUT/gatt"
    examine evaluate.answers "$OUT/instructed" "$OUT/gatt" --max-new-tokens 48 \
        --obedience "$TOWN/obedience.jsonl"
    examine evaluate.answers "$OUT/rlhf/v3" "$OUT/gatt" --prompts "$TOWN/held-out.jsonl"
}

# V5 needs neither, and takes as long: they run beside it, each side on half of the cores, for a model
# so small keeps one core busy, but hardly two
threads=OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + 1) / 2 ))}
printf '\n== %s s: beside what follows, Ghost Attention: see %s\n' $SECONDS "$OUT/beside.log"
set -m      # in a group of its own, which ends where this script ends: trained so far is saved
(summary=$OUT/summary-beside.txt; table_8; ghost_attention) > "$OUT/beside.log" 2>&1 &
set +m
beside=$!
trap 'kill -- -$beside 2> /dev/null || true' EXIT

a_round 5
wait $beside || { cat "$OUT/beside.log"; exit 1; }
threads=
examine evaluate.answers --samples "$OUT/rlhf/v5/samples.jsonl" --prompts "$TOWN/prompts-val.jsonl"
examine evaluate.scoreboard "$OUT/pretrain" "$OUT/sft" "$OUT"/rlhf/v{1,2,3,4,5} \
    --against "$OUT/sft" --rm "$OUT/rm/v5" --prompts "$TOWN/held-out.jsonl" \
    --json "$OUT/scoreboard.json"
cat "$OUT/summary-beside.txt" >> "$summary"

printf '\n\nWhat came of it, once more:\n'
cat "$summary"
