"""Draws what scripts/bench-gain has measured, from its own JSON, as an SVG that reads well on a light
and on a dark page. Started by scripts/plot-gain."""

import json
import sys
from html import escape
from pathlib import Path
from statistics import median

from patterns import PATTERNS
from report import bound, markdown, middle

WIDTH, LEFT, RIGHT = 860, 268, 70
BAR, GAP, SECTION = 11, 15, 34
# Between these stands the table in the README.
BEGIN, END = "<!-- by scripts/plot-gain -->", "<!-- end -->"
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #3a3f45 }
  .title { font-size: 15px; font-weight: 600 }
  .section { font-weight: 600 }
  .faint { fill: #6b7178 }
  .grid { stroke: #8a9099; stroke-opacity: .25 }
  .without { fill: #9aa3ad }
  .with { fill: #1f8a5b }
  .bound { stroke: #c2571a; stroke-width: 2.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #d5dae0 }
    .faint { fill: #9aa3ad }
    .without { fill: #6b7480 }
    .with { fill: #3fb983 }
    .bound { stroke: #f08c4a }
  }
"""


def nice_step(longest):
    """The distance of grid lines, in seconds, for about six of them."""
    return next((step for step in (0.5, 1, 2, 5, 10, 20) if longest / step <= 8), 60)


def sections(result):
    """[(heading, cases)]: one for each project and number of jobs, losses last."""
    found = {}
    for case in result["cases"]:
        heading = f"{case['title']}, {case['units']} files, make -j{case['jobs']}"
        if case["watch"]:
            heading += f", saved {result['saved_before_s']} s before, with primed --watch"
        if PATTERNS[case["pattern"]].loss:
            heading += ": where primed is not expected to help"
        found.setdefault(heading, []).append(case)
    return sorted(found.items(), key=lambda section: PATTERNS[section[1][0]["pattern"]].loss)


def draw(result):
    """The plot, as a string."""
    groups = sections(result)
    longest = max(max(middle(case, "without_s"), middle(case, "with_s")) for case in result["cases"])
    scale = (WIDTH - LEFT - RIGHT) / longest
    body, y = [], 86
    for heading, cases in groups:
        y += SECTION - GAP
        body.append(f'<text class="section" x="16" y="{y}">{escape(heading)}</text>')
        y += GAP
        for case in cases:
            without, primed = middle(case, "without_s"), middle(case, "with_s")
            least = median(bound(found) for found in case["rounds"])
            body.append(f'<text x="{LEFT - 10}" y="{y + BAR + 4}" text-anchor="end">{escape(PATTERNS[case["pattern"]].title)}</text>')
            for row, (name, value) in enumerate((("without", without), ("with", primed))):
                top = y + row * BAR
                body.append(f'<rect class="{name}" x="{LEFT}" y="{top}" width="{value * scale:.1f}" height="{BAR - 1}"/>')
            x = LEFT + least * scale
            body.append(f'<line class="bound" x1="{x:.1f}" y1="{y - 2}" x2="{x:.1f}" y2="{y + 2 * BAR + 1}"/>')
            x = LEFT + max(without, primed) * scale + 6
            body.append(f'<text class="faint" x="{x:.1f}" y="{y + BAR + 4}">× {primed / without:.2f}</text>')
            y += 2 * BAR + GAP
    end = y
    grid, at, step = [], 0, nice_step(longest)
    while at <= longest:
        x = LEFT + at * scale
        grid.append(f'<line class="grid" x1="{x:.1f}" y1="80" x2="{x:.1f}" y2="{end}"/>')
        grid.append(f'<text class="faint" x="{x:.1f}" y="{end + 16}" text-anchor="middle">{at:g} s</text>')
        at += step
    legend = (
        f'<text class="title" x="16" y="26">A build after a change, with and without primed</text>'
        f'<rect class="without" x="16" y="46" width="24" height="10"/><text x="46" y="56">without</text>'
        f'<rect class="with" x="112" y="46" width="24" height="10"/><text x="142" y="56">with primed</text>'
        f'<line class="bound" x1="236" y1="43" x2="236" y2="59"/><text x="244" y="56">no build can be faster:'
        f" all cached, or the critical path</text>"
        f'<text class="faint" x="{WIDTH - 16}" y="56" text-anchor="end">{result["slots"]} slots, a compile takes'
        f' {result["times_s"]["compile"]:g} s</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {end + 28}" role="img"'
        f' aria-label="Seconds that builds take with and without primed">\n<style>{STYLE}</style>\n'
        + "\n".join([legend, *grid, *body])
        + "\n</svg>\n"
    )


def put_into(page, table):
    """Replaces what stands between the marks in a Markdown page."""
    text = page.read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main():
    arguments = [Path(argument) for argument in sys.argv[1:]]
    if len(arguments) not in (2, 3):
        raise SystemExit("usage: plot.py FILE.json FILE.svg [README.md]")
    result = json.loads(arguments[0].read_text())
    arguments[1].write_text(draw(result))
    table = markdown(result)
    if len(arguments) == 3:
        put_into(arguments[2], table)
    else:
        print(table)


if __name__ == "__main__":
    main()
