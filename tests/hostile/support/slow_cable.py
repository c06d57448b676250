"""A long cable: carries packets between two TUN devices, each in a network namespace, and delays and loses some.

    slow_cable.py NAMESPACE_A DEVICE_A NAMESPACE_B DEVICE_B DELAY_MS LOSS_PERCENT

For kernels without `tc netem`, and the same on all. The delay is that of one direction, so that a round trip takes twice as
long. Order is kept in each direction. What is under way is bounded as in a router: what comes when so much is on its way is
dropped, and counted apart from what is lost by intention. Each line of input is answered by the counters as JSON; the end of
input is the cable's end, so that it lives no longer than the test that made it.
"""

import collections
import ctypes
import fcntl
import json
import os
import random
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
CLONE_NEWNET = 0x40000000
# Bytes on their way in each direction: 160 MiB/s at 100 ms.
UNDER_WAY = 16 << 20
# Packets taken in one turn of a direction, so that none starves the other.
TURN = 64


def device(namespace, name):
    """Makes the device in its namespace. The process is in that namespace afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}") as handle:
        if libc.setns(handle.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return tun


class Direction:
    """From one device to the other."""

    def __init__(self, source, sink, delay, loss, chance):
        self.source, self.sink, self.delay, self.loss, self.chance = source, sink, delay, loss, chance
        self.queue = collections.deque()
        self.bytes = 0
        self.counts = {"carried": 0, "lost": 0, "overflowed": 0, "bytes": 0}

    def take(self):
        """What its sender gives, a turn's worth."""
        for _ in range(TURN):
            try:
                packet = os.read(self.source, 65536)
            except BlockingIOError:
                return
            if self.chance.random() < self.loss:
                self.counts["lost"] += 1
            elif self.bytes + len(packet) > UNDER_WAY:
                self.counts["overflowed"] += 1
            else:
                self.bytes += len(packet)
                self.queue.append((time.monotonic() + self.delay, packet))

    def give(self):
        """What has been under way for long enough; returns the seconds until the next, or nothing."""
        while self.queue:
            wait = self.queue[0][0] - time.monotonic()
            if wait > 0:
                return wait
            packet = self.queue.popleft()[1]
            self.bytes -= len(packet)
            try:
                os.write(self.sink, packet)
                self.counts["carried"] += 1
                self.counts["bytes"] += len(packet)
            except OSError:
                # The device is down, or its queue is full.
                self.counts["overflowed"] += 1
        return None


def main():
    _, namespace_a, name_a, namespace_b, name_b, delay, loss = sys.argv
    a, b = device(namespace_a, name_a), device(namespace_b, name_b)
    delay, loss = float(delay) / 1000, float(loss) / 100
    # The same packets are lost in each run, as far as the senders do the same.
    chance = random.Random(1)
    directions = [Direction(a, b, delay, loss, chance), Direction(b, a, delay, loss, chance)]
    print("ready", flush=True)
    while True:
        waits = [wait for wait in [direction.give() for direction in directions] if wait is not None]
        ready, _, _ = select.select([a, b, 0], [], [], min(waits, default=None))
        if 0 in ready:
            if not os.read(0, 4096):
                return
            print(json.dumps([direction.counts for direction in directions]), flush=True)
        for direction in directions:
            if direction.source in ready:
                direction.take()


main()
