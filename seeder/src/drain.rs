//! Leaving in order: what runs is finished, nobody new is taken in, the manager has the copies made elsewhere, and the
//! receipts are brought home. Until then the seeder stays, because its copies may be the last ones.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use node::{ControlError, ProgressSender};
use protocol::api::{Kept, SeederReport};
use protocol::{Digest, Refusal, RefusalCode};
use serde_json::{Value, json};
use store::StoreError;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::clock::jittered;
use crate::context::Seeder;
use crate::manager::AskError;
use crate::tables::{AccountKey, DUE};
use crate::{garbage, outbox, upkeep};

/// Between two looks at what is left.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The manager is asked at least this often, so that its next order does not wait for a regular report.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// A client that is turned away comes back after about this time, milliseconds: to find the seeder gone, or staying.
const COME_BACK_MS: u64 = 60_000;
/// A client whose stream broke is waited for so long: it notices within seconds, and comes back over another connection.
const BACK_WITHIN: Duration = Duration::from_secs(15);
/// A client whose streams bring nothing new is let in so often in a row. Each is over when the client says nothing for a
/// while; who comes again without end must not keep this seeder for it.
const IN_VAIN: u32 = 8;
/// Deliveries of which that is counted; each was paid for, and further ones are let in uncounted.
const COUNTED: usize = 65_536;
/// Contents that are named among those that may not go yet.
const SHOWN: usize = 32;

/// What is said of a leaving that ended before everything was done.
const CUT_SHORT: &str = "cut short";

/// How far the leaving is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not at all.
    #[default]
    Staying,
    /// On the way.
    Leaving,
    /// The process may end.
    Left,
}

/// The leaving of this seeder.
#[derive(Debug, Default)]
pub(crate) struct Drain {
    phase: watch::Sender<Phase>,
    /// Contents that do not count as held here any more.
    released: Mutex<BTreeSet<Digest>>,
    /// Deliveries whose stream broke on the way out, each until when its client is waited for.
    broken: Mutex<HashMap<AccountKey, Instant>>,
    /// Deliveries whose streams brought nothing new since it leaves, each with how many in a row.
    in_vain: Mutex<HashMap<AccountKey, u32>>,
}

impl Drain {
    pub(crate) fn is_leaving(&self) -> bool {
        *self.phase.borrow() != Phase::Staying
    }

    pub(crate) fn is_released(&self, content: &Digest) -> bool {
        self.released.lock().unwrap_or_else(PoisonError::into_inner).contains(content)
    }

    /// These do not count as held here any more, unless it was called off while the manager was asked.
    fn release(&self, contents: &HashSet<Digest>) {
        let mut released = self.released.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_leaving() {
            released.extend(contents);
        }
    }

    /// A stream of this delivery is over; with `brought` it brought something new. To be said before its place is free.
    pub(crate) fn ended(&self, key: AccountKey, brought: bool) {
        let mut in_vain = self.in_vain.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_leaving() {
            return;
        }
        if brought {
            in_vain.remove(&key);
        } else if in_vain.len() < COUNTED || in_vain.contains_key(&key) {
            *in_vain.entry(key).or_default() += 1;
        }
    }

    /// Did this delivery come for nothing too often?
    pub(crate) fn is_in_vain(&self, key: &AccountKey) -> bool {
        let in_vain = self.in_vain.lock().unwrap_or_else(PoisonError::into_inner);
        in_vain.get(key).is_some_and(|streams| *streams >= IN_VAIN)
    }

    /// The stream of this delivery broke, and did not end. To be said before its place is free.
    pub(crate) fn broke(&self, key: AccountKey, now: Instant) {
        if self.is_leaving() && !self.is_in_vain(&key) {
            let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
            broken.retain(|_, until| *until > now);
            broken.insert(key, now + BACK_WITHIN);
        }
    }

    /// The client of this delivery has a place.
    pub(crate) fn is_here(&self, key: &AccountKey) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// Deliveries that have a place, and those whose clients are waited for.
    fn deliveries(&self, with_place: impl FnOnce() -> u32, now: Instant) -> u32 {
        // As long as this is held, none goes from one to the other unseen.
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        let waited_for = broken.values().filter(|until| **until > now).count();
        with_place().saturating_add(u32::try_from(waited_for).unwrap_or(u32::MAX))
    }

    /// Returns when the process may end.
    pub(crate) async fn left(&self) {
        let mut phase = self.phase.subscribe();
        if phase.wait_for(|phase| *phase == Phase::Left).await.is_err() {
            std::future::pending().await
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match *self.phase.borrow() {
            Phase::Staying => "no",
            Phase::Leaving => "draining",
            Phase::Left => "drained",
        }
    }

    /// The no for new clients.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        let why = "this seeder is leaving the network";
        self.is_leaving().then(|| Refusal::new(RefusalCode::ShuttingDown, why).retry_after(jittered(COME_BACK_MS)))
    }
}

/// What is still to be done.
struct Left {
    deliveries: u32,
    contents: Vec<Digest>,
    receipts: u64,
}

impl Left {
    fn look(seeder: &Seeder) -> Result<Left, StoreError> {
        let waiting = outbox::state(&seeder.db)?.map_or(0, |state| (state.next - 1).saturating_sub(state.marked));
        let contents = upkeep::complete(seeder).into_iter().filter(|digest| !seeder.drain.is_released(digest));
        Ok(Left {
            deliveries: seeder.drain.deliveries(|| seeder.deliveries.load().0, Instant::now()),
            contents: contents.collect(),
            receipts: seeder.db.read(|txn| DUE.len(txn))?.saturating_add(waiting),
        })
    }

    fn is_nothing(&self) -> bool {
        self.deliveries == 0 && self.contents.is_empty() && self.receipts == 0
    }
}

/// For people: the first copy that may not go yet, and why.
fn waits_for(kept: &[Kept]) -> Option<String> {
    let first = kept.first()?;
    let Kept { manifest, copies, wanted, because } = first;
    let more = match kept.len() - 1 {
        0 => String::new(),
        more => format!("; and {more} more contents"),
    };
    Some(format!("content {manifest}: {copies} of {wanted} copies elsewhere, {}{more}", because.as_str()))
}

fn kept_json(kept: &Kept) -> Value {
    let Kept { manifest, copies, wanted, because } = kept;
    json!({ "manifest": manifest, "copies": copies, "wanted": wanted, "because": because.as_str() })
}

/// Stays after all. The report that this wakes says so to the manager, and so does each one that follows.
pub(crate) fn cancel(seeder: &Seeder) -> Value {
    seeder.drain.phase.send_replace(Phase::Staying);
    seeder.drain.released.lock().unwrap_or_else(PoisonError::into_inner).clear();
    seeder.drain.in_vain.lock().unwrap_or_else(PoisonError::into_inner).clear();
    seeder.wake.sync.notify_one();
    seeder.wake.announce.notify_one();
    tracing::info!("this seeder stays");
    json!({ "drain": seeder.drain.name() })
}

/// Leaves. With `patience_ms` it ends after that time whatever is left.
pub(crate) async fn run(
    seeder: &Arc<Seeder>,
    patience_ms: Option<u64>,
    progress: &ProgressSender,
) -> Result<Value, ControlError> {
    if seeder.drain.is_leaving() {
        return Err(ControlError::new("wrong-state", "this seeder is leaving already; --cancel lets it stay"));
    }
    seeder.drain.phase.send_replace(Phase::Leaving);
    tracing::info!("this seeder is leaving: no new deliveries, copies are handed over");
    seeder.wake.sync.notify_one();
    seeder.wake.announce.notify_one();
    let began = Instant::now();
    let pause = ASK_EVERY.min(Duration::from_millis(seeder.config.report_ms));
    let (mut asked, mut trouble, mut told) = (None::<Instant>, None::<String>, Value::Null);
    // Of very many contents those that may not go yet must not keep the others from being asked about.
    let mut next = 0;
    let mut kept: Vec<Kept> = Vec::new();
    loop {
        let looking = Arc::clone(seeder);
        let left = tokio::task::spawn_blocking(move || Left::look(&looking)).await;
        let left = match left {
            Ok(Ok(left)) => left,
            Ok(Err(error)) => return Err(ControlError::new("internal", error.to_string())),
            Err(error) => return Err(ControlError::new("internal", error.to_string())),
        };
        let patient = patience_ms.is_none_or(|ms| began.elapsed() < Duration::from_millis(ms));
        kept.retain(|kept| left.contents.contains(&kept.manifest));
        let facts = json!({
            "deliveries": left.deliveries,
            "contents": left.contents.len(),
            "receipts": left.receipts,
            "waits_for": waits_for(&kept),
            "kept": kept.iter().take(SHOWN).map(kept_json).collect::<Vec<_>>(),
            "trouble": trouble,
        });
        if left.is_nothing() || !patient {
            seeder.drain.phase.send_replace(Phase::Left);
            if left.is_nothing() {
                tracing::info!("this seeder has left");
            } else {
                tracing::warn!(left = %facts, "this seeder has left before everything was done");
            }
            let ended = if left.is_nothing() { seeder.drain.name() } else { CUT_SHORT };
            return Ok(json!({ "drain": ended, "complete": left.is_nothing(), "left": facts }));
        }
        if facts != told {
            progress.send(facts.clone()).await;
            told = facts;
        }
        if !left.contents.is_empty() && asked.is_none_or(|at| at.elapsed() >= pause) {
            asked = Some(Instant::now());
            let mut some = left.contents;
            next %= some.len();
            some.rotate_left(next);
            some.truncate(SeederReport::MAX_HELD);
            next += some.len();
            match garbage::ask(seeder, some, true, |released| seeder.drain.release(released)).await {
                Ok((_, rest)) => (trouble, kept) = (None, rest),
                Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::WrongState => {
                    cancel(seeder);
                    return Err(ControlError::new("wrong-state", refusal.detail));
                }
                // It may come back; the operator sees what is waited for.
                Err(error) => trouble = Some(error.to_string()),
            }
        }
        let mut phase = seeder.drain.phase.subscribe();
        tokio::select! {
            _ = phase.wait_for(|phase| *phase == Phase::Staying) => {
                // What was asked last may have come to the manager after the report that takes it back.
                seeder.wake.sync.notify_one();
                return Err(ControlError::new("cancelled", "this seeder stays after all"));
            }
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_whose_stream_broke_on_the_way_out_is_waited_for_until_it_is_back_and_not_for_ever() {
        let (drain, now) = (Drain::default(), Instant::now());
        let [one, two] = [[1; 52], [2; 52]];
        drain.broke(one, now);
        assert_eq!(drain.deliveries(|| 0, now), 0, "it stays anyway");
        drain.phase.send_replace(Phase::Leaving);
        drain.broke(one, now);
        drain.broke(two, now);
        drain.is_here(&two);
        assert_eq!(drain.deliveries(|| 1, now), 2);
        assert_eq!(drain.deliveries(|| 0, now + BACK_WITHIN), 0);
    }

    #[test]
    fn a_client_that_comes_for_nothing_again_and_again_is_not_waited_for_until_something_new_comes() {
        let (drain, now) = (Drain::default(), Instant::now());
        let [one, two] = [[1; 52], [2; 52]];
        (0..IN_VAIN).for_each(|_| drain.ended(one, false));
        assert!(!drain.is_in_vain(&one), "it stays anyway");
        drain.phase.send_replace(Phase::Leaving);
        (1..IN_VAIN).for_each(|_| drain.ended(one, false));
        assert!(!drain.is_in_vain(&one));
        drain.ended(one, true);
        (1..IN_VAIN).for_each(|_| drain.ended(one, false));
        assert!(!drain.is_in_vain(&one), "in a row");
        drain.ended(one, false);
        assert_eq!([drain.is_in_vain(&one), drain.is_in_vain(&two)], [true, false]);
        drain.broke(one, now);
        assert_eq!(drain.deliveries(|| 0, now), 0);
    }
}
