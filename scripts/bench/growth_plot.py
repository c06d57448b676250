"""Draws docs/growth.svg from docs/growth.json, with nothing but the standard library:
    python3 scripts/bench/growth_plot.py docs/growth.json docs/growth.svg"""

import json
import math
import sys

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 44
COLOURS = ["#1f6f8b", "#c2571a", "#5b7f2b"]
MIB = 1 << 20


def panels(figures):
    """Each: title, what is on the x axis, what on the y axis, and lines of (name, points)."""
    out = []
    store = figures.get("store", {})
    moved, kept = store.get("moved", []), store.get("kept", [])
    if moved:
        size = lambda rows: [(row["transactions"], row["store_bytes"] / MIB) for row in rows]
        files = [(row["transactions"], row["segment_bytes"] / MIB) for row in moved]
        out.append(("The manager's files", "transactions ever", "MiB",
                    [("store", size(moved)), ("store, nothing moves out", size(kept)), ("segments", files)]))
        rate = lambda rows: [(row["transactions"], row["purchases_per_s"]) for row in rows]
        out.append(("Purchases a second", "transactions ever", "per second",
                    [("with segments", rate(moved)), ("nothing moves out", rate(kept))]))
        restart = [(row["transactions"], row["restart_ms"]) for row in moved]
        out.append(("Restart", "transactions ever", "ms", [("until it answers", restart)]))
    if figures.get("gossip"):
        of = lambda name: [(row["members"], row[name]) for row in figures["gossip"]]
        out.append(("Gossip: bytes a receipt costs a member", "members", "bytes",
                    [("of the whole network", of("bytes_a_receipt")), ("that it carries", of("bytes_a_carried_receipt"))]))
    if figures.get("seeders"):
        reports = [(row["seeders"], row["report_ms"]) for row in figures["seeders"]]
        out.append(("A seeder's report at the manager", "seeders", "ms", [("64 in flight", reports)]))
    for key, x, name in [("product", "bytes", "MiB of product"), ("clients", "clients", "clients at once")]:
        rows = figures.get("delivery", {}).get(key)
        if rows:
            scale = MIB if x == "bytes" else 1
            of = lambda field, rows=rows, x=x, scale=scale: [(row[x] / scale, row[field]) for row in rows]
            out.append(("CPU seconds a delivered GiB", name, "seconds",
                        [("sender", of("sender_cpu_gib")), ("receiver", of("receiver_cpu_gib"))]))
    return out


def slope(points):
    """Exponent of growth over all points: 0 is constant, 1 is in proportion, 2 would be the square."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(logs) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else None


def short(value):
    for unit, name in [(1e9, "G"), (1e6, "M"), (1e3, "k")]:
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def panel(index, title, x_name, y_name, lines):
    """Both axes logarithmic, a decade at least, so that a slope is an exponent."""
    lines = [(name, [point for point in points if point[0] > 0 and point[1] > 0]) for name, points in lines]
    points = [point for _, of in lines for point in of]
    bounds = []
    for axis in (0, 1):
        values = [point[axis] for point in points]
        bounds.append((math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)))
    (x0, x1), (y0, y1) = [(low, max(high, low + 1)) for low, high in bounds]
    left, top = (index % 2) * WIDTH + LEFT, (index // 2) * HEIGHT + TOP
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    place_x = lambda x: left + (math.log10(x) - x0) / (x1 - x0) * wide
    place_y = lambda y: top + high - (math.log10(y) - y0) / (y1 - y0) * high
    out = [f'<text x="{left}" y="{top - 16}" class="title">{title}</text>']
    for power in range(x0, x1 + 1):
        x = place_x(10.0**power)
        out.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + high}" class="grid"/>')
        out.append(f'<text x="{x:.1f}" y="{top + high + 14}" class="tick" text-anchor="middle">{short(10.0**power)}</text>')
    for power in range(y0, y1 + 1):
        y = place_y(10.0**power)
        out.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + wide}" y2="{y:.1f}" class="grid"/>')
        out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="tick" text-anchor="end">{short(10.0**power)}</text>')
    out.append(f'<text x="{left + wide / 2}" y="{top + high + 30}" class="tick" text-anchor="middle">{x_name}</text>')
    out.append(f'<text x="{left}" y="{top - 4}" class="tick">{y_name}</text>')
    for number, (name, of) in enumerate(lines):
        if not of:
            continue
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in of)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3" fill="{colour}"/>' for x, y in of]
        grows = slope(of)
        note = name if grows is None else f"{name} (slope {grows:+.2f})"
        out.append(f'<text x="{left + 6}" y="{top + 14 + number * 14}" class="tick" style="fill:{colour}">{note}</text>')
    return out


def draw(json_path, svg_path):
    with open(json_path) as file:
        drawn = panels(json.load(file))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{(len(drawn) + 1) // 2 * HEIGHT}">',
           "<style>text{font-family:sans-serif}.title{font-size:13px;font-weight:bold}.tick{font-size:11px;fill:#444}"
           ".grid{stroke:#ddd}</style>", '<rect width="100%" height="100%" fill="white"/>']
    for index, parts in enumerate(drawn):
        out += panel(index, *parts)
    with open(svg_path, "w") as file:
        file.write("\n".join([*out, "</svg>", ""]))


if __name__ == "__main__":
    draw(*sys.argv[1:3])
