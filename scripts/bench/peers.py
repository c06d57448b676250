"""Willcall beside what a user would pick instead, in one run, interleaved, on this machine: see scripts/bench-peers.sh."""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile

from contestants import Absent, Contestant, Libtorrent, Nginx, RawStream, Sendme, Willcall

MIB, GIB = 1 << 20, 1 << 30
UNITS = {"KiB": 1 << 10, "MiB": MIB, "GiB": GIB, "": 1}

# name of the ratio, of whom, what, against whom, what is asked for, whether more is better
RATIOS = [
    ("rate, one seeder / nginx + curl", "willcall", "mib_s", "nginx", 0.85, True),
    ("rate, one seeder / libtorrent", "willcall", "mib_s", "libtorrent", 1.3, True),
    ("rate, one seeder / sendme", "willcall", "mib_s", "sendme", 3.0, True),
    ("rate, one seeder / raw libp2p stream", "willcall", "mib_s", "raw", 0.9, True),
    ("rate, four seeders / one seeder", "willcall-4", "mib_s", "willcall", 1.0, True),
    ("receiver CPU, one seeder / curl", "willcall", "receiver_cpu_gib", "nginx", 1.5, False),
    ("sender CPU, one seeder / raw libp2p stream", "willcall", "sender_cpu_gib", "raw", 1.0, False),
]


def size(text):
    digits = text.rstrip("KMGiB")
    unit = text[len(digits):]
    if not digits.isdigit() or unit not in UNITS:
        raise argparse.ArgumentTypeError("a size such as 1GiB or 256MiB")
    return int(digits) * UNITS[unit]


def arguments():
    parser = argparse.ArgumentParser(prog="bench-peers.sh", description=__doc__)
    parser.add_argument("--size", type=size, default=GIB, help="of the file, e.g. 1GiB")
    parser.add_argument("--runs", type=int, default=9, help="of each, interleaved")
    parser.add_argument("--json", metavar="FILE", help="all figures of all runs")
    parser.add_argument("--disk", metavar="DIR", help="work here instead of on a memory file system")
    parser.add_argument("--zeros", action="store_true", help="a file of zeros that takes no space: for memory, not for rates")
    parser.add_argument("--crowd", type=int, default=8, help="clients at once from one seeder; 0 for none")
    parser.add_argument("--only", metavar="NAME,…", help="of " + ", ".join(CONTESTANTS))
    parser.add_argument("--willcall", default="target/release/willcall", help="the binary")
    parser.add_argument("--raw", default="target/release/examples/raw_stream", help="the example binary")
    return parser.parse_args()


CONTESTANTS = {
    "willcall": lambda dir, goods, args: Willcall(dir, goods, os.path.abspath(args.willcall), 1),
    "willcall-4": lambda dir, goods, args: Willcall(dir, goods, os.path.abspath(args.willcall), 4),
    "nginx": lambda dir, goods, args: Nginx(dir, goods),
    "libtorrent": lambda dir, goods, args: Libtorrent(dir, goods),
    "sendme": lambda dir, goods, args: Sendme(dir, goods),
    "raw": lambda dir, goods, args: RawStream(dir, goods, os.path.abspath(args.raw)),
}


def write_goods(path, length):
    """Bytes that nothing can compress."""
    with open(path, "wb") as file:
        while length > 0:
            part = os.urandom(min(length, 8 * MIB))
            file.write(part)
            length -= len(part)


def touch(folder, length):
    """Has the system touch as much memory as a run is about to. Where a hypervisor takes free memory back, the next one to
    use it pays for it, as much CPU time as the whole transfer; whose turn that is must not decide the comparison."""
    path = os.path.join(folder, "touched")
    with open(path, "wb") as file:
        part = bytes(MIB)
        for _ in range(length // MIB):
            file.write(part)
    os.unlink(path)


def memory_file_system(needed):
    for folder in ("/dev/shm", "/run/shm"):
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > needed:
            return folder
    return None


def compare(args):
    # The goods, the origins' copies, three seeders' copies, what is fetched.
    base = args.disk or memory_file_system(10 * args.size)
    if base is None:
        print("no memory file system with enough room: working on disk", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="willcall-bench-", dir=base) as work:
        goods = os.path.join(work, "goods.bin")
        if args.zeros:
            with open(goods, "wb") as file:
                file.truncate(args.size)
        else:
            write_goods(goods, args.size)
        names = args.only.split(",") if args.only else list(CONTESTANTS)
        taking_part, absent, runs, crowd = {}, {}, {}, []
        try:
            for name in names:
                print(f"setting up {name}", file=sys.stderr)
                try:
                    taking_part[name] = CONTESTANTS[name](os.path.join(work, name), goods, args)
                except Absent as why:
                    absent[name] = str(why)
            for number in range(args.runs):
                for name, contestant in taking_part.items():
                    if base is not None and not args.disk:
                        touch(contestant.folder, args.size + args.size // 4)
                    figures = contestant.fetch()
                    shutil.rmtree(os.path.join(contestant.folder, "out"), ignore_errors=True)
                    figures["mib_s"] = args.size / MIB / figures["wall_s"]
                    for side in ("sender", "receiver"):
                        figures[f"{side}_cpu_gib"] = figures[f"{side}_cpu_s"] * GIB / args.size
                    runs.setdefault(name, []).append(figures)
                    print(f"run {number + 1}/{args.runs} {name}: {figures['mib_s']:.0f} MiB/s", file=sys.stderr)
            crowd = in_a_crowd(work, args) if args.crowd and "willcall" in names else []
        finally:
            for contestant in Contestant.everyone:
                contestant.stop()
    return work, runs, absent, crowd


def in_a_crowd(work, args):
    """One client, then many at once, again and again; smaller goods, so that all copies fit into the memory."""
    goods = os.path.join(work, "crowd.bin")
    write_goods(goods, min(args.size, 256 * MIB))
    one_seeder = Willcall(os.path.join(work, "crowd"), goods, os.path.abspath(args.willcall), 1)
    rounds = []
    for number in range(args.runs):
        if not args.disk:
            touch(work, args.crowd * os.path.getsize(goods))
        alone = one_seeder.fetch_at_once(1)
        rounds.append({"alone": alone, "crowd": one_seeder.fetch_at_once(args.crowd)})
        total = rounds[-1]["crowd"]["total"] / MIB
        print(f"run {number + 1}/{args.runs} {args.crowd} clients at once: {total:.0f} MiB/s", file=sys.stderr)
    return rounds


def crowd_table(rounds):
    if not rounds:
        return []
    clients = rounds[0]["crowd"]["clients"]
    alone = [one["alone"]["total"] for one in rounds]
    total = [one["crowd"]["total"] for one in rounds]
    evenness = [min(one["crowd"]["each"]) / statistics.mean(one["crowd"]["each"]) for one in rounds]
    show = lambda values, scale=1.0, digits=0: spread([{"x": value} for value in values], "x", scale, digits)
    ratio = statistics.median(total) / statistics.median(alone)
    even = statistics.median(evenness)
    word = lambda reached: "reached" if reached else "missed"
    peak = max(one["crowd"]["sender_peak"] for one in rounds) / MIB
    return ["", f"{clients} clients at once from one seeder", "", "| | found | asked | |", "|---|---|---|---|",
            f"| one client alone, MiB/s | {show(alone, 1 / MIB)} | | |",
            f"| {clients} together, MiB/s | {show(total, 1 / MIB)} | | |",
            f"| together / alone, medians | {ratio:.2f} | at least 0.95 | {word(ratio >= 0.95)} |",
            f"| slowest client / mean of all | {show(evenness, digits=2)} | at least 0.7 | {word(even >= 0.7)} |",
            f"| peak memory of manager and origin, MiB | {peak:.0f} | | |"]


def spread(runs, what, scale=1.0, digits=0):
    values = [run[what] * scale for run in runs]
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(runs):
    found = []
    for title, mine, what, theirs, target, more in RATIOS:
        if mine not in runs or theirs not in runs:
            continue
        ours = [run[what] for run in runs[mine]]
        other = [run[what] for run in runs[theirs]]
        ratio = statistics.median(ours) / max(statistics.median(other), 1e-9)
        overlap = min(ours) <= max(other) and min(other) <= max(ours)
        found.append({
            "ratio": title, "value": round(ratio, 3), "target": target,
            "reached": ratio >= target if more else ratio <= target, "intervals_overlap": overlap, "more_is_better": more,
        })
    return found


def table(runs, absent, crowd):
    lines = ["| | MiB/s | sender CPU s/GiB | receiver CPU s/GiB | sender peak MiB | receiver peak MiB |",
             "|---|---|---|---|---|---|"]
    for name, own in runs.items():
        cells = [spread(own, "mib_s"), spread(own, "sender_cpu_gib", digits=2), spread(own, "receiver_cpu_gib", digits=2),
                 spread(own, "sender_peak", 1 / MIB), spread(own, "receiver_peak", 1 / MIB)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"| {name} | absent: {why} | | | | |" for name, why in absent.items()]
    lines += ["", "median (minimum to maximum)", "", "| ratio of medians | found | asked | |", "|---|---|---|---|"]
    for row in ratios(runs):
        asked = ("at least " if row["more_is_better"] else "at most ") + str(row["target"])
        note = ("reached" if row["reached"] else "missed") + (", intervals overlap" if row["intervals_overlap"] else "")
        lines.append(f"| {row['ratio']} | {row['value']:.2f} | {asked} | {note} |")
    return "\n".join(lines + crowd_table(crowd))


def main():
    args = arguments()
    work, runs, absent, crowd = compare(args)
    print(table(runs, absent, crowd))
    if args.json:
        facts = {
            "machine": {"cores": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()},
            "bytes": args.size, "on": os.path.dirname(work), "runs": runs, "absent": absent, "ratios": ratios(runs),
            "crowd": crowd,
        }
        with open(args.json, "w") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
