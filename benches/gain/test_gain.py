"""The harness's own arithmetic: python3 -B -m unittest discover benches/gain"""

import argparse
import unittest
from xml.dom import minidom

import gain
import harm
import plot
import report


def arguments(**given):
    names = ("projects", "patterns", "jobs", "rounds")
    flags = {name: given.get(name, False) for name in ("quick", "watch")}
    return argparse.Namespace(**{name: given.get(name) for name in names}, **flags)


def case(pattern, **figures):
    found = {"without_s": 10.0, "with_s": 2.5, "cached_s": 2.0, "critical_s": 1.5, "late": 0, "wasted_ms": 0}
    found |= {"asked": 10, "cached": 2, "hit": 5, "joined": 2, "missed": 1, "primed": 8, "used": 7} | figures
    return {"project": "lua", "title": "Lua", "units": 9, "jobs": 8, "watch": False, "pattern": pattern, "rounds": [found]}


class Harness(unittest.TestCase):
    def test_a_full_run_has_every_change_and_at_least_five_rounds_of_it(self):
        planned = gain.plan(arguments())[("mbedtls", 8, False)]
        self.assertEqual({name for name in gain.CHANGES if planned[name] >= 5}, set(gain.CHANGES))
        self.assertLessEqual(set(gain.LOSSES), set(planned))

    def test_a_change_that_is_taken_back_is_made_first(self):
        planned = gain.plan(arguments(projects="lua", patterns="reverted", rounds=2))
        self.assertEqual(planned, {("lua", 8, False): {"reverted": 2, "core-header": 2}})

    def test_an_unknown_name_is_refused(self):
        for given in ({"projects": "nosuch"}, {"patterns": "nosuch"}):
            with self.assertRaises(SystemExit):
                gain.plan(arguments(**given))

    def test_each_change_has_a_text_of_its_own(self):
        class Tree:
            units = [f"{number}.c" for number in range(40)]
            readers = {"core.h": 40, "part.h": 10, "leaf.h": 1}
            core, part, leaf = "core.h", "part.h", "leaf.h"

        wanted = [(gain.PATTERNS[name], round) for name in gain.CHANGES for round in range(3)]
        texts = [str(gain.marks_of(pattern, Tree, round)) for pattern, round in wanted]
        self.assertEqual(len(set(texts)), len(texts))

    def test_ratios_are_of_what_was_not_cached_and_of_what_was_primed(self):
        cases = [case("core-header"), case("leaf-source", asked=2, cached=0, hit=0, joined=2, missed=0, primed=2, used=2)]
        self.assertAlmostEqual(report.recall(cases), 9 / 10)
        self.assertAlmostEqual(report.precision(cases), 9 / 10)
        self.assertIsNone(report.recall([case("clean", asked=5, cached=5, hit=0, joined=0)]))
        self.assertAlmostEqual(report.to_bound(cases[0]), 1.25)
        self.assertAlmostEqual(report.to_without(cases[0]), 0.25)

    def test_a_new_include_does_not_count_against_recall(self):
        result = {"cases": [case("core-header", missed=0, hit=6), case("added-include", hit=0, joined=0, missed=8)]}
        result["bytes"] = [{"recorded": 1000, "added": 10}]
        floors = {what: value for what, value, _, _ in report.gain_floors(result)}
        self.assertEqual(floors["recall, all changes without new includes"], 1.0)
        self.assertEqual(floors["bytes added to the CAS / bytes recorded"], 0.01)

    def test_the_worker_is_found_in_an_action_result(self):
        # execution_metadata (9) { worker (1): "w", worker_start_timestamp (3) { seconds: 300, nanos: 5e8 } }
        start = bytes([8, 0xAC, 2, 16, 0x80, 0xCA, 0xB5, 0xEE, 1])
        metadata = b"\x0a\x01w" + b"\x1a" + bytes([len(start)]) + start
        result = b"\x20\x00" + b"\x4a" + bytes([len(metadata)]) + metadata
        self.assertEqual(harm.worker_start(result), 300.5)

    def test_a_percentile_occurred(self):
        self.assertEqual(harm.percentile([40, 10, 30, 20], 50), 20)
        self.assertEqual(harm.percentile([40, 10, 30, 20], 95), 40)
        self.assertIsNone(harm.percentile([], 95))

    def test_the_plot_is_well_formed_and_shows_each_case_twice(self):
        result = {"cases": [case("core-header"), case("added-include")], "slots": 64, "times_s": {"compile": 1.0}, "saved_before_s": 3}
        drawn = minidom.parseString(plot.draw(result))
        bars = [bar for bar in drawn.getElementsByTagName("rect") if bar.getAttribute("height") == str(plot.BAR - 1)]
        # Two of them are in the legend.
        self.assertEqual(len(bars), 2 + 2 * 2)


if __name__ == "__main__":
    unittest.main()
