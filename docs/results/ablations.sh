#!/usr/bin/env bash
# Ablations of the auxiliary tasks and of the query's own position. All runs have the same steps and schedules.
# In the repository's folder:
#
#     docs/results/ablations.sh                            names the runs with seeds 2 and 3
#     docs/results/ablations.sh mystery_path_grid-both-2   does that run, or the rest of it
#
# One run per core, here on cores 0 and 1. An interrupted run continues, a finished one is skipped:
#
#     docs/results/ablations.sh | sed -n '1~2p' | OMP_NUM_THREADS=1 taskset -c 0 xargs -n 1 docs/results/ablations.sh
#     docs/results/ablations.sh | sed -n '2~2p' | OMP_NUM_THREADS=1 taskset -c 1 xargs -n 1 docs/results/ablations.sh
#
# UPDATES is the number of updates of a run, of 16,384 steps each. Matrix products are in bf16; set PRECISION=float32 where
# the processor has no instructions for it, and compare runs of one precision. Schedules stay as they are, so `prediction` is
# the beginning of the config's own run with that seed. What was found is in docs/notebook, on the pages of the two tasks.
# A figure of one task:
#
#     python evaluate.py checkpoints/mystery_path_grid-* --seeds=50 --repetitions=1 --metric=success --cpu \
#         --output=docs/results/mystery_path_grid_ablations --plot=docs/results/mystery_path_grid_ablations.png
set -euo pipefail

UPDATES=${UPDATES:-150}
PRECISION=${PRECISION:-bf16}

declare -A CHANGES=(
    [nothing]="prediction_coefficient=0 recall_coefficient=0"
    [recall]="prediction_coefficient=0 recall_coefficient=0.1"
    [prediction]="prediction_coefficient=0.1 recall_coefficient=0"
    [both]="prediction_coefficient=0.1 recall_coefficient=0.1"
    # With absolute positions, which do not say how long ago something was.
    [with_query]="prediction_coefficient=0.1 transformer.positional_encoding=absolute transformer.query_position=True"
    [without_query]="prediction_coefficient=0.1 transformer.positional_encoding=absolute transformer.query_position=False"
)

if [ $# -eq 0 ]; then
    for seed in 2 3; do
        for variant in nothing recall prediction both with_query without_query; do
            for task in mystery_path_grid mortar_mayhem_grid; do
                # On Mortar Mayhem Grid this is what `prediction` is.
                [ "$task-$variant" = mortar_mayhem_grid-with_query ] || echo "$task-$variant-$seed"
            done
        done
    done
    exit
fi

IFS=- read -r task variant seed <<< "$1"
if [ -f "models/$1.nn" ]; then
    echo "$1 is finished"
elif compgen -G "checkpoints/$1/checkpoint-*.pt" > /dev/null; then
    exec python train.py --resume="$1" --precision="$PRECISION" --cpu --processes=1
else
    interval=30  # as in the config's own run
    [ "$task" = mystery_path_grid ] || interval=25
    settings=(--set "updates=$UPDATES" --set checkpoint_interval=10 --set "model_interval=$interval")
    for change in ${CHANGES[$variant]}; do
        settings+=(--set "$change")
    done
    exec python train.py --config="configs/$task.yaml" --run-id="$1" --overwrite --seed="$seed" "${settings[@]}" \
        --precision="$PRECISION" --cpu --processes=1
fi
