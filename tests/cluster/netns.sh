#!/usr/bin/env bash
# Three hosts on one machine: network namespaces, each with its own name and address, joined by a bridge in a fourth one, so
# that nothing touches the real network. Proves that ranks on several hosts make the same files as one rank, to the byte, and
# that what they say to each other crosses the network; that when the link of a host is cut, every rank leaves within the deadline
# saying who is missing and nothing is left running; and that the same command continues once the link is back.
#
#   tests/cluster/netns.sh [FOLDER]     of binaries built with --features mpi; target/release by default
set -euo pipefail
if [ "$(id -u)" -ne 0 ]; then
    echo 'netns.sh: SKIPPED: only root can make network namespaces'
    exit 0
fi
if ! ip netns list >/dev/null 2>&1 || ! unshare --net --uts true 2>/dev/null; then
    echo 'netns.sh: SKIPPED: this system has no network namespaces (ip netns, unshare)'
    exit 0
fi
. "$(dirname "$0")/common.sh"

hosts=3
prefix="tandem$$"
address() { echo "10.77.0.$1"; }
on() { # host, command
    local host="$1"
    shift
    ip netns exec "$prefix-$host" "$@"
}

lay_down() {
    ip netns add "$prefix-switch"
    on switch ip link add bridge type bridge
    on switch ip link set bridge up
    local host
    for host in $(seq "$hosts"); do
        ip netns add "$prefix-$host"
        ip link add name eth0 netns "$prefix-$host" type veth peer name "port$host" netns "$prefix-switch"
        on "$host" ip addr add "$(address "$host")/24" dev eth0
        on "$host" ip link set lo up
        on "$host" ip link set eth0 up
        # What mpirun has sent to a silent host, TCP repeats for a quarter of an hour before it gives up, and keepalives do not
        # count meanwhile; five repeats are about 13 s.
        on "$host" sysctl -qw net.ipv4.tcp_retries2=5
        on switch ip link set "port$host" master bridge up
    done
}

take_up() {
    local host
    for host in $(seq "$hosts") switch; do
        ip netns pids "$prefix-$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns delete "$prefix-$host" 2>/dev/null || true
    done
    rm -rf "$out"
}
trap take_up EXIT
trap 'exit 143' INT TERM
lay_down

# What mpirun takes for ssh. Open MPI tells hosts apart by their names, and lets ranks of one host talk through its memory.
cat >"$out/agent" <<AGENT
#!/usr/bin/env bash
while [[ "\$1" == -* ]]; do shift; done
host="\${1##*.}"
shift
exec ip netns exec "$prefix-\$host" unshare --uts bash -c "hostname host\$host; \$*"
AGENT
chmod +x "$out/agent"

# A silent host is noticed by Open MPI itself after 8 minutes unless told otherwise: here after 12 + 3 * 2 s, which is later than
# the ranks' own deadline, so that they can say what they miss.
deadline_s=8
silence_s=18
options=(
    --mca oob_tcp_keepalive_time 12 --mca oob_tcp_keepalive_intvl 2 --mca oob_tcp_keepalive_probes 3
    --mca oob_tcp_if_include eth0 --mca btl_tcp_if_include eth0 --mca btl self,vader,tcp --bind-to none
)
# Four ranks: 0 and 1 on the first host, 2 on the second, 3 on the third.
over_hosts() { # folder, settings
    local folder="$1"
    shift
    on 1 unshare --uts bash -c 'hostname host1; exec "$@"' mpirun \
        timeout --foreground -k 5 "$job_s" mpirun --host "$(address 1):2,$(address 2),$(address 3)" -n 4 \
        --mca plm_rsh_agent "$out/agent" "${options[@]}" \
        "$bin/sft" "${settings[@]}" --set actor.zero_stage=3 --output-dir "$folder" "$@" >"$folder.log" 2>&1
}

sent_bytes() { on "$1" ip -s -j link show eth0 | grep -oE '"tx":\{"bytes":[0-9]+' | grep -oE '[0-9]+$'; }
running() { local host; for host in $(seq "$hosts"); do ip netns pids "$prefix-$host"; done; }

step 'one rank'
"$bin/sft" "${settings[@]}" --output-dir "$out/one" >"$out/one.log" 2>&1 || fail "$(cat "$out/one.log")"

step 'four ranks on three hosts'
before="$(sent_bytes 2)"
over_hosts "$out/hosts" || fail "mpirun ended with status $?: $(cat "$out/hosts.log")"
same "$out/one" "$out/hosts"
crossed=$(($(sent_bytes 2) - before))
# Each step, rank 2 sends at least its part of the gradients of the slices of others: three quarters of the model in f32.
model="$(stat -c %s "$out/one/export/model.safetensors")"
least=$((sft_steps * model / 2))
[ "$crossed" -ge "$least" ] || fail "host 2 has sent $crossed bytes, less than the $least that must cross the network"
printf 'host 2 has sent %s bytes; the model has %s\n' "$crossed" "$model"
[ -z "$(running)" ] || fail "still running: $(running | xargs ps -o pid,args -p)"

step 'the link of the third host is cut'
over_hosts "$out/cut" --set parallel.timeout_s="$deadline_s" &
job=$!
wait_for_rows "$out/cut" 6 "$job"
on 3 ip link set eth0 down
cut=$SECONDS
status_of "$job"
took=$((SECONDS - cut))
printf 'mpirun ended with status %s after %s s\n' "$status" "$took"
[ "$status" -ne 124 ] && [ "$status" -ne 137 ] || fail "mpirun had to be ended: $(cat "$out/cut.log")"
! is_finished "$out/cut" || fail 'a job that has lost a host says that it has finished'
grep -Eq "error: .*rank [0-2]: .* did not complete within $deadline_s s; not arrived: \[.*3.*\]" "$out/cut.log" ||
    fail "no rank says that rank 3 has not arrived within the deadline: $(cat "$out/cut.log")"
grep -E '^error:' "$out/cut.log"
# The cut host's ranks and daemon have to notice by themselves.
until=$((cut + deadline_s + silence_s + gone_s))
while [ -n "$(running)" ]; do
    [ "$SECONDS" -lt "$until" ] || fail "left running on a host: $(running | xargs ps -o pid,args -p)"
    sleep 0.2
done
printf 'nothing was left running %s s after the cut\n' $((SECONDS - cut))

step 'the link is back'
on 3 ip link set eth0 up
over_hosts "$out/cut" || fail "mpirun ended with status $?: $(cat "$out/cut.log")"
grep -q 'continuing after step' "$out/cut.log" || fail 'the run was not continued'
same "$out/one" "$out/cut"

step 'all is well'
