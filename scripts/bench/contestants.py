"""What is compared. Each is set up once, fetches as often as asked, and says why when it cannot take part."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import measure

HERE = os.path.dirname(os.path.abspath(__file__))


class Absent(Exception):
    """It is not installed; the text says what brings it."""


class Contestant:
    #: Of all contestants, so that one whose setting up fails half way leaves nothing running.
    everyone = []

    def __init__(self, folder, goods):
        self.folder, self.goods = folder, goods
        self.processes = []
        os.makedirs(folder)
        self.everyone.append(self)

    def start(self, command, **options):
        """A process that ends when its standard input closes, and what it printed first."""
        log = open(os.path.join(self.folder, "log"), "a")
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, **options)
        self.processes.append(child)
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"{command[0]} did not start; see {self.folder}/log")
        return child, line

    def fresh(self):
        """An empty folder to fetch into."""
        out = os.path.join(self.folder, "out")
        shutil.rmtree(out, ignore_errors=True)
        os.makedirs(out)
        return out

    def arrived(self, path):
        if os.path.getsize(path) != os.path.getsize(self.goods):
            raise RuntimeError(f"{path} is not whole")
        if subprocess.run(["cmp", "-s", path, self.goods]).returncode != 0:
            raise RuntimeError(f"{path} is not what was sent")

    def stop(self):
        for child in reversed(self.processes):
            child.stdin.close()
            child.terminate()
        for child in reversed(self.processes):
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()


class Willcall(Contestant):
    """A whole network of this program's own processes; each run is a purchase of its own. Wall time is that of `willcall
    fetch` from its start to its end. The sender is every seeder; the origin's includes the manager that it lives in."""

    def __init__(self, folder, goods, binary, seeders):
        super().__init__(folder, goods)
        if not os.access(binary, os.X_OK):
            raise Absent("cargo build --release")
        self.binary = binary
        manager, merchant = self.dir("manager"), self.dir("merchant")
        listen = ["--listen", "/ip4/127.0.0.1/tcp/0"]
        self.cli("manager", "init", "--dir", manager, "--set", f"copies={seeders - 1}", *listen)
        daemons = [self.daemon("manager", "run", "--dir", manager)]
        self.cli("merchant", "init", "--dir", merchant, "--join", self.invite("merchant"), "--name", "Bench",
                 "--http", "127.0.0.1:0", *listen)
        _, shop = self.daemon("merchant", "run", "--dir", merchant)
        for number in range(1, seeders):
            seeder = self.dir(f"seeder-{number}")
            self.cli("seeder", "init", "--dir", seeder, "--join", self.invite("seeder"), "--name", f"s{number}",
                     "--capacity", "64GiB", *listen)
            daemons.append(self.daemon("seeder", "run", "--dir", seeder))
        product = self.cli("manager", "publish", goods, "--dir", manager, "--title", "Bench", "--price", "1.00",
                           "--currency", "USD")["product"]
        while len(self.cli("manager", "product", product, "--dir", manager)["holders"]) < seeders:
            pass
        voucher = self.cli("merchant", "vouchers", "issue", "900.00", "--currency", "USD", "--dir", merchant)["codes"][0]
        self.buy = ["buy", product, "--merchant", json.loads(shop)["http"], "--voucher", voucher]
        self.senders = measure.Servers([child.pid for child, _ in daemons])
        self.bought = 0

    def dir(self, name):
        return os.path.join(self.folder, name)

    def command(self, *args):
        return [self.binary, *args, "--json", "--log", "warn", "--log-file", self.dir("willcall.log")]

    def cli(self, *args):
        return json.loads(measure.run(self.command(*args))[3])

    def daemon(self, *args):
        return self.start(self.command(*args, "--until-stdin-closes"))

    def invite(self, role):
        return self.cli("manager", "invite", role, "--dir", self.dir("manager"))["join"]

    def ticket(self, home="client"):
        self.bought += 1
        ticket = self.dir(f"{self.bought}.ticket")
        self.cli(*self.buy, "--home", self.dir(home), "-o", ticket)
        return ticket

    def fetch(self):
        out, ticket = self.fresh(), self.ticket()
        fetch = self.command("fetch", ticket, "--home", self.dir("client"), "-o", out)
        figures, output = measure.transfer(fetch, self.senders)
        self.arrived(os.path.join(out, os.path.basename(self.goods)))
        said = json.loads(output)
        figures["transfer_s"] = said["transfer_ms"] / 1000
        figures["sources"] = sum(1 for source in said["sources"] if source["chunks"] > 0)
        return figures

    def fetch_at_once(self, clients):
        """So many clients at the same time, each with a purchase and a home of its own: bytes a second of each, and of all
        from the first one's start to the last one's end."""
        out, length = self.fresh(), os.path.getsize(self.goods)
        tickets = [self.ticket(f"client-{n}") for n in range(clients)]
        commands = [self.command("fetch", ticket, "--home", self.dir(f"client-{n}"), "-o", os.path.join(out, str(n)))
                    for n, ticket in enumerate(tickets)]
        self.senders.begin()
        start = time.monotonic()
        with ThreadPoolExecutor(clients) as threads:
            each = list(threads.map(measure.run, commands))
        wall = time.monotonic() - start
        cpu, peak = self.senders.end()
        for n in range(clients):
            self.arrived(os.path.join(out, str(n), os.path.basename(self.goods)))
        return {
            "clients": clients,
            "total": clients * length / wall,
            "each": [length / one[0] for one in each],
            "sender_cpu_gib": cpu * (1 << 30) / (clients * length),
            "sender_peak": peak,
            "receiver_peak": max(one[2] for one in each),
        }


class Nginx(Contestant):
    """nginx over TLS 1.3, sendfile on, fetched by curl: neither verifies nor decrypts content."""

    CONFIG = """
daemon off; master_process off; worker_processes 1; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; sendfile on; tcp_nopush on;
  client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
  server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {dir}/cert; ssl_certificate_key {dir}/key;
           ssl_protocols TLSv1.3; root {root}; }}
}}
"""

    def __init__(self, folder, goods):
        super().__init__(folder, goods)
        self.nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if not self.nginx or not shutil.which("curl") or not shutil.which("openssl"):
            raise Absent("Debian: nginx-light curl openssl")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                        "-subj", "/CN=localhost", "-days", "2", "-keyout", f"{folder}/key", "-out", f"{folder}/cert"],
                       check=True, stderr=subprocess.DEVNULL)
        self.port = free_port()
        with open(f"{folder}/conf", "w") as file:
            file.write(self.CONFIG.format(dir=folder, root=os.path.dirname(goods), port=self.port))
        log = open(f"{folder}/log", "a")
        child = subprocess.Popen([self.nginx, "-c", f"{folder}/conf", "-e", f"{folder}/error.log"],
                                 stdin=subprocess.PIPE, stderr=log)
        self.processes.append(child)
        wait_for_port(self.port)
        self.senders = measure.Servers([child.pid])

    def fetch(self):
        out = os.path.join(self.fresh(), "goods")
        url = f"https://127.0.0.1:{self.port}/{os.path.basename(self.goods)}"
        figures, _ = measure.transfer(["curl", "-sSfk", "--tlsv1.3", "-o", out, url], self.senders)
        self.arrived(out)
        return figures


class Libtorrent(Contestant):
    """One seed, one client, TCP, no discovery, pieces of 1 MiB verified."""

    def __init__(self, folder, goods):
        super().__init__(folder, goods)
        if subprocess.run([sys.executable, "-c", "import libtorrent"], stderr=subprocess.DEVNULL).returncode != 0:
            raise Absent("PyPI: libtorrent")
        self.torrent = f"{folder}/torrent"
        self.script = [sys.executable, os.path.join(HERE, "torrent.py")]
        subprocess.run([*self.script, "make", goods, self.torrent], check=True)
        child, line = self.start([*self.script, "seed", self.torrent, os.path.dirname(goods)])
        self.port = line.strip()
        self.senders = measure.Servers([child.pid])

    def fetch(self):
        out = self.fresh()
        figures, _ = measure.transfer([*self.script, "fetch", self.torrent, out, self.port], self.senders)
        self.arrived(os.path.join(out, os.path.basename(self.goods)))
        return figures


class Sendme(Contestant):
    """iroh-blobs: the sender imports the file once, before the first run; receivers dial it directly, without a relay."""

    PLAIN = ["--relay", "disabled", "--no-progress"]

    def __init__(self, folder, goods):
        super().__init__(folder, goods)
        self.sendme = shutil.which("sendme")
        if not self.sendme:
            raise Absent("crates.io: cargo install sendme --version 0.37.0")
        child, line = self.start([self.sendme, "send", *self.PLAIN, "--ticket-type", "addresses", goods], cwd=folder)
        ticket = None
        while line and not ticket:
            ticket = re.search(r"blob[a-z0-9]{40,}", line)
            line = "" if ticket else child.stdout.readline()
        if not ticket:
            raise RuntimeError("sendme printed no ticket")
        self.ticket = ticket.group(0)
        self.senders = measure.Servers([child.pid])

    def fetch(self):
        out = self.fresh()
        command = [self.sendme, "receive", *self.PLAIN, self.ticket]
        figures, _ = measure.transfer(command, self.senders, cwd=out, stderr=subprocess.DEVNULL)
        self.arrived(os.path.join(out, os.path.basename(self.goods)))
        return figures


class RawStream(Contestant):
    """libp2p's TCP, TLS and yamux with default settings, one stream, from memory to nowhere: the ceiling of what runs over
    an unchanged libp2p."""

    def __init__(self, folder, goods, binary):
        super().__init__(folder, goods)
        if not os.access(binary, os.X_OK):
            raise Absent("cargo build --release -p willcall-node --example raw_stream")
        self.binary = binary

    def fetch(self):
        sender, line = self.start([self.binary, "send", str(os.path.getsize(self.goods))])
        senders = measure.Servers([sender.pid])
        figures, _ = measure.transfer([self.binary, "receive", line.strip()], senders)
        self.processes.remove(sender)
        sender.stdin.close()
        sender.wait(20)
        return figures


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port):
    import socket

    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port}")
