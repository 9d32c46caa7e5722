"""What was measured, as tables, and the floors that it is held to."""

from statistics import median

from patterns import PATTERNS


def middle(case, name):
    """The median of one figure over the rounds."""
    return median(found[name] for found in case["rounds"])


def total(cases, *names):
    """The sum of some figures over all rounds of these cases."""
    return sum(found[name] for case in cases for found in case["rounds"] for name in names)


def ratio(part, whole):
    return part / whole if whole else None


def recall(cases):
    """Of what was asked for and not cached, the part that priming answered."""
    return ratio(total(cases, "hit", "joined"), total(cases, "asked") - total(cases, "cached"))


def precision(cases):
    """Of what was primed, the part that was used; an earlier build's may be used, too."""
    part = ratio(total(cases, "used"), total(cases, "primed"))
    return None if part is None else min(part, 1.0)


def bound(found):
    """What no build of that round could beat, in seconds."""
    return max(found["cached_s"], found["critical_s"])


def to_bound(case):
    return median(found["with_s"] / bound(found) for found in case["rounds"])


def to_without(case):
    return median(found["with_s"] / found["without_s"] for found in case["rounds"])


def number(value, places=2):
    return "-" if value is None else f"{value:.{places}f}"


def show_table(cases):
    """One line a case; times are medians in seconds."""
    print(
        f"{'project':<8} {'-j':>3} {'change':<19} {'n':>2} {'without':>8} {'with':>8} {'cached':>8} {'critical':>8}"
        f" {'with/without':>12} {'with/bound':>10} {'recall':>7} {'precision':>9} {'wasted s':>8}"
    )
    for case in cases:
        print(
            f"{case['project']:<8} {case['jobs']:>3} {case['pattern'] + (' (watch)' if case['watch'] else ''):<19} {len(case['rounds']):>2}"
            f" {middle(case, 'without_s'):>8.2f} {middle(case, 'with_s'):>8.2f} {middle(case, 'cached_s'):>8.2f}"
            f" {middle(case, 'critical_s'):>8.2f} {to_without(case):>12.2f} {to_bound(case):>10.2f}"
            f" {number(recall([case])):>7} {number(precision([case])):>9} {total([case], 'wasted_ms') / 1000:>8.1f}"
        )


def gain_floors(result):
    """(what, value, floor, whether the value may be less or must be more)."""
    cases = result["cases"]
    changes = [case for case in cases if not PATTERNS[case["pattern"]].new_include and case["pattern"] != "first"]
    yield "recall, all changes without new includes", recall(changes), 0.99, "at least"
    yield "precision, the same", precision(changes), 0.95, "at least"
    for case in cases:
        if (case["pattern"], case["jobs"]) == ("core-header", 8):
            where = f"core header, -j8, {case['title']}" + (", --watch" if case["watch"] else "")
            yield f"{where}: with primed / bound", to_bound(case), 1.3, "at most"
            yield f"{where}: with primed / without", to_without(case), 0.25, "at most"
    added = sum(stored["added"] for stored in result["bytes"])
    recorded = sum(stored["recorded"] for stored in result["bytes"])
    yield "bytes added to the CAS / bytes recorded", added / recorded, 0.05, "at most"


def show_floors(floors):
    """Which are kept."""
    for what, value, floor, sense in floors:
        if value is None:
            continue
        kept = value >= floor if sense == "at least" else value <= floor
        print(f"{what:<72} {value:>7.3f}  {sense} {floor:<5}  {'kept' if kept else 'MISSED'}")


def show_gain(result):
    print(
        f"\n{result['slots']} slots, a compile takes {result['times_s']['compile']} s and any other action"
        f" {result['times_s']['link']} s; {result['cores']} cores here. Medians of n rounds, seconds."
        f"\nbound: the larger of all cached and the critical path. watch: changed {result['saved_before_s']} s before"
        f" the build begins.\n"
    )
    for loss, heading in ((False, None), (True, "Where primed is not expected to help:\n")):
        cases = [case for case in result["cases"] if PATTERNS[case["pattern"]].loss == loss]
        if cases:
            if heading:
                print(heading)
            show_table(cases)
            print()
    show_floors(gain_floors(result))
    show_late(total(result["cases"], "late"))
    print(f"\nMeasured in {result['took_s']} s.")


def show_late(late):
    if late:
        print(f"\n{late} actions were executed for real while time was taken, for the first time ever; run it again.")


def show_harm(result, percentile):
    print("\nEverything that primed foresees is wrong. Medians; queueing: from Execute to the worker.\n")
    print(
        f"{'where':<30} {'n':>2} {'without s':>9} {'with s':>8} {'with/without':>12} {'primed':>7} {'used':>5}"
        f" {'p95 queueing without':>21} {'with':>8} {'ratio':>6}"
    )
    floors = []
    for case in result["cases"]:
        waited = {
            side: percentile([one for found in case["rounds"] for one in found[f"{side}_waited_ms"]], 95)
            for side in ("without", "with")
        }
        starved = ratio(waited["with"] or 0, waited["without"])
        print(
            f"{case['title']:<30} {len(case['rounds']):>2} {middle(case, 'without_s'):>9.2f} {middle(case, 'with_s'):>8.2f}"
            f" {to_without(case):>12.2f} {total([case], 'primed'):>7} {total([case], 'used'):>5}"
            f" {number(waited['without'], 0):>18} ms {number(waited['with'], 0):>5} ms {number(starved):>6}"
        )
        if case["floor"]:
            floors.append((f"{case['title']}: with primed / without", to_without(case), case["floor"], "at most"))
        floors.append((f"{case['title']}: p95 queueing, with / without", starved, 1.1, "at most"))
    print()
    show_floors(floors)
    show_late(sum(case["late"] for case in result["cases"]))
    print(f"\nMeasured in {result['took_s']} s.")


def markdown(result):
    """The table of the README."""
    saved = f", {result['saved_before_s']} s before the build (`--watch`)"
    lines = [
        "| project | change | without | with primed | all cached / critical path | with / without | recall | precision |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    ordered = sorted(result["cases"], key=lambda case: PATTERNS[case["pattern"]].loss)
    for case in ordered:
        lines.append(
            f"| {case['title']}, {case['units']} files, -j{case['jobs']} | {PATTERNS[case['pattern']].title}{saved if case['watch'] else ''}"
            f" | {middle(case, 'without_s'):.1f} s | {middle(case, 'with_s'):.1f} s"
            f" | {middle(case, 'cached_s'):.1f} s / {middle(case, 'critical_s'):.1f} s | {to_without(case):.2f}"
            f" | {number(recall([case]))} | {number(precision([case]))} |"
        )
    return "\n".join(lines)
