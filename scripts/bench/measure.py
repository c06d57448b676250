"""CPU time and peak memory of processes, from what the kernel keeps: a bench that counts only wall time cannot tell a
fast program from one that takes both cores."""

import os
import subprocess
import time

TICK = os.sysconf("SC_CLK_TCK")


def family(pid):
    """A process and everything below it."""
    pids = [pid]
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == pid:
                pids += family(int(entry))
    return pids


def cpu_of(pids):
    """User and system seconds so far, in steps of a hundredth."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        except OSError:
            pass  # it ended; its last steps are lost
    return total / TICK


def forget_peak(pids):
    for pid in pids:
        try:
            with open(f"/proc/{pid}/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            pass


def peak_of(pids):
    """Bytes of memory at the worst moment, summed over the processes."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status") as file:
                total += sum(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
        except OSError:
            pass
    return total


class Servers:
    """Processes that run before and after what is measured."""

    def __init__(self, roots):
        self.pids = sorted({pid for root in roots for pid in family(root)})

    def begin(self):
        forget_peak(self.pids)
        self.before = cpu_of(self.pids)

    def end(self):
        return cpu_of(self.pids) - self.before, peak_of(self.pids)


def run(command, **options):
    """Runs a command to its end: seconds of wall time, seconds of CPU, peak bytes, standard output."""
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed ({child.returncode}): {output[-500:]}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output


def transfer(command, servers, **options):
    """Runs the receiving command and counts both sides."""
    servers.begin()
    wall, cpu, peak, output = run(command, **options)
    sender_cpu, sender_peak = servers.end()
    return {
        "wall_s": wall,
        "receiver_cpu_s": cpu,
        "sender_cpu_s": sender_cpu,
        "receiver_peak": peak,
        "sender_peak": sender_peak,
    }, output
