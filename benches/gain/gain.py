"""Measures what primed gains: builds after a change, with and without it, side by side. Started by
scripts/bench-gain, whose head says what is printed."""

import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import time
from fnmatch import fnmatch

import report
from build import build
from patterns import PATTERNS
from servers import Casd, Places, Primed
from tree import PROJECTS, Tree

TIMES = {"generate": 0.5, "compile": 1.0, "link": 0.5}
SLOTS = 64
# How many jobs a client of the cluster runs when nothing is measured.
UNMEASURED_JOBS = 16
# What is kept of what primed says about a build.
FIGURES = ("asked", "cached", "hit", "joined", "missed", "primed", "used", "saved_ms", "wasted_ms")

# With --watch a change is made so many seconds before the build begins.
SAVED_BEFORE = 3

LOSSES = [name for name, pattern in PATTERNS.items() if pattern.loss]
CHANGES = [name for name in PATTERNS if name not in LOSSES]
# Project, jobs of make, whether primed watches, patterns, rounds. The first has every pattern; the others
# show what depends on the jobs, the language, the size and on watching.
FULL = [
    ("mbedtls", 8, False, CHANGES, 5),
    ("mbedtls", 8, False, LOSSES, 3),
    ("mbedtls", 32, False, ["core-header"], 3),
    ("lua", 2, False, ["core-header"], 3),
    ("physx", 8, False, ["core-header", "leaf-source"], 3),
    ("mbedtls", 8, True, ["core-header", "leaf-source"], 5),
    ("physx", 8, True, ["core-header"], 5),
]
QUICK = [
    ("mbedtls", 8, False, [*CHANGES, *LOSSES], 1),
    ("lua", 2, False, ["core-header"], 1),
    ("mbedtls", 8, True, ["core-header"], 1),
]


def plan(arguments):
    """The cases to measure, {(project, jobs, watch): {pattern: rounds}}: as named by the arguments, else
    the plan of a full or quick run."""
    cases = QUICK if arguments.quick else FULL
    if arguments.projects or arguments.jobs or arguments.watch:
        names = (arguments.projects or "mbedtls").split(",")
        jobs = [int(number) for number in (arguments.jobs or "8").split(",")]
        everything = CHANGES if arguments.watch else [*CHANGES, *LOSSES]
        rounds = 1 if arguments.quick else 5
        cases = [(name, number, arguments.watch, everything, rounds) for name in names for number in jobs]
    wanted = (arguments.patterns or "*").split(",")
    chosen = {}
    for project, jobs, watch, patterns, rounds in cases:
        if project not in PROJECTS:
            raise SystemExit(f"no such project: {project}; there are: {', '.join(PROJECTS)}")
        for pattern in patterns:
            if any(fnmatch(pattern, one) for one in wanted):
                chosen.setdefault((project, jobs, watch), {})[pattern] = arguments.rounds or rounds
    for patterns in chosen.values():
        for name in list(patterns):
            if PATTERNS[name].after:
                patterns.setdefault(PATTERNS[name].after, patterns[name])
    if not chosen:
        raise SystemExit(f"no such change; there are: {', '.join(PATTERNS)}")
    return chosen


def say(text):
    print(f"bench-gain: {text}", file=sys.stderr, flush=True)


def marks_of(pattern, tree, round):
    """A change with a text that never comes twice in one cache."""
    return pattern.marks(tree, f"{pattern.name} {round}")


def states(patterns):
    """The changes that there will be, round by round: (pattern, round)."""
    return [
        (PATTERNS[name], round)
        for round in range(max(patterns.values()))
        for name in patterns
        if name != "first" and round < patterns[name]
    ]


def warm_up(places, project, patterns):
    """Executes for real, once, what the measured builds will ask for, as long as it is not known."""
    stamps = places.memo / "states"
    stamps.mkdir(exist_ok=True)
    wanted = [(None, 0)] + [
        (pattern, round) for pattern, round in states(patterns) if pattern.name not in ("reverted", "clean", "untouched")
    ]

    compiler = subprocess.run([project.compiler, "--version"], capture_output=True).stdout
    edition = hashlib.sha256(repr(project).encode() + compiler).hexdigest()[:16]

    def stamp(pattern, round):
        return stamps / f"{project.name}.{edition}.{pattern.name if pattern else 'base'}.{round}"

    wanted = [state for state in wanted if not stamp(*state).exists()]
    if not wanted:
        return
    say(f"{project.title}: executing {len(wanted)} states of the tree for real, once (no other run will)")
    tree = Tree(project, places.crates, places.run / f"{project.name}.warm")
    with Casd(places, f"{project.name}.warm", 4, (0, 0)) as casd:
        for index, (pattern, round) in enumerate(wanted):
            tree.set_marks(marks_of(pattern, tree, round) if pattern else {})
            build(tree, casd.address(), places, 4, f"{project.name}.warm")
            stamp(pattern, round).touch()
            if index % 10 == 9:
                say(f"  {index + 1} of {len(wanted)}")


class Pair:
    """A project twice, built through primed and without it."""

    def __init__(self, places, name, project, jobs, watch, casds, primed):
        self.places, self.name, self.project, self.jobs = places, name, project, jobs
        self.watch, self.casds, self.primed = watch, casds, primed
        self.found = {}
        self.trees = {
            side: Tree(project, places.crates, places.run / self.name / side / "tree") for side in ("without", "with")
        }

    def build_side(self, side, jobs=None):
        address = self.primed.address() if side == "with" else self.casds["without"].address()
        return build(self.trees[side], address, self.places, jobs or self.jobs, f"{self.name}.{side}")

    def both_at_once(self):
        """Builds, unmeasured."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda side: self.build_side(side, UNMEASURED_JOBS), self.trees))
        self.primed.newest_build()

    def late(self):
        """How many results the cluster did not know beforehand."""
        return sum(casd.late_results() for casd in self.casds.values())

    def measure(self, pattern, round, change):
        """Has `change` done to each tree and builds it; then again without primed, with all cached."""
        taken, late = {}, self.late()
        for side in ("without", "with") if round % 2 == 0 else ("with", "without"):
            change(self.trees[side])
            if side == "with" and self.watch:
                time.sleep(SAVED_BEFORE)
            taken[side] = self.build_side(side)
        figures = self.primed.newest_build()
        late = self.late() - late
        if self.trees["with"].output() != self.trees["without"].output():
            raise SystemExit(f"{self.name}: {pattern.name}: what was built with primed is not what is built without")
        tree = self.trees["without"]
        if not pattern.chain:
            cached = taken["without"]
        else:
            tree.clean() if pattern.name == "first" else tree.touch()
            cached = self.build_side("without")
        say(
            f"  {round + 1} {pattern.name}: {taken['without']:.2f} s without, {taken['with']:.2f} s with,"
            f" {cached:.2f} s cached; {figures['hit']} hit, {figures['joined']} joined, {figures['missed']} missed;"
            f" {figures['used']} of {figures['primed']} used"
        )
        self.found.setdefault(pattern.name, []).append(
            {
                "without_s": taken["without"],
                "with_s": taken["with"],
                "cached_s": cached,
                "critical_s": sum(TIMES[action] for action in pattern.chain),
                "late": late,
                **{name: figures[name] for name in FIGURES},
            }
        )

    def run(self, pattern, round, then):
        """One round of a pattern, and of those that take it back; leaves both trees built and as they
        were."""
        if pattern.name == "clean":
            return self.measure(pattern, round, lambda tree: tree.clean())
        if pattern.name == "untouched":
            return self.measure(pattern, round, lambda tree: os.utime(tree.folder / tree.core))
        for change in [pattern, *then]:
            marks = marks_of(change, self.trees["with"], round)
            self.measure(change, round, lambda tree: tree.set_marks(marks))
        if marks:
            for tree in self.trees.values():
                tree.set_marks({})
            self.both_at_once()


def measure_project(places, project, jobs, watch, patterns):
    """All rounds of all patterns; returns cases and the bytes that primed added to the CAS."""
    name = f"{project.name}.{jobs}" + (".watch" if watch else "")
    more = ["--max-speculative", str(SLOTS), *(["--watch"] if watch else [])]
    times = [round(1000 * TIMES[action]) for action in ("compile", "link")]
    with (
        Casd(places, f"{name}.without", SLOTS, times) as without,
        Casd(places, f"{name}.casd", SLOTS, times) as casd,
        Primed(places, f"{name}.with", casd, more) as primed,
    ):
        pair = Pair(places, name, project, jobs, watch, {"without": without, "with": casd}, primed)
        tree = pair.trees["without"]
        about = ", ".join(f"{getattr(tree, kind)} ({tree.readers[getattr(tree, kind)]})" for kind in ("core", "part", "leaf"))
        saved = f", saved {SAVED_BEFORE} s before" if watch else ""
        say(f"{project.title}: {len(tree.units)} units, make -j{jobs}{saved}; headers, and who read them: {about}")
        if "first" in patterns:
            pair.measure(PATTERNS["first"], 0, lambda tree: None)
        else:
            pair.both_at_once()
        recorded = casd.stored_bytes() - len(pair.trees["with"].output())
        for pattern, number in states(patterns):
            if not pattern.after:
                then = [PATTERNS[name] for name in patterns if PATTERNS[name].after == pattern.name and number < patterns[name]]
                pair.run(pattern, number, then)
        added = casd.stored_bytes() - without.stored_bytes()
    shared = {"project": project.name, "title": project.title, "units": len(tree.units), "jobs": jobs, "watch": watch}
    rows = [shared | {"pattern": pattern, "rounds": pair.found[pattern]} for pattern in patterns if pattern in pair.found]
    return rows, shared | {"recorded": recorded, "added": added}


def main():
    parser = argparse.ArgumentParser()
    for name in ("tools", "primed", "worker", "crates", "run", "sockets", "memo"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--projects")
    parser.add_argument("--patterns")
    parser.add_argument("--jobs")
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    places = Places(arguments)
    chosen = plan(arguments)
    for (project, _, _), patterns in chosen.items():
        warm_up(places, PROJECTS[project], patterns)
    began = time.monotonic()
    result = {"slots": SLOTS, "times_s": TIMES, "cores": os.cpu_count(), "saved_before_s": SAVED_BEFORE}
    result |= {"cases": [], "bytes": []}
    for (project, jobs, watch), patterns in chosen.items():
        cases, stored = measure_project(places, PROJECTS[project], jobs, watch, patterns)
        result["cases"] += cases
        result["bytes"].append(stored)
    result["took_s"] = round(time.monotonic() - began)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    report.show_gain(result)


if __name__ == "__main__":
    main()
