#!/usr/bin/env bash
# The procedure of the performance notes, step by step:
#
#   bench/quick.sh [SECONDS]        the forwarder alone, iperf3 -P 1 and -P 8, 30 s each
#   bench/quick.sh --peers ...      the forwarder beside its peers: python -m bench --peers ...
#
# FORWARDER is the command that starts it, e.g. .venv/bin/forwarder; PYTHON the interpreter for
# --peers. Paths are relative to the project root. Needs iperf3 and ss.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == --* ]]; then
    exec "${PYTHON:-python3}" -m bench "$@"
fi

duration=${1:-30}
read -ra forwarder <<<"${FORWARDER:-forwarder}"
temp=$(mktemp -d)
started=

fail() {
    echo "quick.sh: $*" >&2
    exit 1
}

has_ended() { # PID TRIES: whether it is gone, looking again every 0.1 s
    for ((try = 0; try < $2; try++)); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    return 1
}

cleanup() {
    local status=$? pid
    trap - EXIT INT TERM
    # Only children of this shell that still run, so no pid can have passed to someone else;
    # the newest first: client, forwarder, server.
    for pid in $(jobs -rp | sort -rn); do
        kill "$pid" 2>/dev/null || continue
        if ! has_ended "$pid" 100; then
            echo "quick.sh: process $pid does not end on SIGTERM, killed" >&2
            kill -KILL "-$pid" "$pid" 2>/dev/null || true # start made it the leader of a group
            status=1
        fi
    done
    if [[ -n $started ]] && [[ -n $(listeners) ]]; then
        echo "quick.sh: somebody still listens:" >&2
        listeners >&2
        status=1
    fi
    rm -rf "$temp"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

listeners() { # [PORT]: who listens on it, or on one of ours
    if (($# > 0)); then
        ss -Hltnp "sport = :$1"
    else
        ss -Hltnp 'sport = :9000 or sport = :9001'
    fi
}

start() { # LOG COMMAND...: run it in the background, out of reach of Ctrl-C; its pid is $!
    started=yes
    setsid "${@:2}" >"$temp/$1.log" 2>&1 &
}

wait_listening() { # PORT NAME: until the server started last listens
    local pid=$!
    for ((try = 0; try < 100; try++)); do
        [[ -z $(listeners "$1") ]] || return 0
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    cat "$temp"/*.log >&2
    fail "$2 does not listen on port $1"
}

# A stale listener with SO_REUSEPORT would share the port and silently take part of the traffic.
[[ -z $(listeners) ]] || fail "port 9000 or 9001 is taken:
$(listeners)"

echo "127.0.0.1 9000 127.0.0.1 9001" >"$temp/profiling.conf"

start iperf3 iperf3 -s -p 9001
wait_listening 9001 iperf3
start forwarder "${forwarder[@]}" -c "$temp/profiling.conf"
wait_listening 9000 "${forwarder[0]}"

echo "== ss -ltn: one line per listening socket"
ss -ltn 'sport = :9000 or sport = :9001'

# The client runs in the background: bash handles Ctrl-C during wait, not during a command.
echo "== iperf3 -c 127.0.0.1 -p 9000 -t $duration -P 1"
iperf3 -c 127.0.0.1 -p 9000 -t "$duration" -P 1 &
wait "$!"

echo "== iperf3 -c 127.0.0.1 -p 9000 -t $duration -P 8"
iperf3 -c 127.0.0.1 -p 9000 -t "$duration" -P 8 >"$temp/parallel.out" 2>&1 &
client=$!

# 9 sessions: 8 streams and iperf3's control connection, each with a client side on port 9000.
while kill -0 "$client" 2>/dev/null; do
    (($(ss -Htn state established 'dport = :9000' | wc -l) < 9)) || break
    sleep 0.1
done
echo "== ss -tnp | egrep '(:9000|:9001)', while it runs"
ss -tnp | grep -E '(:9000|:9001)' || true
wait "$client" || fail "iperf3 -P 8: $(cat "$temp/parallel.out")"
echo "== its result"
cat "$temp/parallel.out"
