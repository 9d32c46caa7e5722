# What scripts/quickstart, the benchmarks and scripts/soak share: a folder for one run, servers that
# start and stop with it, one timed build, and the figures of `primed status`. Sourced, never run.
#
# After sourcing:
#   $repo     the repository            $tools   where recc and buildbox are: what PRIMED_TOOLS
#                                                names, or what scripts/tools installs
#   $run      this run's own folder     $sockets a folder with a short name (a socket's path is
#   $primed   the primed to measure              limited to about 100 characters)
#   $peers    the load generator and fast server of benches/proxy, after build_peers
#   $crates   sources of C and C++ projects, after fetch_crate
# shellcheck shell=bash

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tools=${PRIMED_TOOLS:-$repo/target/tools}
crates=$repo/target/crates
primed=${PRIMED:-}
peers=${PEERS:-}
program=${0##*/}

say() { printf '%s: %s\n' "$program" "$*" >&2; }

# die WHAT [HINT...]: says what went wrong and, a line each, what to do.
die() {
    say "error: $1"
    shift
    if (($#)); then printf '  hint: %s\n' "$@" >&2; fi
    exit 1
}

# usage: the comment at the head of the script that sources this.
usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//p}' "$0"; }

# prepare: the tools, primed in release mode, and the folders of this run.
prepare() {
    local command
    for command in cc cargo; do
        command -v "$command" >/dev/null || die "$command is missing." \
            "On Debian: apt-get install build-essential; Rust comes from https://rustup.rs"
    done
    if [[ ! ${PRIMED_TOOLS:-} ]]; then "$repo/scripts/tools" recc; fi
    PATH=$PATH:$tools/bin # after the host's own: it only adds a make where there is none

    if [[ -z $primed ]]; then
        say "building primed in release mode (some minutes the first time)"
        cargo build --quiet --release --locked --manifest-path "$repo/Cargo.toml" --target-dir "$repo/target"
        primed=$repo/target/release/primed
    fi

    # A user's own settings would measure something else.
    local name
    for name in ${!RECC_@} ${!PRIMED_@}; do unset "$name"; done
    export PRIMED_CONFIG=none

    mkdir -p "$repo/target/$program"
    run=$(mktemp -d "$repo/target/$program/run.XXXXXX")
    sockets=${TMPDIR:-/tmp}
    if ((${#sockets} > 60)); then sockets=/tmp; fi
    sockets=$(mktemp -d "$sockets/primed.XXXXXX")
    servers=()
    trap finish EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# build_peers: the load generator and fast server, unless PEERS named them.
build_peers() {
    if [[ $peers ]]; then return; fi
    say "building the load generator"
    peers=$(built_bench proxy)
}

# built_bench NAME: builds a program of benches/ and says where it is.
built_bench() {
    local program
    program=$(cargo bench --quiet --locked --no-run --bench "$1" --manifest-path "$repo/Cargo.toml" \
        --target-dir "$repo/target" --message-format=json-render-diagnostics |
        sed -n '/"kind":\["bench"\]/s/.*"executable":"\([^"]*\)".*/\1/p')
    [[ -x $program ]] || die "cargo built no benches/$1."
    echo "$program"
}

# fetch_crate NAME VERSION: a crate that carries C or C++ sources, in $crates/NAME-VERSION.
fetch_crate() {
    if [[ -d $crates/$1-$2 ]]; then return; fi
    say "fetching sources: crate $1 $2"
    local scratch=$run/fetch.$1
    mkdir -p "$scratch/src" "$crates"
    : >"$scratch/src/lib.rs"
    cat >"$scratch/Cargo.toml" <<-END
	[package]
	name = "fetch"
	version = "0.0.0"
	edition = "2021"
	[dependencies]
	$1 = "=$2"
	[workspace]
	END
    (cd "$scratch" && cargo vendor --quiet --versioned-dirs vendor >/dev/null) ||
        die "the crate $1 $2 could not be fetched; cargo's own words are above."
    mv -T "$scratch/vendor/$1-$2" "$crates/$1-$2" || [[ -d $crates/$1-$2 ]] # another run was first
}

# measure_builds PROGRAM ARGUMENT...: has benches/gain/PROGRAM measure builds on a simulated cluster.
# What the cluster's workers have once executed is kept under target/, and so are the sources.
measure_builds() {
    local python worker=${WORKER:-} name
    if ! python=$(type -P python3) || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        if [[ $tools == "$repo/target/tools" ]]; then "$repo/scripts/tools" grpcio; fi
        python=$tools/grpcio/python-old
    fi
    for name in gcc g++; do
        command -v "$name" >/dev/null || die "$name is missing." "On Debian: apt-get install build-essential"
    done
    fetch_crate lua-src 551.1.0
    fetch_crate mbedtls-sys-auto 2.28.15
    fetch_crate physx-sys 0.11.5
    if [[ ! $worker ]]; then
        say "building the simulated cluster's worker"
        worker=$(built_bench cluster)
    fi
    "$python" -B "$repo/benches/gain/$1" --tools "$tools" --primed "$primed" --worker "$worker" --crates "$crates" \
        --run "$run" --sockets "$sockets" --memo "$repo/target/cluster" "${@:2}"
}

# finish: stops the servers, newest first; keeps the logs only of a run that failed by itself.
finish() {
    local code=$? i
    trap - EXIT INT TERM
    for ((i = ${#servers[@]} - 1; i >= 0; i--)); do stop "${servers[i]}"; done
    rm -rf "$sockets"
    if ((code == 0 || code > 128)); then
        rm -rf "$run"
    else
        say "failed; logs and trees are in $run"
    fi
    exit "$code"
}

# stop PID: asks it to end; kills it after 10 s.
stop() {
    local deadline=$((SECONDS + 10))
    kill "$1" 2>/dev/null || return 0
    while kill -0 "$1" 2>/dev/null; do
        if ((SECONDS >= deadline)); then kill -KILL "$1" 2>/dev/null || true; fi
        sleep 0.05
    done
}

# serve NAME COMMAND...: starts a server whose log is $run/NAME.log.
serve() {
    "${@:2}" >"$run/$1.log" 2>&1 &
    servers+=("$!")
    disown # no word from the shell when it is stopped
}

# until_ready NAME COMMAND...: waits until COMMAND succeeds, while the newest server lives.
until_ready() {
    local name=$1 deadline=$((SECONDS + 30))
    shift
    until "$@" >/dev/null 2>&1; do
        if ! kill -0 "${servers[-1]}" 2>/dev/null || ((SECONDS >= deadline)); then
            tail -n 20 "$run/$name.log" >&2
            die "$name did not start; the end of its log is above."
        fi
        sleep 0.02
    done
}

# start_casd NAME JOBS: an empty buildbox-casd that executes on this machine, at $sockets/NAME.
# Files are staged by copying: FUSE and user namespaces are not everywhere.
start_casd() {
    serve "$1" env BUILDBOX_STAGER=copy-or-link "$tools/bin/buildbox-casd" \
        --buildbox-run="$tools/bin/buildbox-run-hosttools" --jobs="$2" --bind "unix:$sockets/$1" "$run/$1.cache"
    until_ready "$1" casd_answers "$1"
}

casd_answers() {
    [[ -S $sockets/$1 ]] && "$tools/bin/casupload" --retry-limit=0 --remote="unix:$sockets/$1" "$repo/LICENSE"
}

# start_primed NAME UPSTREAM [OPTION...]: primed with nothing recorded, at $sockets/NAME.
start_primed() { start_serve "$1" --upstream "unix:$sockets/$2" "${@:3}"; }

# start_embedded NAME JOBS [OPTION...]: the same, which executes by itself, with nothing cached.
start_embedded() { start_serve "$1" --cache-dir "$run/$1.cache" --jobs "$2" "${@:3}"; }

start_serve() {
    local name=$1
    shift
    serve "$name" "$primed" serve --listen "unix:$sockets/$name" --admin "unix:$sockets/$name.admin" \
        --state-dir "$run/$name.state" "$@"
    until_ready "$name" "$primed" status --admin "unix:$sockets/$name.admin"
}

# settle NAME: waits until what the primed NAME records, generates and primes is done, so that
# nothing of one build runs on into the measurement of the next.
settle() {
    "$primed" wait --timeout 120 --admin "unix:$sockets/$1.admin" ||
        die "primed is still busy after 120 s." "What it does: $primed status --admin unix:$sockets/$1.admin"
}

# newest_build NAME FIELD...: the numbers of the newest build that the primed NAME saw, one line.
# Cut out by hand, for there may be no jq: quotes inside a JSON string are escaped, so the first
# `"FIELD":` after `"builds":` is the field itself.
newest_build() {
    local json field rest numbers=()
    json=$("$primed" status --json --admin "unix:$sockets/$1.admin")
    for field in "${@:2}"; do
        rest=${json#*\"builds\":}
        rest=${rest#*\""$field"\":}
        rest=${rest#"${rest%%[![:space:]]*}"}
        rest=${rest%%[!0-9]*}
        [[ $rest ]] || die "primed saw no build: 'status --json' has no builds[0].$field." "It said: $json"
        numbers+=("$rest")
    done
    echo "${numbers[*]}"
}

# timed_make LOG SERVER DIR JOBS: runs make in DIR with recc at $sockets/SERVER; sets wall_ms.
timed_make() {
    timed "$1" env RECC_SERVER="unix:$sockets/$2" RECC_LINK=1 make -C "$3" -j"$4" RECC="$tools/bin/recc"
}

# timed LOG COMMAND...: runs a build, whose output goes to $run/LOG.log; sets wall_ms.
timed() {
    local log=$run/$1.log began=${EPOCHREALTIME/[.,]/}
    "${@:2}" >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        die "the build failed; the end of its log is above."
    }
    # shellcheck disable=SC2034 # for the caller
    wall_ms=$(((${EPOCHREALTIME/[.,]/} - began) / 1000))
}

# thousandths N: N as a decimal number with two places.
thousandths() { printf '%d.%02d' $(($1 / 1000)) $(($1 % 1000 / 10)); }
