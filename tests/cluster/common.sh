# What the tests of ranks as processes share; to be sourced. They judge jobs from outside: by the files they leave, by their
# words, and by what is still running. `$bin` is a folder of stage binaries built with `--features mpi`, `$out` a new folder.

step() { printf '\n== %s\n' "$*"; }
fail() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root"
bin="$(cd "${1:-${CARGO_TARGET_DIR:-target}/release}" && pwd)"
for program in sft rlhf; do
    [ -x "$bin/$program" ] || fail "there is no $bin/$program; build it: cargo build --release -p tandem-stages --features mpi"
done
command -v mpirun >/dev/null || fail 'there is no mpirun; install Open MPI'
# Containers run tests as root, which Open MPI does not like.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
out="$(mktemp -d)"

# Longest time for a job that is to end by itself, and for what is left of a job to go, in seconds on a busy machine.
job_s=300
gone_s=30

# The quickstart with few steps and a small model. Sums are taken in the order of four data lanes and two tensor lanes by any
# number of ranks; a thread for each rank, as ranks share the cores.
sft_steps=16
settings=(
    --config configs/quickstart.toml
    --set run.threads=1 --set parallel.data_lanes=4 --set parallel.tensor_lanes=2
    --set tokenizer.train.vocab_size=600 --set model.new.hidden=64 --set model.new.layers=4 --set model.new.mlp_width=128
    --set sft.max_steps="$sft_steps" --set sft.eval_every=8 --set sft.checkpoint_every=4
    --set reward.max_steps=4 --set reward.eval_every=2 --set reward.checkpoint_every=2
    --set ppo.iterations=2 --set ppo.prompts_per_iteration=16 --set ppo.epochs=1 --set ppo.mini_batches=2
    --set ppo.checkpoint_every=1
    --set eval.max_rows=64 --set eval.prompts=8 --set generation.max_new_tokens=16
)

# Whether the run in folder $1 says that it is finished. What mpirun returns does not say it: some return 0 for lost jobs.
is_finished() { [ -f "$1/run.json" ] && grep -q '"finished": true' "$1/run.json"; }

rows_of() { if [ -f "$1/metrics.jsonl" ]; then wc -l <"$1/metrics.jsonl"; else echo 0; fi; }

# The metrics of a run without what depends on the clock and on who did what.
metrics_of() { sed -E 's#,"(t_s|tokens_per_s|time/[a-z_]+|[a-z_/]*bytes)":[^,}]*##g' "$1/metrics.jsonl"; }

# The runs in folders $1 and $2 have finished with the same export and the same metrics, byte for byte. The export's manifest alone
# says how long it took.
same() {
    local one="$1" other="$2"
    for run in "$one" "$other"; do
        is_finished "$run" || fail "$run has not finished"
    done
    [ -s "$one/export/model.safetensors" ] || fail "$one has exported nothing"
    diff -r --exclude=manifest.json "$one/export" "$other/export" >&2 || fail "$one and $other have exported different files"
    diff <(metrics_of "$one") <(metrics_of "$other") >&2 || fail "$one and $other have measured different numbers"
    [ "$(metrics_of "$one" | grep -c '"loss":')" -gt 0 ] || fail "$one has no losses"
}

# Processes of this test's jobs: those with `$out` in their command lines, this shell and its children excepted.
left() {
    local line pid
    for line in /proc/[0-9]*/cmdline; do
        pid="${line#/proc/}" pid="${pid%/cmdline}"
        # Processes come and go meanwhile.
        if tr '\0' ' ' 2>/dev/null <"$line" | grep -qF -- "--output-dir $out/"; then echo "$pid"; fi
    done
}

# The process of rank $1.
pid_of_rank() {
    local pid
    for pid in $(left); do
        if tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qx "OMPI_COMM_WORLD_RANK=$1"; then
            echo "$pid"
            return
        fi
    done
    fail "there is no process of rank $1"
}

# Nothing of a job may outlast it.
nothing_left() {
    local until=$((SECONDS + gone_s))
    while [ -n "$(left)" ]; do
        [ "$SECONDS" -lt "$until" ] || fail "still running $gone_s s after the job: $(left | xargs ps -o pid,args -p)"
        sleep 0.2
    done
}

# Waits until the run in folder $1 has at least $2 rows of metrics; $3 is the process of its job.
wait_for_rows() {
    local until=$((SECONDS + job_s))
    while [ "$(rows_of "$1")" -lt "$2" ]; do
        kill -0 "$3" 2>/dev/null || fail "the job ended before step $2"
        [ "$SECONDS" -lt "$until" ] || fail "no step $2 after $job_s s"
        sleep 0.05
    done
    ! is_finished "$1" || fail 'the job has finished before it could be disturbed'
}

# The exit status of background job $1, into `status`.
status_of() { status=0; wait "$1" || status=$?; }
