//! What every service and chore of the manager shares, made once at the start. There is one of it; nothing in it is
//! replaced while the manager runs except the key set and the addresses.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use delivery::ContentStore;
use node::{CounterBy, NodeHandle};
use protocol::clock::ClockState;
use protocol::trust::{Heartbeat, Invitation, JoinLine, Trust};
use protocol::{Address, NetworkId, PeerAddrs, PeerId, Refusal, RefusalCode, Signed};
use store::Db;

use crate::archive::Archive;
use crate::audit_fetch::Audits;
use crate::catalogue::Catalogue;
use crate::config::Config;
use crate::demand::Demand;
use crate::keys::ManagerKeys;
use crate::placement::Placements;
use crate::receipts::Telling;
use crate::registry::Registry;
use crate::revocations::Revocations;
use crate::transactions::announcing::Announcing;
use crate::transactions::watch::Held;
use crate::workers::Workers;

/// Unix milliseconds by this machine's clock.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// The manager's shared state.
pub(crate) struct Context {
    /// All tables.
    pub(crate) db: Db,
    /// The network's private keys.
    pub(crate) keys: ManagerKeys,
    /// The network host.
    pub(crate) node: NodeHandle,
    /// The manager's directory.
    pub(crate) dir: PathBuf,
    /// The origin's content, where publications are written.
    pub(crate) content: ContentStore,
    /// As loaded at the start.
    pub(crate) config: Config,
    /// What moved out of the tables.
    pub(crate) archive: Archive,
    /// Products.
    pub(crate) catalogue: Catalogue,
    /// Merchants and seeders.
    pub(crate) registry: Registry,
    /// What is void.
    pub(crate) revocations: Revocations,
    /// Copies of content at seeders.
    pub(crate) placements: Placements,
    /// How much each content is asked for.
    pub(crate) demand: Demand,
    /// Seeders to be looked at.
    pub(crate) audits: Audits,
    /// Counts up each time that the manager came back from a backup.
    pub(crate) restore: u64,
    /// When it ran again after the newest of these, as its clock was then; see [`Context::came_back`]. Unix milliseconds.
    pub(crate) restored_at: Option<u64>,
    /// Does it know what it had revoked before that? See [`crate::recovery`].
    pub(crate) recalled: AtomicBool,
    /// This manager.
    pub(crate) peer: PeerId,
    /// Unix milliseconds of the start, as the clock was then.
    pub(crate) started_at: u64,
    /// The same by a clock that nobody sets.
    pub(crate) started: Instant,
    /// Marks that everybody was told a moment ago.
    pub(crate) marks: Telling,
    /// What is to be revoked.
    pub(crate) announcing: Announcing,
    /// Why nothing was done that only time does, at the last look.
    pub(crate) held: Mutex<Option<Held>>,
    /// What seeders said of this machine's clock then.
    pub(crate) clock: Mutex<ClockState>,
    /// Refusals by service and code.
    pub(crate) refusals: CounterBy<2>,
    /// The last heartbeat that was signed.
    pub(crate) last_beat: Mutex<Option<Signed<Heartbeat>>>,
    /// Where reservations and releases are formed.
    pub(crate) workers: Workers,
    /// Held by the publication under way.
    pub(crate) publishing: tokio::sync::Mutex<()>,
    pub(crate) trust: RwLock<Arc<Trust>>,
    pub(crate) addresses: RwLock<Vec<Address>>,
}

/// A shop that was refused for the clock asks again after this time, milliseconds: somebody has to set it.
const CLOCK_AGAIN_MS: u64 = 30_000;

impl Context {
    /// The network's keys as they stand now.
    pub(crate) fn trust(&self) -> Arc<Trust> {
        Arc::clone(&self.trust.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The network.
    pub(crate) fn network(&self) -> NetworkId {
        self.trust().network()
    }

    /// Milliseconds since the start.
    pub(crate) fn running_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Why this machine's clock, which shows `now`, is not to be gone by, if so.
    pub(crate) fn clock_trouble(&self, now: u64) -> Option<Held> {
        match self.registry.clocks.state(now, self.config.clock_grace_ms) {
            ClockState::Ahead(by) => Some(Held::Ahead(by)),
            // A manager that has just started waits for receipts, not for its clock.
            _ => self.held.lock().unwrap_or_else(PoisonError::into_inner).filter(|held| *held != Held::Started),
        }
    }

    /// Why this manager sells nothing, for its operator: its clock, at the last look, is ahead of most seeders'.
    pub(crate) fn clock_stops_sales(&self) -> Option<String> {
        let by = self.clock_ahead()?;
        Some(format!("{}: they would refuse its tickets; set the clock", Held::Ahead(by)))
    }

    /// The same of what it closes, gives back and lets expire.
    pub(crate) fn clock_stops_closing(&self) -> Option<String> {
        let held = self.clock_trouble(now_ms())?;
        Some(format!("{held}: nothing is closed, given back or expired for now"))
    }

    /// # Errors
    /// `overloaded` while the clock is ahead of most seeders', who would refuse each ticket as one that has not begun.
    pub(crate) fn clock_lets_sell(&self) -> Result<(), Refusal> {
        let Some(by) = self.clock_ahead() else { return Ok(()) };
        // It is told to shops and buyers.
        let clock = ClockState::Ahead(by);
        let why =
            format!("the manager's clock is {clock} of its seeders', who would refuse the ticket: it has to be set");
        Err(Refusal::new(RefusalCode::Overloaded, why).retry_after(CLOCK_AGAIN_MS))
    }

    /// # Errors
    /// `overloaded` while the clock is so far behind most seeders' that leases of `lease_ms` are over for them, and for
    /// buyers, when they are signed.
    pub(crate) fn clock_lets_lease(&self, lease_ms: u64) -> Result<(), Refusal> {
        let clock = *self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        match clock {
            ClockState::Behind(by) if by >= lease_ms.saturating_add(self.config.clock_grace_ms) => {
                let why = format!(
                    "the manager's clock is {clock} its seeders', for whom the ticket is over: it has to be set"
                );
                Err(Refusal::new(RefusalCode::Overloaded, why).retry_after(CLOCK_AGAIN_MS))
            }
            _ => Ok(()),
        }
    }

    /// By how many milliseconds the clock is ahead of most seeders', if it is.
    pub(crate) fn clock_ahead(&self) -> Option<u64> {
        match *self.held.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(Held::Ahead(by)) => Some(by),
            _ => None,
        }
    }

    /// When this manager ran again after its newest restore, unix milliseconds by a clock that shows `now`.
    pub(crate) fn came_back(&self, now: u64) -> Option<u64> {
        self.restored_at.map(|at| came_back(at, now, self.running_ms(), self.config.clock_grace_ms))
    }

    /// The same, where it is no longer ago than what was forgotten is waited for: sales from before it may be known better by
    /// others.
    pub(crate) fn forgetful_before(&self, now: u64) -> Option<u64> {
        self.came_back(now).filter(|at| now < at.saturating_add(self.config.close_grace_ms))
    }

    /// Where this manager can be reached: the configured external addresses, else those it listens on.
    pub(crate) fn own_addrs(&self) -> PeerAddrs {
        let addresses = match self.config.external.as_slice() {
            [] => self.addresses.read().unwrap_or_else(PoisonError::into_inner).clone(),
            external => external.to_vec(),
        };
        PeerAddrs::new(self.peer, addresses)
    }

    /// The line by which anybody joins the network; it carries no invitation.
    pub(crate) fn join_line(&self) -> JoinLine {
        JoinLine { root: self.trust().root(), managers: vec![self.own_addrs()], invitation: None }
    }

    /// The same with an invitation.
    pub(crate) fn invitation_line(&self, invitation: Invitation) -> JoinLine {
        JoinLine { invitation: Some(invitation), ..self.join_line() }
    }

    /// Asks the system again which addresses this machine has; a stopped node leaves them as they were.
    pub(crate) async fn refresh_addresses(&self) {
        if let Ok(addresses) = self.node.listen_addresses().await
            && !addresses.is_empty()
        {
            *self.addresses.write().unwrap_or_else(PoisonError::into_inner) = addresses;
        }
    }
}

/// It was before the start. A clock that was ahead then, and was set right since, gave a time that is still to come.
fn came_back(noted: u64, now: u64, running_ms: u64, grace_ms: u64) -> u64 {
    let started = now.saturating_sub(running_ms);
    if noted > started.saturating_add(grace_ms) { started } else { noted }
}

#[cfg(test)]
mod tests {
    use super::came_back;

    #[test]
    fn a_restore_is_never_later_than_the_start_by_the_clock_as_it_is_now() {
        const YEAR: u64 = 365 * 86_400_000;
        assert_eq!(came_back(50 * YEAR, 50 * YEAR + 1000, 1000, 10), 50 * YEAR);
        assert_eq!(came_back(49 * YEAR, 50 * YEAR, 1000, 10), 49 * YEAR);
        // Noted by a clock that was a year ahead: the same also once that year is over.
        for later in [5000, YEAR, 2 * YEAR] {
            assert_eq!(came_back(51 * YEAR, 50 * YEAR + later, later, 10), 50 * YEAR, "{later}");
        }
    }
}
