//! A home router that forwards ports for those behind it who ask (UPnP), by the program that most such routers run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::netns::left_out;
use super::{Machine, until};

/// The service of one router, until this is dropped.
pub(crate) struct PortService {
    process: Child,
    router: Machine,
    log: PathBuf,
}

/// The program writes its rules into these chains, and leaves it to the system's administrator to make them.
const CHAINS: &str = "table inet miniupnpd {
    chain forward { type filter hook forward priority 0; jump miniupnpd; }
    chain miniupnpd { }
    chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
    chain prerouting_miniupnpd { }
    chain postrouting { type nat hook postrouting priority 100; jump postrouting_miniupnpd; }
    chain postrouting_miniupnpd { }
}";

/// Machines get ports for themselves only, as at most routers.
const SETTINGS: &str = "ext_ifname=wan
listening_ip=lan
http_port=0
enable_natpmp=no
enable_upnp=yes
secure_mode=yes
upnp_table_name=miniupnpd
upnp_nat_table_name=miniupnpd
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
uuid=2a3bd2ba-1f3b-4d3c-9f0e-3f3d2d1c0b0a
allow 1024-65535 10.0.0.0/8 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
";

impl PortService {
    /// On a router with the ends `wan` and `lan`, its files in `folder`. Nothing where the program is missing; that is said.
    pub(crate) fn start(router: &Machine, test: &str, folder: &Path) -> Option<PortService> {
        if Command::new("miniupnpd").arg("--version").output().is_err() {
            left_out(test, "there is no `miniupnpd` (Debian package miniupnpd-nftables)");
            return None;
        }
        router.rules(CHAINS);
        fs::create_dir_all(folder).unwrap();
        let (settings, log) = (folder.join("miniupnpd.conf"), folder.join("miniupnpd.log"));
        fs::write(&settings, SETTINGS).unwrap();
        let mut command = router.command("miniupnpd");
        // -d: in the foreground, so that it is ours to end.
        command.arg("-d").arg("-f").arg(&settings).arg("-P").arg(folder.join("miniupnpd.pid"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap());
        let service = PortService { process: command.spawn().unwrap(), router: router.clone(), log: log.clone() };
        // Who asks before does not ask again.
        until("the router's UPnP service", || {
            fs::read_to_string(&log).unwrap().contains("HTTP listening on port").then_some(())
        });
        Some(service)
    }

    /// Whether its log names an address.
    pub(crate) fn was_asked_about(&self, address: &str) -> bool {
        fs::read_to_string(&self.log).unwrap().contains(address)
    }

    /// How many ports it forwards.
    pub(crate) fn forwarded(&self) -> usize {
        let mut command = self.router.command("nft");
        command.args(["-j", "list", "chain", "inet", "miniupnpd", "prerouting_miniupnpd"]);
        let listed: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
        listed["nftables"].as_array().unwrap().iter().filter(|entry| entry.get("rule").is_some()).count()
    }
}

impl Drop for PortService {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
