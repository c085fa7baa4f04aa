"""The report as a picture: an SVG, written by hand."""
import math
from xml.sax.saxutils import escape

LEFT, RIGHT, TOP, PANEL, GAP, STEP = 70, 20, 40, 260, 60, 9
OURS, PEER = "#1565c0", "#d84315"


def ticks(low, high):
    """Round numbers of a logarithmic axis: 1, 1.2, 1.5, 2, 3, 5 and their tenfolds."""
    steps = [step * 10.0 ** power for power in range(-3, 7) for step in (1, 1.2, 1.5, 2, 3, 5)]
    return [step for step in steps if low <= step <= high] or [low]


class Panel:
    def __init__(self, y, title, values, width):
        self.y, self.width = y, width
        self.low, self.high = min(values) / 1.05, max(values) * 1.05
        self.parts = [f'<text x="{LEFT}" y="{y - 8}" font-weight="bold">{escape(title)}</text>']
        for tick in ticks(self.low, self.high):
            at = self.at(tick)
            self.parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
                              f'stroke="{"#555" if tick == 1 else "#ddd"}"/>'
                              f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')

    def at(self, value):
        return self.y + PANEL * (math.log(self.high) - math.log(value)) / (math.log(self.high) - math.log(self.low))

    def dot(self, x, value, colour, title):
        self.parts.append(f'<circle cx="{x}" cy="{self.at(value):.1f}" r="3" fill="{colour}">'
                          f'<title>{escape(title)}</title></circle>')

    def bar(self, x, low, high, colour):
        self.parts.append(f'<line x1="{x}" x2="{x}" y1="{self.at(low):.1f}" y2="{self.at(high):.1f}" '
                          f'stroke="{colour}"/>')


def svg(report):
    """Above, how much faster ours is, with 95% intervals; below, both as multiples of the floor."""
    entries = sorted((e for e in report["shapes"] if e.get("agree", True)),
                     key=lambda e: (bool(e.get("ragged")), e["batch"], e["heads"], e["q_len"], e["kv_len"]))
    width = LEFT + RIGHT + STEP * (len(entries) + 1)
    width = max(width, 600)
    panels, y = [], TOP + 20
    rated = [e for e in entries if "ratio" in e]
    run = report["run"]
    if rated:
        values = [v for e in rated for v in [e["ratio"], *(e["ratio_interval"] or [])]]
        panel = Panel(y, f"time of {run['peer']} / ours (above 1: ours is faster)", values + [1], width)
        for i, e in enumerate(entries):
            if "ratio" in e:
                x = LEFT + STEP * (i + 1)
                if e["ratio_interval"]:
                    panel.bar(x, *e["ratio_interval"], OURS)
                panel.dot(x, e["ratio"], OURS, f"{e['name']}: {e['ratio']:.3f}")
        panels.append(panel)
        y += PANEL + GAP
    if entries:
        values = [e[key] for e in entries for key in ("ours_of_floor", "peer_of_floor") if key in e]
        panel = Panel(y, "time / floor: ours blue" + (f", {run['peer']} red" if rated else ""), values + [1], width)
        for i, e in enumerate(entries):
            for key, colour in (("peer_of_floor", PEER), ("ours_of_floor", OURS)):
                if key in e:
                    title = f"{e['name']}: {e[key]:.2f} of {e['floor_us']:.2f} us"
                    panel.dot(LEFT + STEP * (i + 1), e[key], colour, title)
        panels.append(panel)
        y += PANEL
    labels, last = [], None
    for i, e in enumerate(entries):
        label = f"{'ragged ' if e.get('ragged') else ''}B={e['batch']} H={e['heads']}"
        if label != last:
            x = LEFT + STEP * (i + 0.5)
            labels.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{y}" stroke="#bbb" stroke-dasharray="3 3"/>'
                          f'<text transform="translate({x + 10},{y + 8}) rotate(60)">{escape(label)}</text>')
            last = label
    height = y + 120
    title = f"{run['model']}: mlad ({run['ours']})" + (f" and {run['peer']}" if run["peer"] else "")
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                      f'font-family="sans-serif" font-size="11">',
                      f'<rect width="{width}" height="{height}" fill="white"/>',
                      f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>', *labels,
                      *(part for panel in panels for part in panel.parts), "</svg>", ""])
