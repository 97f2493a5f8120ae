#!/usr/bin/env bash
# Real `mpirun` jobs of the stages on one machine. Proves that four processes, four threads and one process without mpirun make
# the same files to the byte, however the work is laid out; that a job whose rank is killed ends by itself and leaves nothing
# running; and that the same command continues it.
#
#   tests/cluster/mpi.sh [FOLDER]     of binaries built with --features mpi; target/release by default
set -euo pipefail
. "$(dirname "$0")/common.sh"
finish() {
    # Only after a failure is there anything.
    left | xargs -r kill -9 2>/dev/null || true
    rm -rf "$out"
}
trap finish EXIT

alone() { # program, folder, settings: one rank, without a launcher
    local program="$1" folder="$2"
    shift 2
    timeout --foreground -k 5 "$job_s" "$bin/$program" "${settings[@]}" --output-dir "$folder" "$@" >"$folder.log" 2>&1 ||
        fail "$program ended with status $?: $(cat "$folder.log")"
}

# Replaces the shell that calls it, so that the shell's process is that of `timeout`, which passes signals on to mpirun.
mpi() { # program, folder, settings: four ranks
    local program="$1" folder="$2"
    shift 2
    exec timeout --foreground -k 5 "$job_s" mpirun --oversubscribe -n 4 "${mpi_options[@]}" \
        "$bin/$program" "${settings[@]}" --output-dir "$folder" "$@" >"$folder.log" 2>&1
}
mpi_options=(--bind-to none)

succeeds() { # as mpi
    (mpi "$@") || fail "mpirun ended with status $?: $(cat "$2.log")"
    nothing_left
}

layout=(
    --set actor.zero_stage=3 --set critic.zero_stage=2 --set reference.zero_stage=3 --set reward_model.zero_stage=1
    --set ppo.inference_tp_size=2
)

step 'rlhf: one rank without mpirun'
alone rlhf "$out/one"

step 'rlhf: four ranks by mpirun, weights in slices, generation on pairs of ranks'
succeeds rlhf "$out/four" "${layout[@]}"
step 'rlhf: four ranks as threads, the same layout'
alone rlhf "$out/threads" "${layout[@]}" --ranks 4
for stage in sft reward ppo; do
    same "$out/one/$stage" "$out/four/$stage"
    same "$out/one/$stage" "$out/threads/$stage"
done

step 'sft: tensor parallelism'
succeeds sft "$out/tensor" --set parallel.tensor=2 --set actor.zero_stage=2
same "$out/one/sft" "$out/tensor"

step 'sft: pipeline parallelism'
succeeds sft "$out/pipeline" --set parallel.pipeline=2
same "$out/one/sft" "$out/pipeline"

step 'sft: a rank is killed'
started=$SECONDS
(mpi sft "$out/killed") &
job=$!
wait_for_rows "$out/killed" 6 "$job"
kill -KILL "$(pid_of_rank 2)"
status_of "$job"
[ "$status" -ne 0 ] && [ "$status" -ne 124 ] || fail "the job of a killed rank ended with status $status"
! is_finished "$out/killed" || fail 'a job without one of its ranks says that it has finished'
nothing_left
printf 'status %s after %s s\n' "$status" $((SECONDS - started))
succeeds sft "$out/killed"
grep -q 'continuing after step' "$out/killed.log" || fail 'the run was not continued'
same "$out/one/sft" "$out/killed"

step 'sft: the job is asked to stop'
long=(--set sft.max_steps=200 --set sft.eval_every=100 --set sft.checkpoint_every=1000)
alone sft "$out/uninterrupted" "${long[@]}"
(mpi sft "$out/stopped" "${long[@]}") &
job=$!
wait_for_rows "$out/stopped" 20 "$job"
# What mpirun passes on to the ranks; they need not notice at the same step.
kill -USR1 "$(pgrep -P "$job" -x mpirun)"
status_of "$job"
[ "$status" -ne 124 ] && [ "$status" -ne 137 ] || fail "the job had to be ended: $(cat "$out/stopped.log")"
nothing_left
! is_finished "$out/stopped" || fail 'the job has finished before it could be stopped'
ls "$out/stopped/checkpoints"/step-* >/dev/null || fail "no checkpoint was left by a job that was asked to stop: $(cat "$out/stopped.log")"
printf 'status %s, stopped after %s\n' "$status" "$(basename "$(ls -d "$out/stopped/checkpoints"/step-* | tail -1)")"
succeeds sft "$out/stopped" "${long[@]}"
grep -q 'continuing after step' "$out/stopped.log" || fail 'the run was not continued'
same "$out/uninterrupted" "$out/stopped"

step 'all is well'
