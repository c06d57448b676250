"""Measures how costs grow and keeps the figures in one JSON file: see scripts/measure-growth.sh."""

import argparse
import concurrent.futures
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time

import growth_plot
import measure
from contestants import Contestant, Willcall
from peers import write_goods

MIB, GIB = 1 << 20, 1 << 30
MANAGER = ["--release", "--quiet", "-p", "willcall-manager-node", "--example", "growth", "--"]


def arguments():
    parser = argparse.ArgumentParser(prog="measure-growth.sh", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--json", default="docs/growth.json", help="where the figures are kept")
    parser.add_argument("--svg", default="docs/growth.svg", help="where they are drawn")
    parser.add_argument("--work", help="folder for stores and goods")
    parser.add_argument("--willcall", metavar="FILE", help="a binary that is there; else one is built")
    parser.add_argument("--quick", action="store_true", help="without the largest size of each")
    return parser.parse_args()


def lines(command, **options):
    """The JSON objects that a command prints, one a line."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def sizes(args, *all_sizes):
    return all_sizes[:-1] if args.quick else all_sizes


def store(args, work):
    """A manager's store with so many transactions; for comparison also one from which nothing moves away."""
    environment = {**os.environ, "WILLCALL_GROWTH_DIR": work}
    run = ["cargo", "run", *MANAGER]
    moved = lines([*run, *map(str, sizes(args, 1000, 100_000, 1_000_000))], env=environment)
    kept = lines([*run, "--keep-all", *map(str, sizes(args, 1000, 10_000, 100_000))], env=environment)
    return {"moved": moved, "kept": kept}


def seeders(args, _work):
    """What a seeder costs the manager."""
    return lines(["cargo", "run", *MANAGER, "--seeders", *map(str, sizes(args, 10, 50, 200))])


def gossip(args, _work):
    """What a receipt costs each member of the mesh, in bytes; the test has its sizes built in."""
    environment = dict(os.environ) if args.quick else {**os.environ, "WILLCALL_GROWTH": "1"}
    command = ["cargo", "test", "--quiet", "-p", "willcall-node", "--test", "node", "gossip_growth", "--", "--nocapture"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found = re.findall(r"(\d+) members, (\d+) shards: .* each member (\d+) bytes, one that it carries (\d+)", output)
    names = ["members", "shards", "bytes_a_receipt", "bytes_a_carried_receipt"]
    return [dict(zip(names, map(int, line))) for line in found]


def delivery(args, work):
    """What a delivered GiB costs both sides, by the size of the product, the number of clients and of seeders."""
    binary = args.willcall
    if not binary:
        subprocess.run(["cargo", "build", "--release", "--quiet"], check=True)
        binary = "target/release/willcall"
    binary = os.path.abspath(binary)
    result = {"product": [], "clients": [], "sources": [], "left_out": []}
    for length in sizes(args, 10 * MIB, GIB, 10 * GIB):
        # The goods, their master copy, the buyer's and room to move.
        if shutil.disk_usage(work).free < 4 * length:
            result["left_out"].append(f"product of {length} bytes: too little disk")
            continue
        runs = 5 if length < GIB else 1
        with network(work, binary, length, 1) as it:
            figures = [together(it, 1) for _ in range(runs)]
        result["product"].append({"bytes": length, **middle(figures)})
        print(json.dumps(result["product"][-1]))
    for clients in sizes(args, 1, 8, 64):
        with network(work, binary, 32 * MIB, 1) as it:
            result["clients"].append({"clients": clients, **together(it, clients)})
        print(json.dumps(result["clients"][-1]))
    for count in sizes(args, 1, 4, 12):
        with network(work, binary, 256 * MIB, count) as it:
            result["sources"].append({"seeders": count, **middle([together(it, 1) for _ in range(3)])})
        print(json.dumps(result["sources"][-1]))
    return result


class network:
    """A network with one product, gone after the block."""

    def __init__(self, work, binary, length, seeders):
        self.folder = tempfile.mkdtemp(dir=work)
        goods = os.path.join(self.folder, "goods.bin")
        write_goods(goods, length)
        self.willcall = Willcall(os.path.join(self.folder, "net"), goods, binary, seeders)

    def __enter__(self):
        return self.willcall

    def __exit__(self, *_):
        self.willcall.stop()
        Contestant.everyone.remove(self.willcall)
        shutil.rmtree(self.folder)


def together(it, clients):
    """So many clients fetch at once, each as a process and peer of its own."""
    length = os.path.getsize(it.goods)
    names = [f"home-{it.bought}-{n}" for n in range(clients)]
    tickets, homes = [it.ticket(name) for name in names], [it.dir(name) for name in names]

    def fetch(home, ticket):
        wall, cpu, peak, _ = measure.run(it.command("fetch", ticket, "--home", home, "-o", os.path.join(home, "out")))
        return wall, cpu, peak

    it.senders.begin()
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        done = list(pool.map(fetch, homes, tickets))
    wall = time.monotonic() - start
    cpu, peak = it.senders.end()
    for home in homes:
        it.arrived(os.path.join(home, "out", os.path.basename(it.goods)))
        shutil.rmtree(home)
    gib = clients * length / GIB
    return {
        "mib_s": clients * length / MIB / wall,
        "sender_cpu_gib": cpu / gib, "receiver_cpu_gib": sum(one[1] for one in done) / gib,
        "sender_peak_mib": peak / MIB, "receiver_peak_mib": max(one[2] for one in done) / MIB,
    }


def middle(runs):
    """Each figure's median."""
    return {name: sorted(run[name] for run in runs)[len(runs) // 2] for name in runs[0]}


PARTS = {"store": store, "seeders": seeders, "gossip": gossip, "delivery": delivery}


def main():
    args = arguments()
    figures = {}
    if os.path.exists(args.json):
        with open(args.json) as file:
            figures = json.load(file)
    figures["machine"] = {"cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}
    with tempfile.TemporaryDirectory(dir=args.work, prefix="willcall-growth-") as work:
        for part in args.parts.split(","):
            begin = time.monotonic()
            load = os.getloadavg()[0]
            figures[part] = PARTS[part](args, work)
            took = round(time.monotonic() - begin)
            figures.setdefault("runs", {})[part] = {"date": time.strftime("%Y-%m-%d"), "seconds": took, "load_before": load}
            with open(args.json, "w") as file:
                json.dump(figures, file, indent=1)
                file.write("\n")
            print(f"{part}: {took} s")
    growth_plot.draw(args.json, args.svg)


if __name__ == "__main__":
    main()
