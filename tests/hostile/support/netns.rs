//! Machines and routers on one machine: network namespaces joined by virtual cables, each gone with the lab that made it.
//! Names are of this run, so that labs do not meet.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::Deserialize;
use serde_json::Value;

use super::process::inside;

static LABS: AtomicU32 = AtomicU32::new(0);

/// A namespace.
#[derive(Clone, Debug)]
pub(crate) struct Machine(String);

/// All namespaces of a test.
pub(crate) struct Lab {
    prefix: String,
    made: Vec<String>,
    cables: u32,
}

/// A cable that is slow and loses packets, as long as this is not dropped; nothing comes through afterwards.
pub(crate) struct SlowCable {
    process: Child,
    answers: BufReader<ChildStdout>,
}

/// What became of the packets that were sent into one end of a slow cable.
#[derive(Debug, Deserialize)]
pub(crate) struct Carried {
    /// Arrived at the other end.
    #[allow(dead_code, reason = "shown")]
    carried: u64,
    /// Lost by intention.
    pub(crate) lost: u64,
    /// Dropped because too much was under way.
    pub(crate) overflowed: u64,
    /// Bytes of those that arrived.
    pub(crate) bytes: u64,
}

/// Which port a router's translation chooses.
#[derive(Clone, Copy)]
pub(crate) enum Nat {
    /// The port that the machine behind it used, where it is free: as most routers do.
    Keeps,
    /// Another one than 5001, the same for all destinations.
    Moves,
    /// Another one for each destination: nobody can know it beforehand.
    Random,
}

/// Says on standard error, past the capture of the test runner, what is left out and why.
pub(crate) fn left_out(what: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "LEFT OUT: {what}: {why}");
}

impl Lab {
    /// Nothing where namespaces cannot be made; that is said.
    pub(crate) fn new(test: &str) -> Option<Lab> {
        if !rustix::process::geteuid().is_root() {
            left_out(test, "making network namespaces needs root");
            return None;
        }
        for (program, package) in [("ip", "iproute2"), ("nft", "nftables")] {
            if Command::new(program).arg("-V").output().is_err() {
                left_out(test, &format!("there is no `{program}` (Debian package {package})"));
                return None;
            }
        }
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let mut lab = Lab { prefix: format!("wc{}n{number}", std::process::id()), made: Vec::new(), cables: 0 };
        // What every test needs of the kernel, tried before anything is built on it.
        let tried = lab.try_machine("probe").and_then(|probe| probe.try_rules(&router_rules(Nat::Keeps)));
        if let Err(why) = tried {
            left_out(test, &why);
            return None;
        }
        Some(lab)
    }

    fn try_machine(&mut self, name: &str) -> Result<Machine, String> {
        let name = format!("{}{name}", self.prefix);
        attempt("ip", &["netns", "add", &name], "")?;
        self.made.push(name.clone());
        let machine = Machine(name);
        machine.ip("link set lo up");
        Ok(machine)
    }

    /// A machine without any cable.
    pub(crate) fn machine(&mut self, name: &str) -> Machine {
        self.try_machine(name).unwrap()
    }

    /// Joins two machines; each end has a name and an address such as `10.0.0.1/24`.
    pub(crate) fn cable(
        &mut self,
        (a, at_a, address_a): (&Machine, &str, &str),
        (b, at_b, address_b): (&Machine, &str, &str),
    ) {
        self.cables += 1;
        // Interface names have at most 15 characters.
        let (end_a, end_b) = (format!("wca{}x{}", std::process::id() % 100_000, self.cables), at_b);
        must("ip", &["-n", &a.0, "link", "add", &end_a, "type", "veth", "peer", "name", end_b, "netns", &b.0]);
        a.ip(&format!("link set {end_a} name {at_a}"));
        for (machine, end, address) in [(a, at_a, address_a), (b, at_b, address_b)] {
            machine.address(end, address);
            machine.ip(&format!("link set {end} up"));
        }
    }

    /// Joins two machines by a cable that takes `delay_ms` in each direction and loses `loss_percent` of all packets.
    /// Nothing where that cannot be had; that is said.
    pub(crate) fn slow_cable(
        &mut self,
        test: &str,
        (a, at_a, address_a): (&Machine, &str, &str),
        (b, at_b, address_b): (&Machine, &str, &str),
        (delay_ms, loss_percent): (u32, u32),
    ) -> Option<SlowCable> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hostile/support/slow_cable.py");
        let (delay, loss) = (delay_ms.to_string(), loss_percent.to_string());
        let mut command = Command::new("python3");
        command.args([script, &a.0, at_a, &b.0, at_b, &delay, &loss]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = match command.spawn() {
            Ok(process) => process,
            Err(error) => {
                left_out(test, &format!("the slow cable is a program for python3: {error}"));
                return None;
            }
        };
        let answers = BufReader::new(process.stdout.take().unwrap());
        let mut cable = SlowCable { process, answers };
        // What went wrong is on standard error, from the script itself.
        if cable.answer() != "ready" {
            left_out(test, "the slow cable could not be laid (it needs /dev/net/tun)");
            return None;
        }
        for (machine, end, address) in [(a, at_a, address_a), (b, at_b, address_b)] {
            machine.address(end, address);
            // A wire has no queue that a burst of a large window would overflow.
            machine.ip(&format!("link set {end} txqueuelen 10000 up"));
        }
        Some(cable)
    }
}

impl SlowCable {
    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// What was sent from the first end and from the second so far.
    pub(crate) fn counted(&mut self) -> [Carried; 2] {
        self.process.stdin.as_mut().unwrap().write_all(b"?\n").unwrap();
        serde_json::from_str(&self.answer()).unwrap()
    }
}

impl Drop for SlowCable {
    fn drop(&mut self) {
        // It ends by itself when its input does; this is for not leaving it behind unwaited.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.made {
            // Also while a test fails; what cannot be removed shows in `ip netns`.
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

impl Machine {
    /// `ip` with these words.
    pub(crate) fn ip(&self, words: &str) {
        let mut args = vec!["-n", &self.0];
        args.extend(words.split_whitespace());
        must("ip", &args);
    }

    /// Gives an end of a cable an address.
    pub(crate) fn address(&self, end: &str, address: &str) {
        // Without the second in which the system looks whether somebody else has it.
        let words = if address.contains(':') { "nodad" } else { "" };
        self.ip(&format!("addr add {address} dev {end} {words}"));
    }

    /// Passes packets on.
    pub(crate) fn forwards(&self) {
        let both = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding";
        must("ip", &["netns", "exec", &self.0, "sh", "-c", both]);
    }

    /// A home router: machines behind it share the address of its end `wan`, and nobody gets in unasked.
    pub(crate) fn translates(&self, nat: Nat) {
        self.forwards();
        self.rules(&router_rules(nat));
    }

    /// More rules for packets, in the language of `nft`.
    pub(crate) fn rules(&self, rules: &str) {
        self.try_rules(rules).unwrap();
    }

    /// A command to be run on this machine.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, program]);
        command
    }

    fn try_rules(&self, rules: &str) -> Result<(), String> {
        attempt("ip", &["netns", "exec", &self.0, "nft", "-f", "-"], rules)
    }

    /// Bytes that a named counter of the rules saw.
    pub(crate) fn counted(&self, name: &str) -> u64 {
        let out = self.command("nft").args(["-j", "list", "counters"]).output().unwrap();
        let listed: Value = serde_json::from_slice(&out.stdout).unwrap();
        let counters = listed["nftables"].as_array().unwrap().iter().map(|entry| &entry["counter"]);
        counters.filter(|counter| counter["name"] == name).map(|counter| counter["bytes"].as_u64().unwrap()).sum()
    }

    /// How long a machine at `address` takes to accept a connection from here: a round trip, or more where packets got
    /// lost. Nothing has to listen there: a refusal takes as long.
    pub(crate) fn round_trip(&self, address: &str) -> Duration {
        let address: SocketAddr = address.parse().unwrap();
        let handle = std::fs::File::open(format!("/var/run/netns/{}", self.0)).unwrap();
        // A thread of its own, because it stays in the namespace.
        let connecting = std::thread::spawn(move || {
            move_into_link_name_space(handle.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            let start = Instant::now();
            let _ = TcpStream::connect(address);
            start.elapsed()
        });
        connecting.join().unwrap()
    }

    /// Runs what `work` starts on this machine.
    pub(crate) fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        inside(["ip", "netns", "exec", &self.0].map(OsString::from).into(), work)
    }
}

fn router_rules(nat: Nat) -> String {
    let ports = match nat {
        Nat::Keeps => "oifname \"wan\" masquerade;",
        Nat::Moves => {
            "oifname \"wan\" udp sport 5001 masquerade to :16001;
             oifname \"wan\" tcp sport 5001 masquerade to :16001;
             oifname \"wan\" masquerade;"
        }
        Nat::Random => "oifname \"wan\" masquerade fully-random;",
    };
    format!(
        "table ip translation {{
           chain out {{ type nat hook postrouting priority 100; {ports} }}
           chain into {{
             type filter hook input priority 0;
             iifname \"wan\" ct state established,related accept
             iifname \"wan\" drop
           }}
           chain through {{
             type filter hook forward priority 0;
             iifname \"wan\" ct state established,related accept
             iifname \"wan\" ct status dnat accept
             iifname \"wan\" drop
           }}
         }}"
    )
}

fn must(program: &str, args: &[&str]) {
    attempt(program, args, "").unwrap();
}

fn attempt(program: &str, args: &[&str], input: &str) -> Result<(), String> {
    let shown = format!("{program} {}", args.join(" "));
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("`{shown}`: {error}"))?;
    child.stdin.take().unwrap().write_all(input.as_bytes()).map_err(|error| format!("`{shown}`: {error}"))?;
    let out = child.wait_with_output().unwrap();
    if out.status.success() {
        return Ok(());
    }
    Err(format!("`{shown}`: {}", String::from_utf8_lossy(&out.stderr).trim()))
}
