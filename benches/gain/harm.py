"""Measures what primed costs a build when all that it foresees is wrong. Started by
scripts/bench-harm, whose head says what is printed.

Each build of the tree puts its number into the environment of every action, as builds do that stamp
what they make, so no action of an earlier build is ever asked for again. Each round changes the
header that most units include, and the template of a generated one, which is made before anything
else. At the first lookup primed sees both, and executes every action of the last build with them,
while the client still waits for the generated header.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import time
from datetime import datetime

import report
from build import build
from gain import FIGURES, TIMES, UNMEASURED_JOBS
from servers import Casd, Places, Primed
from tree import GENERATED, PROJECTS, TEMPLATE, Tree, mark_in_code


@dataclasses.dataclass(frozen=True)
class Case:
    """Where a poisoned build runs, and how much longer it may take."""

    name: str
    title: str
    project: str
    jobs: int
    slots: int
    simulated: bool
    options: tuple
    floor: float | None
    rounds: int


def say(text):
    print(f"bench-harm: {text}", file=sys.stderr, flush=True)


CASES = [
    Case("cluster", "a cluster of 64 slots, -j8", "mbedtls", 8, 64, True, ("--max-speculative", "64"), 1.05, 5),
    Case("full-cluster", "a cluster of 16 slots, -j16", "mbedtls", 16, 16, True, ("--max-speculative", "16"), None, 5),
    Case("local", "casd --jobs=2 on 2 cores, -j4", "lua", 4, 2, False, (), 1.15, 5),
]
# The time from when recc begins to execute an action until the worker has it.
EXECUTING = re.compile(r"^(\S+)\+0000 .*Executing action remotely\.\.\. \[actionDigest=([0-9a-f]+)/", re.MULTILINE)


def marks(tree, round):
    text = f"poisoned {round}"
    return {tree.core: mark_in_code(tree.core, text), TEMPLATE: mark_in_code(GENERATED + "_round", text)}


def numbered(number):
    """The environment of a build that tells each action its number."""
    return {"RECC_REMOTE_ENV_BUILD_NUMBER": str(number)}


def warm_up(places, case, rounds):
    """Executes for real, once, what will be asked for and what will be foreseen in its place."""
    project = PROJECTS[case.project]
    compiler = subprocess.run([project.compiler, "--version"], capture_output=True).stdout
    edition = hashlib.sha256(repr(project).encode() + compiler).hexdigest()[:16]
    stamp = places.memo / "states" / f"{project.name}.{edition}.poisoned"
    stamp.parent.mkdir(exist_ok=True)
    known = int(stamp.read_text()) if stamp.exists() else -1
    if known >= rounds:
        return
    say(f"{project.title}: executing the states of {rounds + 1} rounds for real, once (no other run will)")
    tree = Tree(project, places.crates, places.run / f"{case.name}.warm")
    with Casd(places, f"{case.name}.warm", 4, (0, 0)) as casd:
        for round in range(rounds + 1):
            for number in (round - 1, round) if round else (0,):
                tree.set_marks(marks(tree, round))
                tree.clean()  # make does not see that the number is another
                build(tree, casd.address(), places, 4, f"{case.name}.warm", **numbered(number))
    stamp.write_text(str(rounds))


def worker_start(result):
    """When a worker took the action with this encoded ActionResult, in seconds since 1970."""
    timestamp = field(field(result, 9), 3)
    return field(timestamp, 1) + (field(timestamp, 2) or 0) / 1e9


def field(message, wanted):
    """The first value of a field of an encoded protobuf message."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            value = varint()
        elif key & 7 == 2:
            length = varint()
            value = message[at : at + length]
            at += length
        else:
            raise ValueError(f"an ActionResult has no field of wire type {key & 7}")
        if key >> 3 == wanted:
            return value
    return None


def queueing(log, casd):
    """How long each action that the client executed waited for a worker, in milliseconds."""
    waited = []
    for said, action in EXECUTING.findall(log.read_text(errors="replace")):
        began = datetime.fromisoformat(f"{said}+00:00").timestamp()
        waited.append(max(0.0, 1000 * (worker_start(casd.result(action)) - began)))
    return waited


def percentile(values, percent):
    ranked = sorted(values)
    return ranked[max(0, -(-len(ranked) * percent // 100) - 1)] if ranked else None


def measure(places, case, rounds):
    """All rounds of one case, with and without primed by turns."""
    project = PROJECTS[case.project]
    times = [round(1000 * TIMES[action]) for action in ("compile", "link")] if case.simulated else None
    with (
        Casd(places, f"{case.name}.without", case.slots, times) as without,
        Casd(places, f"{case.name}.casd", case.slots, times) as casd,
        Primed(places, f"{case.name}.with", casd, case.options) as primed,
    ):
        servers = {"without": without, "with": primed}
        executing = {"without": without, "with": casd}
        trees = {side: Tree(project, places.crates, places.run / case.name / side / "tree") for side in servers}
        jobs = UNMEASURED_JOBS if case.simulated else case.jobs
        for side, tree in trees.items():
            tree.set_marks(marks(tree, 0))
            build(tree, servers[side].address(), places, jobs, f"{case.name}.{side}", **numbered(0))
        primed.newest_build()
        found = []
        for number in range(1, rounds + 1):
            taken, waited = {}, {}
            for side in ("without", "with") if number % 2 else ("with", "without"):
                tree = trees[side]
                tree.set_marks(marks(tree, number))
                log = f"{case.name}.{side}"
                more = numbered(number) | {"RECC_LOG_LEVEL": "info"}
                taken[side] = build(tree, servers[side].address(), places, case.jobs, log, **more)
                if side == "with":
                    figures = primed.newest_build()
                waited[side] = queueing(places.run / f"{log}.log", executing[side])
            if trees["with"].output() != trees["without"].output():
                raise SystemExit(f"{case.name}: what was built with primed is not what is built without")
            found.append(
                {f"{side}_s": taken[side] for side in taken}
                | {f"{side}_waited_ms": waited[side] for side in waited}
                | {name: figures[name] for name in FIGURES}
            )
            last = found[-1]
            say(
                f"  {number} {case.name}: {last['without_s']:.2f} s without, {last['with_s']:.2f} s with;"
                f" {last['used']} of {last['primed']} used, {last['missed']} missed"
            )
        late = without.late_results() + casd.late_results()
    return dataclasses.asdict(case) | {"rounds": found, "late": late}


def main():
    parser = argparse.ArgumentParser()
    for name in ("tools", "primed", "worker", "crates", "run", "sockets", "memo"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    places = Places(arguments)
    chosen = [case for case in CASES if case.name in arguments.cases.split(",")]
    rounds = {case.name: arguments.rounds or (1 if arguments.quick else case.rounds) for case in chosen}
    if not chosen:
        raise SystemExit(f"no such case; there are: {', '.join(case.name for case in CASES)}")
    for case in chosen:
        if case.simulated:
            warm_up(places, case, rounds[case.name])
    began = time.monotonic()
    result = {"cases": [measure(places, case, rounds[case.name]) for case in chosen]}
    result["took_s"] = round(time.monotonic() - began)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    report.show_harm(result, percentile)


if __name__ == "__main__":
    main()
