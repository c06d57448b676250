//! Can others reach this seeder, and if not, what is to be done? One that nobody reaches looks healthy from inside, and
//! earns nothing.

use std::sync::Arc;
use std::time::Duration;

use node::{PortMapping, Reach, Reachability, Tried};
use protocol::api::{MeshRequest, MeshResponse};
use protocol::{Address, PeerAddrs};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::context::Seeder;
use crate::manager::AskError;

/// What peers found counts as much as what the manager finds for so long.
const FRESH: Duration = Duration::from_secs(120);
/// Addresses change several at a time: they are told when nothing has changed for so long.
const SETTLES: Duration = Duration::from_millis(250);

/// The addresses to tell others: those that are configured, else what the node knows of itself by now. No more than others
/// take: a report with more of them is refused, and a machine with many networks has more.
pub(crate) fn addresses(seeder: &Seeder) -> Vec<Address> {
    let all = match seeder.config.external.as_slice() {
        [] => useful_first(&seeder.node.reach()),
        external => external.to_vec(),
    };
    PeerAddrs::new(seeder.peer, all).addrs
}

/// As the node tells them, but of those that are only listened on the public ones first, and last those of the range that
/// container networks are made in: where there are too many, they lead nobody here.
fn useful_first(reach: &Reach) -> Vec<Address> {
    let mut all = reach.announced();
    all.sort_by_key(|address| {
        let listened_on = reach.listening.contains(address) && !reach.external.contains(address);
        u8::from(listened_on && !is_public(address)) + u8::from(listened_on && is_container_network(address))
    });
    all
}

/// 172.16.0.0/12, which is not seldom a local network's, but most often Docker's.
fn is_container_network(address: &Address) -> bool {
    let host = address.as_str().strip_prefix("/ip4/").and_then(|rest| rest.split('/').next());
    let octets = host.and_then(|host| host.parse::<std::net::Ipv4Addr>().ok()).map(|ip| ip.octets());
    matches!(octets, Some([172, 16..=31, ..]))
}

/// Tells the manager, the DHT and other seeders when the addresses change.
pub(crate) async fn follow(seeder: Arc<Seeder>) -> Result<(), std::convert::Infallible> {
    let token = seeder.supervisor.token();
    let mut changes = seeder.node.reach_changes();
    loop {
        let settled = async {
            changes.changed().await?;
            while let Ok(changed) = tokio::time::timeout(SETTLES, changes.changed()).await {
                changed?;
            }
            Ok::<_, tokio::sync::watch::error::RecvError>(())
        };
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            settled = settled => if settled.is_err() {
                // The node has stopped.
                return Ok(());
            },
        }
        let now = addresses(&seeder);
        if now != seeder.addresses() && !now.is_empty() {
            tracing::info!(addresses = ?now, "others are told new addresses");
            seeder.set_addresses(now);
            seeder.wake.sync.notify_one();
            seeder.wake.announce.notify_one();
            seeder.acquaintances.has_moved();
        }
    }
}

/// One thing that was looked at.
struct Finding {
    check: &'static str,
    /// `None` where it is neither good nor bad.
    good: Option<bool>,
    says: String,
    todo: Option<&'static str>,
}

/// Addresses that the manager dialled, each with why nobody answered there.
type Dialled = Vec<(Address, Option<String>)>;

/// Has the manager dial the addresses of the last report, and adds what the node knows itself.
pub(crate) async fn check(seeder: &Seeder) -> Value {
    let asked = seeder.manager.ask(&MeshRequest::DialBack).await;
    // Not for now: for good.
    let refused = matches!(&asked, Err(AskError::Refused(refusal)) if refusal.retry_after_ms == 0);
    let dialled = match asked {
        Ok(MeshResponse::Reach(tried)) => Ok(tried),
        Ok(_) => Err("it answered something else; upgrade the older of the two".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let (reach, now) = (seeder.node.reach(), Instant::now());
    let all_tried = reach.tried.clone();
    let reach = as_of_now(reach, &dialled, now);
    let findings = findings(&dialled, &reach, now);
    let tried = dialled.as_ref().map(Vec::as_slice).unwrap_or_default();
    let reached: Vec<&Address> = tried.iter().filter(|(_, why)| why.is_none()).map(|(address, _)| address).collect();
    let trials = all_tried.iter().map(|tried| {
        let age_ms = u64::try_from(now.saturating_duration_since(tried.at).as_millis()).unwrap_or(u64::MAX);
        json!({ "address": tried.address, "why_not": tried.why_not, "age_ms": age_ms })
    });
    json!({
        "reachable": !reached.is_empty() || peers_got_through(&reach),
        "public": reached.iter().any(|address| is_public(address)),
        "direct": reached.iter().any(|address| !is_relayed(address)) || peers_got_through(&reach),
        "addresses": tried
            .iter()
            .map(|(address, why)| json!({ "address": address, "reached": why.is_none(), "why_not": why }))
            .collect::<Vec<_>>(),
        "manager_away": dialled.as_ref().err(),
        "peers": by_peers(&dialled, &reach).as_str(),
        "tried_by_peers": trials.collect::<Vec<_>>(),
        "port_mapping": port_mapping(&reach.port_mapping).0,
        "relays": reach
            .slots
            .iter()
            .map(|slot| json!({ "relay": slot.relay, "addresses": slot.addresses, "trouble": slot.trouble }))
            .collect::<Vec<_>>(),
        "relays_for_others": reach.relays,
        "findings": findings
            .iter()
            .map(|finding| {
                json!({ "check": finding.check, "good": finding.good, "says": finding.says, "todo": finding.todo })
            })
            .collect::<Vec<_>>(),
        "advice": match &dialled {
            Err(_) if refused => REFUSED,
            Err(_) => manager_away(&reach),
            Ok(tried) => advice(tried, &reached, &reach),
        },
    })
}

/// What peers found, which may be an hour ago. So what the manager finds now speaks against a failure of theirs.
fn by_peers(dialled: &Result<Dialled, String>, reach: &Reach) -> Reachability {
    match reach.reachability {
        Reachability::Private if manager_gets_through(dialled) => Reachability::Unknown,
        reachability => reachability,
    }
}

/// By an address that is no relay's.
fn manager_gets_through(dialled: &Result<Dialled, String>) -> bool {
    let through = |(address, why): &(Address, Option<String>)| why.is_none() && !is_relayed(address);
    dialled.as_ref().is_ok_and(|tried| tried.iter().any(through))
}

/// For people, since the newest of these trials.
fn ago<'a>(trials: impl Iterator<Item = &'a Tried>, now: Instant) -> String {
    let newest = trials.map(|tried| tried.at).max().unwrap_or(now);
    match now.saturating_duration_since(newest).as_secs() {
        seconds @ 0..120 => format!("{seconds} s ago"),
        seconds @ 120..7200 => format!("{} min ago", seconds / 60),
        seconds => format!("{} h ago", seconds / 3600),
    }
}

/// Without what was true once: that peers got through to an address which is not the seeder's own any more, or at which
/// the manager does not get through now.
fn as_of_now(mut reach: Reach, dialled: &Result<Dialled, String>, now: Instant) -> Reach {
    let external = std::mem::take(&mut reach.external);
    let refuted = |tried: &Tried| {
        let failed = |(address, why): &(Address, Option<String>)| *address == tried.address && why.is_some();
        let old = now.saturating_duration_since(tried.at) > FRESH;
        old && dialled.as_ref().is_ok_and(|dialled| dialled.iter().any(failed))
    };
    reach.tried.retain(|tried| tried.why_not.is_some() || (external.contains(&tried.address) && !refuted(tried)));
    Reach { external, ..reach }
}

/// That an address is configured, or forwarded by the router, does not show that anybody gets through to it.
fn peers_got_through(reach: &Reach) -> bool {
    reach.tried.iter().any(|tried| tried.why_not.is_none())
}

fn findings(dialled: &Result<Dialled, String>, reach: &Reach, now: Instant) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |check, good, says: String, todo| findings.push(Finding { check, good, says, todo });
    match dialled {
        Err(why) => find("manager", None, format!("it could not be asked to dial this seeder: {why}"), None),
        Ok(tried) => {
            let direct: Vec<_> = tried.iter().filter(|(address, _)| !is_relayed(address)).collect();
            let through = direct.iter().filter(|(_, why)| why.is_none()).count();
            let says = format!("the manager gets through to {through} of {} direct addresses", direct.len());
            let todo =
                "open the listening ports (TCP, and UDP for QUIC) in the firewall, or forward them at the router";
            find("manager", Some(through > 0), says, (through == 0).then_some(todo));
        }
    }
    match reach.reachability {
        Reachability::Unknown => find("peers", None, "no peer has tried to get through yet".to_owned(), None),
        Reachability::Public => {
            let through = || reach.tried.iter().filter(|tried| tried.why_not.is_none());
            let at: Vec<&str> = through().map(|tried| tried.address.as_str()).collect();
            if at.is_empty() {
                let told: Vec<&str> = reach.external.iter().map(Address::as_str).collect();
                let says = format!("no peer is known to get through; others are told {}", told.join(" "));
                find("peers", None, says, None);
            } else {
                let says = format!("peers got through to {} ({})", at.join(" "), ago(through(), now));
                find("peers", Some(true), says, None);
            }
        }
        Reachability::Private => {
            let failed = || reach.tried.iter().filter(|tried| tried.why_not.is_some());
            let (count, ago) = (failed().count(), ago(failed(), now));
            let says = format!("peers tried {count} addresses and got through to none ({ago})");
            match by_peers(dialled, reach) {
                Reachability::Unknown => {
                    find(
                        "peers",
                        None,
                        format!("{says}; they try again within the hour, and the manager gets through now"),
                        None,
                    );
                }
                _ => find("peers", Some(false), says, None),
            }
        }
    }
    let own: Vec<&Address> = reach.listening.iter().filter(|address| is_public(address)).collect();
    match own.first() {
        Some(address) => find("translation", Some(true), format!("this machine has a public address: {address}"), None),
        None => {
            let todo = "forward the listening ports at the router and set external, unless the router does it (UPnP)";
            let says =
                "this machine has private addresses only: a router translates them, or it is not on the internet";
            find("translation", Some(false), says.to_owned(), (reach.external.is_empty()).then_some(todo));
        }
    }
    let (_, good, says, todo) = port_mapping(&reach.port_mapping);
    find("router", good, says, todo);
    let held: Vec<String> =
        reach.slots.iter().filter(|slot| !slot.addresses.is_empty()).map(|slot| slot.relay.to_string()).collect();
    let trouble = reach.slots.iter().find_map(|slot| slot.trouble.as_deref());
    let direct = peers_got_through(reach);
    match (held.as_slice(), trouble) {
        ([], _) if direct => find("relay", None, "not needed: others get through directly".to_owned(), None),
        ([], Some(trouble)) => find("relay", Some(false), format!("no slot at a relay: {trouble}"), None),
        ([], None) => {
            let todo =
                "ask the network's operator for a relay ([relay] enabled = true at the manager or a public seeder)";
            find("relay", Some(false), "no relay is known".to_owned(), Some(todo));
        }
        (held, _) => {
            let says = format!(
                "reached through {}; clients then dial it directly, where their router and this one let them",
                held.join(", ")
            );
            find("relay", Some(true), says, None);
        }
    }
    findings
}

/// Name, whether that is good, a line, and what to do.
fn port_mapping(mapping: &PortMapping) -> (&'static str, Option<bool>, String, Option<&'static str>) {
    match mapping {
        PortMapping::Off => {
            let says = "the router is not asked to forward ports (upnp = false, or no address that it translates)";
            ("off", None, says.to_owned(), None)
        }
        PortMapping::Searching => {
            ("searching", None, "looking for a router that forwards ports (UPnP)".to_owned(), None)
        }
        PortMapping::Refused => (
            "refused",
            Some(false),
            "the router answers to UPnP and forwards nothing".to_owned(),
            Some("allow UPnP at the router; where another machine has the same port, listen on another one here"),
        ),
        PortMapping::NoGateway => ("no-gateway", None, "no router answers to UPnP".to_owned(), None),
        PortMapping::NotPublic => (
            "not-public",
            Some(false),
            "the router has no public address itself: the provider translates as well".to_owned(),
            Some("ask the provider for a public address, or IPv6"),
        ),
        PortMapping::Mapped(addresses) => {
            let at: Vec<&str> = addresses.iter().map(Address::as_str).collect();
            ("mapped", Some(true), format!("the router forwards {}", at.join(" ")), None)
        }
    }
}

/// What to do where the manager will have nothing to do with this seeder.
const REFUSED: &str = "the manager answers and refuses this seeder: why is said above, and comes first; clients are not sent \
                       here before that is put right with its operator";

/// What to do where nobody outside tried.
fn manager_away(reach: &Reach) -> &'static str {
    if peers_got_through(reach) {
        return "the manager did not answer, so it tried no address from outside; peers got through when they last tried: \
                check again when the manager is back";
    }
    "the manager did not answer, so no address was tried from outside, and no peer got through yet: check again when the \
     manager is back"
}

/// What to do, in a line.
fn advice(tried: &[(Address, Option<String>)], reached: &[&Address], reach: &Reach) -> &'static str {
    let direct = reached.iter().any(|address| !is_relayed(address)) || peers_got_through(reach);
    let relayed = reach.slots.iter().any(|slot| !slot.addresses.is_empty());
    if !direct && relayed {
        return "reached through a relay: clients get through wherever hole punching works; to be reached by all, forward \
                the listening ports at the router, and set external in config.toml to the public address";
    }
    if tried.is_empty() && !direct {
        return "this seeder tells no address that others could use: set external in config.toml, for example \
                [\"/ip4/203.0.113.7/tcp/4602\"], and start it again";
    }
    if !direct && !reach.external.is_empty() {
        return "nobody gets through to the addresses that others are told: see that external in config.toml is the public \
                address of this machine or its router, that the listening ports (TCP, and UDP for QUIC) are open in the \
                firewall, and that the router forwards them";
    }
    if !direct {
        return "nobody gets through: open the listening ports (TCP, and UDP for QUIC) in this machine's firewall, forward \
                them at the router, and set external in config.toml to the public address if it differs";
    }
    if !reached.is_empty() && !reached.iter().any(|address| is_public(address)) {
        return "the manager gets through, by an address of its own network only: set external in config.toml to the public \
                address for clients elsewhere";
    }
    // Those of the local network are for peers there; elsewhere nobody loses time over them.
    if tried.iter().any(|(address, why)| why.is_some() && is_public(address)) {
        return "others get through; the addresses that failed cost them time: take them out of listen or external, or open \
                their ports";
    }
    "nothing to do"
}

fn is_relayed(address: &Address) -> bool {
    address.as_str().contains("/p2p-circuit")
}

/// An address that means the same everywhere.
fn is_public(address: &Address) -> bool {
    let mut parts = address.as_str().split('/').skip(1);
    match (parts.next(), parts.next()) {
        (Some("ip4"), Some(host)) => host.parse::<std::net::Ipv4Addr>().is_ok_and(|ip| {
            // 100.64.0.0/10 lies behind a provider's translation (RFC 6598).
            let [a, b, ..] = ip.octets();
            let shared = a == 100 && (64..128).contains(&b);
            let no_host = ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast();
            !(ip.is_private() || ip.is_loopback() || ip.is_link_local() || no_host || shared)
        }),
        (Some("ip6"), Some(host)) => host.parse::<std::net::Ipv6Addr>().is_ok_and(|ip| {
            let no_host = ip.is_unspecified() || ip.is_multicast();
            !(ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local() || no_host)
        }),
        (Some("dns" | "dns4" | "dns6"), Some(_)) => true,
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_advice_fits_what_was_found() {
        let at = |text: &str| Address::new(text).unwrap();
        let (home, lan) = (at("/ip4/127.0.0.1/tcp/1"), at("/ip4/192.168.1.9/tcp/1"));
        let (open, v6) = (at("/ip4/203.0.113.7/tcp/1"), at("/ip6/fd00::1/tcp/1"));
        assert!(!is_public(&home) && !is_public(&lan) && !is_public(&v6) && is_public(&open));
        assert!(!is_public(&at("/ip4/100.100.0.1/tcp/1")) && is_public(&at("/dns4/seeder.example/tcp/1")));
        let no = || Some("timed out".to_owned());
        let mut reach = Reach::default();
        assert!(advice(&[], &[], &reach).contains("external"));
        assert!(advice(&[(open.clone(), no())], &[], &reach).contains("forward"));
        assert!(advice(&[(lan.clone(), None)], &[&lan], &reach).contains("public address"));
        let closed = at("/ip4/203.0.113.7/udp/1/quic-v1");
        assert!(advice(&[(open.clone(), None), (closed, no())], &[&open], &reach).contains("cost them time"));
        assert_eq!(advice(&[(open.clone(), None), (lan.clone(), no())], &[&open], &reach), "nothing to do");
        let relay = protocol::Keypair::from_seed(&[9; 32]).peer_id();
        let circuit = at(&format!("/ip4/203.0.113.7/tcp/1/p2p/{relay}/p2p-circuit"));
        reach.slots = vec![node::RelaySlot { relay, addresses: vec![circuit.clone()], trouble: None }];
        assert!(advice(&[(lan.clone(), no()), (circuit.clone(), None)], &[&circuit], &reach).contains("hole punching"));

        reach.listening = vec![lan.clone()];
        reach.reachability = Reachability::Private;
        let now = Instant::now();
        let found = findings(&Ok(vec![(lan, no()), (circuit, None)]), &reach, now);
        let verdicts: Vec<_> = found.iter().map(|finding| (finding.check, finding.good)).collect();
        let bad = Some(false);
        assert_eq!(
            verdicts,
            [("manager", bad), ("peers", bad), ("translation", bad), ("router", None), ("relay", Some(true))]
        );
        assert!(found.first().and_then(|finding| finding.todo).is_some_and(|todo| todo.contains("forward")));
        // An address that is configured and leads nowhere.
        let mut configured = Reach { reachability: Reachability::Public, ..Reach::default() };
        configured.external = vec![open.clone()];
        assert!(!peers_got_through(&configured));
        assert!(advice(&[(open.clone(), no())], &[], &configured).contains("external"));
        let found = findings(&Ok(vec![(open.clone(), no())]), &configured, now);
        let verdicts: Vec<_> = found.iter().map(|finding| (finding.check, finding.good)).collect();
        assert!(verdicts.contains(&("manager", bad)) && verdicts.contains(&("peers", None)), "{verdicts:?}");
        assert!(!manager_away(&configured).contains("peers get through"));
        configured.tried = vec![Tried { address: open.clone(), why_not: None, at: now }];
        assert!(peers_got_through(&configured));
        assert!(advice(&[(open.clone(), no())], &[], &configured).contains("cost them time"));

        assert!(manager_away(&reach).contains("did not answer"));
        let found = findings(&Err("away".to_owned()), &Reach::default(), now);
        assert!(found.iter().any(|finding| finding.check == "manager" && finding.says.contains("away")));
    }

    #[test]
    fn of_more_addresses_than_others_take_those_are_told_that_lead_here() {
        let at = |text: String| Address::new(&text).unwrap();
        let bridges = (17..27).map(|n| at(format!("/ip4/172.{n}.0.1/tcp/4602")));
        let lan = at("/ip4/192.168.1.9/tcp/4602".to_owned());
        let (v6, open) = (at("/ip6/2001:4860::9/tcp/4602".to_owned()), at("/ip4/203.0.113.7/tcp/4602".to_owned()));
        let relay = protocol::Keypair::from_seed(&[9; 32]).peer_id();
        let circuit = at(format!("/ip4/203.0.113.99/tcp/1/p2p/{relay}/p2p-circuit"));
        let reach = Reach {
            external: vec![open.clone()],
            listening: bridges.chain([lan.clone(), v6.clone()]).collect(),
            slots: vec![node::RelaySlot { relay, addresses: vec![circuit.clone()], trouble: None }],
            ..Reach::default()
        };
        let told = useful_first(&reach);
        assert_eq!(told.iter().take(4).collect::<Vec<_>>(), [&open, &circuit, &v6, &lan]);
        assert_eq!(told.len(), 14, "and then the bridges, as far as there is room");
        // What is configured or confirmed goes first, whatever it is.
        let inside = Reach { external: vec![at("/ip4/172.17.0.2/tcp/1".to_owned())], ..reach };
        assert_eq!(useful_first(&inside).first(), inside.external.first());
    }

    #[test]
    fn that_peers_got_through_long_ago_does_not_outweigh_that_nobody_does_now() {
        let (open, v6) = ("/ip4/203.0.113.7/tcp/1", "/ip6/2001:db8::1/tcp/1");
        let [open, v6] = [open, v6].map(|text| Address::new(text).unwrap());
        let at = Instant::now();
        let later = at + Duration::from_secs(9 * 3600);
        let through = |address: &Address| Tried { address: address.clone(), why_not: None, at };
        let reach = |external: &[&Address]| Reach {
            reachability: Reachability::Public,
            external: external.iter().map(|address| (*address).clone()).collect(),
            tried: vec![through(&open), through(&v6)],
            ..Reach::default()
        };
        let count = |external: &[&Address], dialled: Result<Dialled, String>, now| {
            let reach = as_of_now(reach(external), &dialled, now);
            assert_eq!(reach.external.len(), external.len());
            reach.tried.len()
        };
        let no = |address: &Address| Ok(vec![(address.clone(), Some("timed out".to_owned()))]);
        let both = [&open, &v6];
        assert_eq!(count(&both, no(&open), later), 1, "the manager was not given the other one");
        assert_eq!(count(&both, no(&open), at), 2, "it may be the manager's own trouble");
        assert_eq!(count(&both, Err("away".to_owned()), later), 2);
        assert_eq!(count(&[&v6], Err("away".to_owned()), later), 1, "not its own any more");
        assert_eq!(count(&[&open], no(&open), later), 0);
        let gone = as_of_now(reach(&[&open]), &no(&open), later);
        assert!(!peers_got_through(&gone) && advice(no(&open).as_ref().unwrap(), &[], &gone).contains("nobody gets"));
    }

    #[test]
    fn a_failure_of_peers_that_is_long_ago_is_not_told_beside_nothing_to_do() {
        let open = Address::new("/ip4/203.0.113.7/tcp/1").unwrap();
        let (at, why_not) = (Instant::now(), Some("timed out".to_owned()));
        let later = at + Duration::from_secs(3 * 3600 + 5);
        let reach = Reach {
            reachability: Reachability::Private,
            tried: vec![Tried { address: open.clone(), why_not: why_not.clone(), at }],
            ..Reach::default()
        };
        let peers = |dialled: &Result<Dialled, String>| {
            let found = findings(dialled, &reach, later).into_iter().find(|finding| finding.check == "peers").unwrap();
            assert!(found.says.contains("(3 h ago)"), "{}", found.says);
            (by_peers(dialled, &reach).as_str(), found.good)
        };
        let now = Ok(vec![(open.clone(), None)]);
        assert_eq!(peers(&now), ("unknown", None));
        assert_eq!(advice(now.as_ref().unwrap(), &[&open], &reach), "nothing to do");
        let none = Ok(vec![(open.clone(), why_not)]);
        assert_eq!(peers(&none), ("private", Some(false)));
        assert!(advice(none.as_ref().unwrap(), &[], &reach).contains("nobody gets through"));
        assert_eq!(peers(&Err("away".to_owned())), ("private", Some(false)));
    }
}
