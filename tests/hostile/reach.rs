//! Homes and their routers: who gets through to whom, tried with network namespaces, in which the kernel translates
//! addresses as a router does. They need root, `ip` and `nft`; what is left out for want of them is said on standard error.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use super::support::{
    Bought, Carried, Job, Lab, Machine, Nat, Network, PortService, SlowCable, args, bytes, run, same, text, until,
};

/// The internet's one public address of the manager, the merchant and public seeders.
const PUBLIC: &str = "11.0.0.1";
const PUBLIC_V6: &str = "2001:db8::1";
/// Ports of the manager; its origin is ten further up.
const PORT: u16 = 4601;
const ORIGIN: u16 = 4611;
/// Where containers take this machine to be.
const CONTAINERS: &str = "172.17.0.1";
/// A few megabytes, so that no relay with its usual limits could have carried it.
const SIZE: usize = 3 << 20;
/// Over a line as long as this, a few seconds' worth.
const FAR_SIZE: usize = 12 << 20;
/// Milliseconds of a long line in each direction.
const FAR_MS: u32 = 100;

/// A lab with a network of nodes in it. Fields are dropped in this order: nodes end before their machines go.
struct Net {
    network: Network,
    /// A router that joins everybody; the manager, the merchant and public seeders run on it.
    internet: Machine,
    lab: Lab,
    links: u8,
    /// Bytes of the goods that are sold here.
    size: usize,
}

impl Net {
    fn start(test: &str, v6: bool) -> Option<Net> {
        let mut lab = Lab::new(test)?;
        let internet = lab.machine("net");
        internet.forwards();
        internet.address("lo", &format!("{PUBLIC}/32"));
        internet.address("lo", &format!("{PUBLIC_V6}/128"));
        internet.rules(
            "table inet traffic {
               counter between { }
               chain through { type filter hook forward priority 0; counter name between; }
             }",
        );
        let mut network = Network::empty();
        internet.run(|| {
            let mut init = args!["init", "--set", "copies=1", "--set", "relay={enabled=true}"];
            init.extend(addresses(v6, PORT));
            network.of("manager", init).ok();
            network.run_role("manager");
            let join = network.invite("merchant");
            let mut init = args!["init", "--name", "Shop", "--http", "127.0.0.1:0", "--join", join];
            init.extend(args!["--listen", "/ip4/127.0.0.1/tcp/0"]);
            network.of("merchant", init).ok();
            network.run_role("merchant");
            network.issue_voucher();
        });
        Some(Net { network, internet, lab, links: 1, size: SIZE })
    }

    /// A machine that is on the internet itself.
    fn public(&mut self, name: &str) -> Machine {
        let machine = self.lab.machine(name);
        self.link(&machine);
        machine
    }

    /// A machine behind a router of its own.
    fn home(&mut self, name: &str, nat: Nat) -> Machine {
        self.home_and_router(name, nat).0
    }

    fn home_and_router(&mut self, name: &str, nat: Nat) -> (Machine, Machine) {
        let router = self.lab.machine(&format!("{name}r"));
        self.link(&router);
        router.translates(nat);
        let machine = self.lab.machine(name);
        let lan = format!("10.{}.0", self.links);
        self.lab.cable((&router, "lan", &format!("{lan}.1/24")), (&machine, "eth", &format!("{lan}.2/24")));
        machine.ip(&format!("route add default via {lan}.1"));
        (machine, router)
    }

    /// A machine at the end of a long line that loses so many percent of all packets.
    fn far_away(&mut self, test: &str, loss_percent: u32) -> Option<(Machine, SlowCable)> {
        let machine = self.lab.machine("c");
        self.links += 1;
        let n = self.links;
        let (here, there) = (format!("11.0.{n}.1/24"), format!("11.0.{n}.2/24"));
        let ends = ((&self.internet, &*format!("link{n}"), &*here), (&machine, "wan", &*there));
        let cable = self.lab.slow_cable(test, ends.0, ends.1, (FAR_MS, loss_percent))?;
        machine.ip(&format!("route add default via 11.0.{n}.1"));
        Some((machine, cable))
    }

    /// Joins a machine to the internet by its end `wan`.
    fn link(&mut self, machine: &Machine) {
        self.links += 1;
        let n = self.links;
        let here = format!("link{n}");
        self.lab.cable((&self.internet, &here, &format!("11.0.{n}.1/24")), (machine, "wan", &format!("11.0.{n}.2/24")));
        machine.ip(&format!("route add default via 11.0.{n}.1"));
        self.internet.address(&here, &format!("2001:db8:{n}::1/64"));
        machine.address("wan", &format!("2001:db8:{n}::2/64"));
        machine.ip(&format!("-6 route add default via 2001:db8:{n}::1"));
    }

    /// A seeder on the internet's machine, which says where it is.
    fn public_seeder(&mut self, v6: bool) {
        let mut init = self.seeder_init();
        init.extend(addresses(v6, 5001));
        let (internet, network) = (self.internet.clone(), &mut self.network);
        internet.run(|| {
            network.of("seeder-1", init).ok();
            network.run_role("seeder-1");
        });
        self.network.seeders = 1;
    }

    /// A seeder that knows nothing of where it is.
    fn seeder_at(&mut self, machine: &Machine) {
        let mut init = self.seeder_init();
        init.extend(args!["--listen", "/ip4/0.0.0.0/tcp/5001", "--listen", "/ip4/0.0.0.0/udp/5001/quic-v1"]);
        let network = &mut self.network;
        machine.run(|| {
            network.of("seeder-1", init).ok();
            network.run_role("seeder-1");
        });
        self.network.seeders = 1;
    }

    fn seeder_init(&self) -> Vec<std::ffi::OsString> {
        let join = self.network.invite("seeder");
        args!["init", "--name", "seeder-1", "--capacity", "1GiB", "--join", join, "--set", "report-ms=1000"]
    }

    /// Waits until the manager tells others that the seeder is reached through a relay.
    fn relayed(&self) {
        until("an address at a relay", || {
            let seeders = self.network.of("manager", args!["seeders"]).ok();
            let seeders = seeders["seeders"].as_array().unwrap();
            let seeder = seeders.iter().find(|seeder| seeder["name"] == "seeder-1")?;
            seeder["addresses"].to_string().contains("/p2p-circuit").then_some(())
        });
    }

    /// Publishes goods, has the seeder fetch them, then turns everybody away from the origin; and buys.
    fn sell(&self) -> Bought {
        let album = self.network.path("album");
        std::fs::create_dir_all(&album).unwrap();
        std::fs::write(album.join("one"), bytes(1, self.size)).unwrap();
        let product = self.network.publish(&album, &[]);
        self.internet.rules(&format!(
            "table inet origin {{
               chain into {{
                 type filter hook input priority 0;
                 iifname \"lo\" accept
                 tcp dport {ORIGIN} reject with tcp reset
                 udp dport {ORIGIN} reject
               }}
             }}"
        ));
        self.internet.run(|| self.network.buy(&product, "client"))
    }

    /// The goods are there, and the seeder sent them.
    fn assert_fetched(&self, answer: &Value) {
        same(&self.network.path("album"), Path::new(&text(answer, "path")));
        let seeder = &self.network.daemons["seeder-1"].ready["peer"];
        for source in answer["sources"].as_array().unwrap() {
            assert_eq!(source["chunks"].as_u64().unwrap() > 0, source["peer"] == *seeder, "{answer}");
        }
    }

    fn fetching(&self, bought: &Bought) -> Vec<std::ffi::OsString> {
        bought.fetching(&self.network.path("goods"))
    }

    /// Bytes that went between machines over the internet, past the programs that run on it.
    fn between(&self) -> u64 {
        self.internet.counted("between")
    }

    /// Buys and fetches at this machine what a seeder has that only the relay leads to: directly, in the end.
    fn fetched_past_the_relay(&self, client: &Machine) {
        self.relayed();
        self.fetched_directly(client);
    }

    /// Buys and fetches at this machine, over the internet and past all programs there.
    fn fetched_directly(&self, client: &Machine) {
        let bought = self.sell();
        let before = self.between();
        let answer = client.run(|| run(self.fetching(&bought)).ok());
        self.assert_fetched(&answer);
        assert!(self.between() - before > self.size as u64, "the goods went another way than directly");
    }
}

/// Where a node on the internet's machine listens, and what it tells others.
fn addresses(v6: bool, port: u16) -> Vec<std::ffi::OsString> {
    let (any, public) =
        if v6 { ("/ip6/::", format!("/ip6/{PUBLIC_V6}")) } else { ("/ip4/0.0.0.0", format!("/ip4/{PUBLIC}")) };
    let mut args = Vec::new();
    for over in [format!("tcp/{port}"), format!("udp/{port}/quic-v1")] {
        args.extend(args!["--listen", format!("{any}/{over}"), "--external", format!("{public}/{over}")]);
    }
    args
}

#[test]
fn a_client_behind_a_router_fetches_from_a_public_seeder() {
    let Some(mut net) = Net::start("a_client_behind_a_router_fetches_from_a_public_seeder", false) else { return };
    let home = net.home("c", Nat::Random);
    net.public_seeder(false);
    let bought = net.sell();
    let answer = home.run(|| run(net.fetching(&bought)).ok());
    net.assert_fetched(&answer);
}

#[test]
fn a_seeder_behind_a_router_serves_a_public_client() {
    let Some(mut net) = Net::start("a_seeder_behind_a_router_serves_a_public_client", false) else { return };
    // Whichever port its router chooses: it is the seeder that dials.
    let home = net.home("s", Nat::Random);
    let client = net.public("c");
    net.seeder_at(&home);
    net.fetched_past_the_relay(&client);
}

#[test]
fn a_seeder_has_its_router_forward_ports_and_gives_them_back() {
    let test = "a_seeder_has_its_router_forward_ports_and_gives_them_back";
    let Some(mut net) = Net::start(test, false) else { return };
    let (home, router) = net.home_and_router("s", Nat::Random);
    let public = format!("/ip4/11.0.{}.2/", net.links);
    let Some(service) = PortService::start(&router, test, &net.network.path("router")) else { return };
    // A network of containers beside that of the router, which forwards nothing there.
    home.ip("link add containers type bridge");
    home.address("containers", &format!("{CONTAINERS}/16"));
    home.ip("link set containers up");
    let client = net.public("c");
    net.seeder_at(&home);
    let check = until("the forwarded ports", || {
        let check = net.network.of("seeder-1", args!["check"]).json();
        (check["port_mapping"] == "mapped" && check["addresses"].to_string().contains(&public)).then_some(check)
    });
    assert_eq!((&check["reachable"], &check["direct"], &check["public"]), (&true.into(), &true.into(), &true.into()));
    let says = |what: &str| {
        let findings = check["findings"].as_array().unwrap();
        text(findings.iter().find(|finding| finding["check"] == what).unwrap(), "says")
    };
    assert!(says("router").contains(&format!("forwards {public}")), "{check}");
    assert_eq!(service.forwarded(), 2, "TCP and QUIC");

    // Others are told nothing of a relay, so that whoever gets through does so by the forwarded port.
    until("no address at a relay", || {
        let seeders = net.network.of("manager", args!["seeders"]).ok();
        let seeders = seeders["seeders"].as_array().unwrap();
        let addresses = seeders.iter().find(|seeder| seeder["name"] == "seeder-1")?["addresses"].to_string();
        (addresses.contains(&public) && !addresses.contains("/p2p-circuit")).then_some(())
    });

    // When they go, the ports stay.
    let addresses = || net.network.of("seeder-1", args!["check"]).json()["addresses"].to_string();
    assert!(addresses().contains(CONTAINERS));
    home.ip("link del containers");
    until("the containers' network to be gone", || (!addresses().contains(CONTAINERS)).then_some(()));
    assert_eq!(service.forwarded(), 2);
    assert!(!service.was_asked_about(CONTAINERS), "a refusal would have cost it the ports");
    net.fetched_directly(&client);

    net.network.daemons.remove("seeder-1").unwrap().stop();
    assert_eq!(service.forwarded(), 0, "the router still forwards");
}

#[test]
fn a_seeder_whose_line_got_another_address_is_no_longer_told_at_the_old_one() {
    let test = "a_seeder_whose_line_got_another_address_is_no_longer_told_at_the_old_one";
    let Some(mut net) = Net::start(test, false) else { return };
    let (home, router) = net.home_and_router("s", Nat::Random);
    let client = net.public("c");
    let n = net.links - 1;
    let old = format!("/ip4/11.0.{n}.2/");
    router.rules(&format!(
        "table ip forwarding {{
           chain into {{
             type nat hook prerouting priority -100;
             iifname \"wan\" tcp dport 5001 dnat to 10.{n}.0.2
             iifname \"wan\" udp dport 5001 dnat to 10.{n}.0.2
           }}
         }}"
    ));
    net.seeder_at(&home);
    let told = || {
        let seeders = net.network.of("manager", args!["seeders"]).ok();
        let seeders = seeders["seeders"].as_array().unwrap();
        seeders.iter().find(|seeder| seeder["name"] == "seeder-1").map(|seeder| seeder["addresses"].to_string())
    };
    until("the forwarded ports", || told().filter(|told| told.contains(&old) && !told.contains("/p2p-circuit")));

    // The provider gives the line another address, and the new router forwards nothing.
    router.rules("delete table ip forwarding");
    router.ip(&format!("addr del 11.0.{n}.2/24 dev wan"));
    router.address("wan", &format!("11.0.{n}.9/24"));
    router.ip(&format!("route replace default via 11.0.{n}.1"));
    // Where the old address was, the provider has nobody any more; here the machine next to it remembers whose it was, and the
    // router what it had translated, so that connections would go on.
    router.rules(&format!(
        "table ip gone {{
           chain into {{
             type filter hook prerouting priority -300;
             iifname \"wan\" ip daddr 11.0.{n}.2 drop
           }}
         }}"
    ));
    until("a relay in place of the old address", || {
        told().filter(|told| !told.contains(&old) && told.contains("/p2p-circuit"))
    });
    let check = net.network.of("seeder-1", args!["check"]).json();
    assert_eq!((&check["reachable"], &check["direct"]), (&true.into(), &false.into()), "{check}");
    net.fetched_past_the_relay(&client);
}

#[test]
fn client_and_seeder_behind_routers_meet_by_hole_punching() {
    let Some(mut net) = Net::start("client_and_seeder_behind_routers_meet_by_hole_punching", false) else { return };
    let (home, other) = (net.home("s", Nat::Keeps), net.home("c", Nat::Keeps));
    net.seeder_at(&home);
    net.fetched_past_the_relay(&other);
}

#[test]
fn a_router_that_chooses_another_port_is_got_through_where_it_keeps_to_it() {
    let test = "a_router_that_chooses_another_port_is_got_through_where_it_keeps_to_it";
    let Some(mut net) = Net::start(test, false) else { return };
    let (home, other) = (net.home("s", Nat::Moves), net.home("c", Nat::Keeps));
    net.seeder_at(&home);
    net.fetched_past_the_relay(&other);
}

#[test]
fn on_a_local_network_a_seeder_is_found_that_nobody_knows_the_address_of() {
    let test = "on_a_local_network_a_seeder_is_found_that_nobody_knows_the_address_of";
    let Some(mut net) = Net::start(test, false) else { return };
    let (seeder, client) = (net.public("s"), net.public("c"));
    net.lab.cable((&seeder, "lan", "192.168.7.1/24"), (&client, "lan", "192.168.7.2/24"));
    net.seeder_at(&seeder);
    let bought = net.sell();
    // The internet is gone, and the seeder listens elsewhere than the ticket says.
    net.network.daemons.remove("manager").unwrap().kill();
    net.network.daemons.remove("seeder-1").unwrap().kill();
    let config = net.network.path("seeder-1/config.toml");
    let before = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, before.replace("/5001", "/5002").replace("lan = false", "lan = true")).unwrap();
    seeder.run(|| net.network.run_role("seeder-1"));
    for machine in [&seeder, &client] {
        machine.ip("link set wan down");
    }
    let answer = client.run(|| run(net.fetching(&bought)).ok());
    net.assert_fetched(&answer);
}

#[test]
fn where_no_hole_can_be_punched_the_client_names_the_relay_as_the_cause() {
    let test = "where_no_hole_can_be_punched_the_client_names_the_relay_as_the_cause";
    let Some(mut net) = Net::start(test, false) else { return };
    let (home, other) = (net.home("s", Nat::Random), net.home("c", Nat::Random));
    net.seeder_at(&home);
    net.relayed();
    // The router drops what it does not forward: who tests that hears nothing, and says so.
    until("a verdict", || {
        let tried = net.network.of("seeder-1", args!["check"]).json()["tried_by_peers"].take();
        tried.as_array().unwrap().iter().any(|tried| tried["why_not"].is_string()).then_some(())
    });
    let bought = net.sell();
    let mut fetch = net.fetching(&bought);
    fetch.extend(args!["--patience", "15s"]);
    let failed = other.run(|| run(fetch));
    let said = failed.refused(&["by way of a relay only", "carries 128 KiB in 120 s, no goods"]);
    assert_eq!(failed.json()["error"]["cause"], "relayed-only", "{said}");

    // What the seeder's operator is told: nobody dials it, and it is reached all the same.
    let check = net.network.of("seeder-1", args!["check"]).ok();
    assert_eq!((&check["reachable"], &check["direct"]), (&true.into(), &false.into()), "{check}");
    assert!(text(&check, "advice").contains("hole punching"), "{check}");
    let findings = check["findings"].as_array().unwrap();
    let relay = findings.iter().find(|finding| finding["check"] == "relay").unwrap();
    assert_eq!(relay["good"], true, "{check}");
}

#[test]
fn a_machine_without_a_network_says_so_and_when_it_tries_again() {
    let Some(mut net) = Net::start("a_machine_without_a_network_says_so", false) else { return };
    let client = net.public("c");
    net.public_seeder(false);
    let bought = net.sell();
    let mut fetch = bought.fetching(&net.network.path("under-way"));
    fetch.extend(args!["--progress", "--limit", "100kB", "--patience", "8s"]);
    let mut under_way = client.run(|| Job::start(fetch));
    under_way.says("\"percent\":");
    client.ip("addr flush dev wan");
    // Its streams only fall silent.
    let ended = under_way.finish();
    assert_eq!(ended.json()["error"]["cause"], "network-unreachable", "{}", ended.stderr);
    assert!(ended.stderr.contains("\"cause\":\"network-unreachable\""), "{}", ended.stderr);
    let mut fetch = bought.fetching(&net.network.path("elsewhere"));
    fetch.extend(args!["--progress", "--patience", "8s"]);
    let ended = client.run(|| run(fetch));
    assert_eq!(ended.json()["error"]["cause"], "network-unreachable", "{}", ended.stderr);
    let told = ended.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let told: Vec<Value> = told.filter_map(|line| line.get("stalled").cloned()).collect();
    let times: Vec<u64> = told.iter().filter_map(|stall| stall["next_try"].as_u64()).collect();
    assert!(told.iter().all(|stall| stall["cause"] == "network-unreachable"), "{}", ended.stderr);
    assert_eq!(times.len(), told.len(), "a line without a time: {}", ended.stderr);
    // Each line says something new, for as long as it lasts.
    assert!(times.len() >= 2 && times.windows(2).all(|pair| pair[0] != pair[1]), "{}", ended.stderr);
    assert!(!ended.stderr.contains("sendmsg"), "{}", ended.stderr);
}

#[test]
fn everything_works_over_ipv6() {
    let Some(mut net) = Net::start("everything_works_over_ipv6", true) else { return };
    let client = net.public("c");
    // Nothing else is left to it.
    client.ip("-4 addr flush dev wan");
    net.public_seeder(true);
    let bought = net.sell();
    let answer = client.run(|| run(net.fetching(&bought)).ok());
    net.assert_fetched(&answer);
}

/// Fetches over a long line; gives the kibibytes a second, and what became of the packets from the seeder and to it.
fn fetched_from_afar(test: &str, loss_percent: u32) -> Option<(u128, [Carried; 2])> {
    let mut net = Net::start(test, false)?;
    net.size = FAR_SIZE;
    let (client, mut cable) = net.far_away(test, loss_percent)?;
    net.public_seeder(false);
    let bought = net.sell();
    // A lost packet makes one of them longer, nothing makes one shorter.
    for _ in 0..3 {
        let took = client.round_trip(&format!("{PUBLIC}:5001"));
        assert!(took.as_millis() >= u128::from(2 * FAR_MS), "a round trip took {} ms", took.as_millis());
    }
    let start = Instant::now();
    let answer = client.run(|| run(net.fetching(&bought)).ok());
    let rate = FAR_SIZE as u128 * 1000 / 1024 / start.elapsed().as_millis();
    net.assert_fetched(&answer);
    let counted = cable.counted();
    eprintln!(
        "{} MiB over {FAR_MS} ms and {loss_percent} % loss in each direction, from the start of the program to its end: {rate} \
         KiB/s; to the client {:?}, from it {:?}",
        FAR_SIZE >> 20,
        counted[0],
        counted[1]
    );
    // The goods did not come another way, and what was lost was lost by intention.
    assert!(counted[0].bytes > FAR_SIZE as u64, "{counted:?}");
    assert_eq!(counted[0].overflowed + counted[1].overflowed, 0, "{counted:?}");
    Some((rate, counted))
}

#[test]
fn a_slow_and_lossy_line_delivers_all_the_same() {
    // How fast that is depends on what the system does about losses.
    let Some((_, counted)) = fetched_from_afar("a_slow_and_lossy_line_delivers_all_the_same", 1) else { return };
    assert!(counted[0].lost > 0, "{counted:?}");
}

#[test]
fn a_long_line_is_not_left_idle() {
    let Some((rate, _)) = fetched_from_afar("a_long_line_is_not_left_idle", 0) else { return };
    // A quarter of what there is on a machine with other work; chunk by chunk it would be 320.
    assert!(rate > 500, "{rate} KiB/s");
}
