"""Publishing beside the sum of its parts: see scripts/bench-publish.sh."""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time

from contestants import Contestant, Willcall
from peers import MIB, GIB, size, spread, touch, write_goods


def arguments():
    parser = argparse.ArgumentParser(prog="bench-publish.sh", description=__doc__)
    parser.add_argument("--size", type=size, default=GIB, help="of the file, e.g. 1GiB")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turns")
    parser.add_argument("--dir", help="where to work; the system's folder for temporary files otherwise")
    parser.add_argument("--json", metavar="FILE", help="all figures of all runs")
    parser.add_argument("--willcall", default="target/release/willcall", help="the binary")
    parser.add_argument("--primitives", default="target/release/examples/primitives", help="the example binary")
    return parser.parse_args()


def timed(command):
    start = time.monotonic()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return time.monotonic() - start, output


def one_run(network, goods, work, args):
    network.senders.begin()
    start = time.monotonic()
    network.cli("manager", "publish", goods, "--dir", network.dir("manager"), "--title", "Again", "--price", "1.00",
                "--currency", "USD")
    run = {"publish_s": time.monotonic() - start}
    run["publish_cpu_s"], run["publish_peak"] = network.senders.end()
    copy = os.path.join(work, "copy")
    run["copy_s"] = timed(["cp", "--reflink=never", goods, copy])[0] + timed(["sync", copy])[0]
    os.unlink(copy)
    run |= json.loads(timed([os.path.abspath(args.primitives), goods])[1])
    run["parts_s"] = run["copy_s"] + run["blake3_s"] + run["aes_256_gcm_s"]
    run["ratio"] = run["publish_s"] / run["parts_s"]
    return run


def main():
    args = arguments()
    runs = []
    with tempfile.TemporaryDirectory(prefix="willcall-bench-", dir=args.dir) as work:
        goods = os.path.join(work, "goods.bin")
        write_goods(goods, args.size)
        try:
            network = Willcall(os.path.join(work, "network"), goods, os.path.abspath(args.willcall), 1)
            for number in range(args.runs):
                touch(work, args.size)
                runs.append(one_run(network, goods, work, args))
        finally:
            for contestant in Contestant.everyone:
                contestant.stop()
    print("| seconds | median (minimum to maximum) |\n|---|---|")
    for name in ("publish_s", "publish_cpu_s", "parts_s", "copy_s", "blake3_s", "aes_256_gcm_s"):
        print(f"| {name.removesuffix('_s')} | {spread(runs, name, digits=2)} |")
    print(f"| peak memory of manager and origin, MiB | {spread(runs, 'publish_peak', 1 / MIB)} |")
    found = statistics.median(run["ratio"] for run in runs)
    print(f"| publish / parts | {spread(runs, 'ratio', digits=2)}; asked: at most 1.3, {'reached' if found <= 1.3 else 'missed'} |")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"bytes": args.size, "runs": runs}, file, indent=1)


if __name__ == "__main__":
    main()
