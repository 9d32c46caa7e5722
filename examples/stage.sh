# What the examples' scripts share: a folder to work in, servers that end with the script, and the
# table of builds at the end. Sourced, never run.
#
# After sourcing, $work is an empty folder with a short name, and the current one; $tools is where
# scripts/tools puts what it installs.
# shellcheck shell=bash

example=$(cd "$(dirname "$0")" && pwd)
tools=${PRIMED_TOOLS:-$example/../../target/tools}
work=$(mktemp -d /tmp/primed-example.XXXXXX)
servers=()
rows=()

# die WHAT [HINT]: says what went wrong and what to do.
die() {
    printf '%s: %s\n' "${example##*/}" "$1" >&2
    if [[ ${2:-} ]]; then printf '  hint: %s\n' "$2" >&2; fi
    exit 1
}

# finish: stops the servers, newest first, and leaves nothing behind; shows the logs if it failed.
finish() {
    local code=$? i deadline=$((SECONDS + 5))
    trap - EXIT
    for ((i = ${#servers[@]} - 1; i >= 0; i--)); do kill "${servers[i]}" 2>/dev/null || true; done
    # Some would take their time, though nothing of theirs is kept.
    while ((SECONDS < deadline)) && kill -0 "${servers[@]}" 2>/dev/null; do sleep 0.05; done
    for i in ${servers[@]+"${servers[@]}"}; do kill -KILL "$i" 2>/dev/null || true; done
    wait 2>/dev/null || true
    if ((code)); then tail -n 15 "$work"/*.log >&2 || true; fi
    rm -rf "$work"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# needs PROGRAM...: all of them must be in PATH.
needs() {
    local program
    for program; do
        command -v "$program" >/dev/null || die "$program is not in PATH." "see $example/README.md for what is needed"
    done
}

# serve NAME COMMAND...: starts a server whose log is NAME.log.
serve() {
    "${@:2}" >"$work/$1.log" 2>&1 &
    servers+=("$!")
}

# until_ready NAME COMMAND...: waits until COMMAND succeeds, while the newest server lives.
until_ready() {
    local deadline=$((SECONDS + 60))
    until "${@:2}" >/dev/null 2>&1; do
        kill -0 "${servers[-1]}" 2>/dev/null || die "$1 ended at once; its log is below."
        ((SECONDS < deadline)) || die "$1 does not answer after 60 s; its log is below."
        sleep 0.05
    done
}

# start_casd NAME [OPTION...]: a buildbox-casd at $work/NAME.sock. Files are staged by copying, since
# FUSE is not available everywhere.
start_casd() {
    BUILDBOX_STAGER=${BUILDBOX_STAGER:-copy-or-link} serve "$1" buildbox-casd "${@:2}" \
        --bind "unix:$work/$1.sock" "$work/$1.cache"
    until_ready "$1" test -S "$work/$1.sock"
}

# start_primed UPSTREAM [OPTION...]: primed at $work/primed.sock, with nothing recorded. Without
# these variables it uses XDG_RUNTIME_DIR and XDG_STATE_HOME.
start_primed() {
    export PRIMED_ADMIN=unix:$work/admin.sock PRIMED_STATE_DIR=$work/state
    serve primed primed serve --upstream "$1" --listen "unix:$work/primed.sock" "${@:2}"
    until_ready primed primed status
}

# builds: the lines of `primed status` that tell of builds, newest first.
builds() { primed status | awk 'seen; / asked /{ seen = 1 }'; }

# timed TITLE COMMAND...: runs a build, waits until primed is quiet, and keeps a row of the table:
# what the builds that it has seen meanwhile were answered.
timed() {
    local title=$1 before began=${EPOCHREALTIME/[.,]/} took
    shift
    before=$(builds | wc -l)
    "$@"
    took=$(((${EPOCHREALTIME/[.,]/} - began) / 10000))
    primed wait --timeout 120
    rows+=("$(builds | head -n -"$before" | awk -v title="$title" -v took="$took" '
        { for (n = 1; n <= 5; n++) sum[n] += $n }
        END {
            printf "%-28s %8.2f", title, took / 100
            for (n = 1; n <= 5; n++) printf " %7d", sum[n]
        }')")
}

# table: what became of the builds.
table() {
    printf '\n%-28s %8s %7s %7s %7s %7s %7s\n' build seconds asked cached hit joined missed
    printf '%s\n' "${rows[@]}"
}

# Settings of the user's own would show something else.
for name in ${!RECC_@} ${!PRIMED_@}; do unset "$name"; done
unset name MAKEFLAGS MAKELEVEL
cd "$work" || exit
