//! Addresses that others are told although nobody configured them: those that somebody got through to, and those that a
//! router says it forwards, which is no proof that anybody gets through. Both are in doubt from time to time: a router that
//! starts again may forward nothing any more, and whoever is reached by nobody would take itself for reached for ever.

use std::time::Duration;

use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use crate::reach::noes::Noes;

/// TCP and QUIC in both families, twice.
const AT_MOST: usize = 8;
/// What was tested is tested again after this time.
const AGAIN: Duration = Duration::from_secs(3600);

/// The newest is last.
#[derive(Debug, Default)]
pub(super) struct Confirmed(Vec<Known>);

#[derive(Debug)]
struct Known {
    address: Multiaddr,
    /// Others are told. What they are told no longer is tested again all the same.
    told: bool,
    /// Somebody got through, and since then nothing spoke against it.
    reached: bool,
    tested: Option<Instant>,
    noes: Noes,
}

impl Confirmed {
    /// Somebody got through. Gives another address where there are too many.
    pub(super) fn reached(&mut self, address: &Multiaddr, now: Instant) -> Option<Multiaddr> {
        self.0.retain(|known| known.address != *address);
        self.add(address, true, Some(now))
    }

    /// A router says that it forwards this one.
    pub(super) fn forwarded(&mut self, address: &Multiaddr) -> Option<Multiaddr> {
        if self.tells(address) {
            return None;
        }
        self.0.retain(|known| known.address != *address);
        self.add(address, false, None)
    }

    fn add(&mut self, address: &Multiaddr, reached: bool, tested: Option<Instant>) -> Option<Multiaddr> {
        self.0.push(Known { address: address.clone(), told: true, reached, tested, noes: Noes::default() });
        if self.0.len() <= AT_MOST {
            return None;
        }
        let useless = self.0.iter().position(|known| !known.told).unwrap_or(0);
        Some(self.0.remove(useless).address)
    }

    /// Somebody did not get through. True when others are not to be told any more.
    pub(super) fn not_reached(&mut self, address: &Multiaddr, peer: PeerId, now: Instant) -> bool {
        let Some(known) = self.0.iter_mut().find(|known| known.address == *address) else { return false };
        known.tested = Some(now);
        if !known.told {
            return false;
        }
        if !known.noes.add(peer) {
            return false;
        }
        (known.told, known.reached) = (false, false);
        true
    }

    /// Addresses that somebody is to try now.
    pub(super) fn in_doubt(&self, now: Instant) -> Vec<Multiaddr> {
        let in_doubt = |known: &&Known| {
            !known.noes.is_empty() || known.tested.is_none_or(|at| now.saturating_duration_since(at) >= AGAIN)
        };
        self.0.iter().filter(in_doubt).map(|known| known.address.clone()).collect()
    }

    pub(super) fn is_any_reached(&self) -> bool {
        self.0.iter().any(|known| known.reached)
    }

    /// Others are told this one, and all that there is to it is what a router says.
    pub(super) fn is_hearsay(&self, address: &Multiaddr) -> bool {
        self.0.iter().any(|known| known.address == *address && !known.reached)
    }

    pub(super) fn tells(&self, address: &Multiaddr) -> bool {
        self.told().any(|told| told == address)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Multiaddr> {
        self.0.iter().map(|known| &known.address)
    }

    pub(super) fn told(&self) -> impl Iterator<Item = &Multiaddr> {
        self.0.iter().filter(|known| known.told).map(|known| &known.address)
    }

    /// Gives those that were known until now.
    pub(super) fn forget(&mut self, is_gone: impl Fn(&Multiaddr) -> bool) -> Vec<Multiaddr> {
        self.0.extract_if(.., |known| is_gone(&known.address)).map(|known| known.address).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::reach::noes::{NOES, NOES_OF_ONE};

    fn at(n: usize) -> Multiaddr {
        format!("/ip4/198.51.100.{n}/tcp/4602").parse().unwrap()
    }

    #[test]
    fn what_a_router_says_is_told_and_in_doubt_until_somebody_gets_through() {
        let (mut confirmed, now) = (Confirmed::default(), Instant::now());
        assert_eq!(confirmed.forwarded(&at(1)), None);
        assert!(confirmed.tells(&at(1)) && confirmed.is_hearsay(&at(1)) && !confirmed.is_any_reached());
        assert_eq!(confirmed.in_doubt(now), [at(1)]);
        assert_eq!(confirmed.reached(&at(1), now), None);
        assert!(confirmed.tells(&at(1)) && !confirmed.is_hearsay(&at(1)) && confirmed.is_any_reached());
        assert!(confirmed.in_doubt(now).is_empty());
        // That it says so again changes nothing.
        assert_eq!(confirmed.forwarded(&at(1)), None);
        assert!(!confirmed.is_hearsay(&at(1)) && confirmed.in_doubt(now).is_empty());
    }

    #[test]
    fn an_hour_later_it_is_in_doubt_and_where_two_do_not_get_through_it_is_told_no_longer() {
        let (mut confirmed, peers) = (Confirmed::default(), [(); 2].map(|()| PeerId::random()));
        let mut now = Instant::now();
        confirmed.reached(&at(1), now);
        confirmed.reached(&at(2), now);
        now += AGAIN;
        assert_eq!(confirmed.in_doubt(now), [at(1), at(2)]);
        confirmed.reached(&at(2), now);
        assert!(!confirmed.not_reached(&at(1), peers[0], now));
        assert_eq!(confirmed.in_doubt(now), [at(1)], "another one is to try at once");
        // Whoever gets through speaks for it.
        confirmed.reached(&at(1), now);
        assert!(confirmed.in_doubt(now).is_empty());
        assert!(!confirmed.not_reached(&at(1), peers[0], now), "it begins anew");
        assert!(confirmed.not_reached(&at(1), peers[1], now));
        assert_eq!(confirmed.told().collect::<Vec<_>>(), [&at(2)]);
        assert!(confirmed.is_any_reached());
        // It is tried again all the same, one in an hour, and told again when somebody gets through.
        assert!(confirmed.in_doubt(now).is_empty());
        now += AGAIN;
        assert!(!confirmed.not_reached(&at(1), peers[0], now));
        assert_eq!(confirmed.in_doubt(now), [at(2)]);
        confirmed.reached(&at(1), now);
        assert!(confirmed.tells(&at(1)) && !confirmed.is_hearsay(&at(1)));
        assert_eq!(confirmed.forget(|_| true), [at(2), at(1)]);
        assert!(!confirmed.not_reached(&at(1), peers[0], now), "it is not known");
    }

    #[test]
    fn one_that_is_alone_has_to_say_so_more_often() {
        let (mut confirmed, peer, now) = (Confirmed::default(), PeerId::random(), Instant::now());
        confirmed.forwarded(&at(1));
        for _ in 1..NOES_OF_ONE {
            assert!(!confirmed.not_reached(&at(1), peer, now));
            assert_eq!(confirmed.in_doubt(now), [at(1)]);
        }
        assert!(confirmed.not_reached(&at(1), peer, now));
        assert!(confirmed.in_doubt(now).is_empty() && !confirmed.tells(&at(1)));
        // The router says it of the next search.
        confirmed.forwarded(&at(1));
        assert!(confirmed.tells(&at(1)) && confirmed.is_hearsay(&at(1)));
        assert_eq!(confirmed.in_doubt(now), [at(1)]);
    }

    #[test]
    fn where_there_are_too_many_those_go_first_that_nobody_is_told() {
        let (mut confirmed, now) = (Confirmed::default(), Instant::now());
        for n in 0..AT_MOST {
            assert_eq!(confirmed.reached(&at(n), now), None);
        }
        for _ in 0..NOES {
            confirmed.not_reached(&at(3), PeerId::random(), now);
        }
        assert_eq!(confirmed.reached(&at(100), now), Some(at(3)));
        assert_eq!(confirmed.reached(&at(101), now), Some(at(0)));
        assert_eq!(confirmed.told().count(), AT_MOST);
    }
}
