//! Tells the DHT which contents are here: what few others hold first, everything again before it is forgotten, and all of
//! it anew when this seeder's addresses change. A seeder that does not keep up with that is not found, and looks healthy
//! otherwise; so it is counted, and said.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use node::DhtError;
use protocol::Digest;
use protocol::api::provider_key;
use tokio::time::Instant;

use crate::context::Seeder;
use crate::upkeep::complete;

/// Announcements at once: each is a question to some twenty nodes.
const AT_ONCE: usize = 16;
/// A content that so many others announce can wait for those that fewer do.
const ENOUGH: usize = 2;
/// Finding that out takes this long at most.
const ASK: Duration = Duration::from_secs(2);
/// Announcements that found nobody are tried again after this time, at the latest; those that may have come too early to
/// be kept are repeated after it.
const AGAIN: Duration = Duration::from_secs(60);

/// What is announced, and since when it should have been: an entry for each content held.
#[derive(Default)]
struct Told {
    due: BTreeMap<Digest, Due>,
    announced: BTreeSet<Digest>,
}

#[derive(Clone, Copy)]
struct Due {
    at: Instant,
    /// Those who are told next may not have heard yet that this seeder is enrolled, and nothing says that they passed it
    /// over: it is soon told again.
    again: bool,
}

/// Announces complete contents until the seeder stops, those of earlier runs included.
pub(crate) async fn announce(seeder: Arc<Seeder>) -> Result<(), std::convert::Infallible> {
    let token = seeder.supervisor.token();
    let every = Duration::from_millis(seeder.config.announce_ms);
    let mut told = Told::default();
    let mut addresses = seeder.addresses();
    loop {
        // One who is leaving is not to be found any more.
        let held: BTreeSet<Digest> =
            if seeder.drain.is_leaving() { BTreeSet::new() } else { complete(&seeder).into_iter().collect() };
        for gone in told.keep_only(&held) {
            seeder.node.stop_providing(key(&seeder, &gone)).await;
        }
        // Others remember the addresses of the moment of announcing.
        let moved = std::mem::replace(&mut addresses, seeder.addresses()) != addresses;
        // Whoever was met since has heard of nothing yet.
        if seeder.acquaintances.take_new() || moved {
            told.all_due();
        }
        let round = round(&seeder, &mut told, every);
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = round => {}
        }
        report(&seeder, &told, every);
        let next = told.due.values().map(|due| due.at).min().unwrap_or_else(|| Instant::now() + AGAIN);
        let pause = next.saturating_duration_since(Instant::now()).clamp(AGAIN.min(every) / 4, AGAIN);
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = seeder.wake.announce.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

fn key(seeder: &Seeder, content: &Digest) -> [u8; 32] {
    *provider_key(&seeder.network.id, content).as_bytes()
}

/// Announces what is due: at once what few others hold, the rest after that.
async fn round(seeder: &Seeder, told: &mut Told, every: Duration) {
    let now = Instant::now();
    let due: Vec<Digest> = told.due.iter().filter(|(_, due)| due.at <= now).map(|(content, _)| *content).collect();
    let mut sorted = stream::iter(due).map(|content| first(seeder, content)).buffer_unordered(AT_ONCE);
    let mut later = Vec::new();
    while let Some((content, outcome)) = sorted.next().await {
        match outcome {
            Some(outcome) => told.take(content, outcome, every),
            None => later.push(content),
        }
    }
    let mut rest = stream::iter(later).map(|content| provide(seeder, content)).buffer_unordered(AT_ONCE);
    while let Some((content, outcome)) = rest.next().await {
        told.take(content, outcome, every);
    }
}

/// Announces the content if few others do.
async fn first(seeder: &Seeder, content: Digest) -> (Digest, Option<Result<(), DhtError>>) {
    let others = seeder.node.find_providers(key(seeder, &content), ENOUGH, ASK).await;
    if others.is_ok_and(|others| others.len() >= ENOUGH) {
        return (content, None);
    }
    let (content, outcome) = provide(seeder, content).await;
    (content, Some(outcome))
}

async fn provide(seeder: &Seeder, content: Digest) -> (Digest, Result<(), DhtError>) {
    let outcome = seeder.node.provide(key(seeder, &content)).await;
    if let Err(error) = &outcome {
        tracing::debug!(%content, %error, "content not announced yet");
    }
    (content, outcome)
}

/// Says how many announcements are late: by a third of the time between two of them.
fn report(seeder: &Seeder, told: &Told, every: Duration) {
    let late = told.late(every / 3);
    seeder.counts.announced.set(i64::try_from(told.announced.len()).unwrap_or(i64::MAX));
    seeder.counts.announcements_late.set(i64::try_from(late).unwrap_or(i64::MAX));
    let before = seeder.notes.announcing.get();
    if late == 0 {
        seeder.notes.announcing.clear();
        if before.is_some() {
            tracing::info!("announcements in the DHT have caught up");
        }
        return;
    }
    let text = format!("{late} of {} contents are announced late in the DHT", told.due.len());
    if before.is_none() {
        tracing::warn!("{text}; clients may not find this seeder by them");
    }
    seeder.notes.announcing.set(text);
}

impl Told {
    /// Forgets contents that are not held any more, and gives those that were announced; new ones are due at once.
    fn keep_only(&mut self, held: &BTreeSet<Digest>) -> Vec<Digest> {
        self.due.retain(|content, _| held.contains(content));
        let now = Instant::now();
        for content in held {
            self.due.entry(*content).or_insert(Due { at: now, again: true });
        }
        let gone: Vec<Digest> = self.announced.difference(held).copied().collect();
        self.announced.retain(|content| held.contains(content));
        gone
    }

    fn all_due(&mut self) {
        let now = Instant::now();
        for due in self.due.values_mut() {
            *due = Due { at: now.min(due.at), again: true };
        }
    }

    fn take(&mut self, content: Digest, outcome: Result<(), DhtError>, every: Duration) {
        // At most our own table has it now.
        if let Ok(()) = outcome {
            self.announced.insert(content);
            let again = self.due.get(&content).is_none_or(|due| due.again);
            let pause = if again { AGAIN.min(every) } else { every };
            self.due.insert(content, Due { at: Instant::now() + pause, again: false });
        }
    }

    fn late(&self, by: Duration) -> usize {
        let now = Instant::now();
        self.due.values().filter(|due| now.saturating_duration_since(due.at) > by).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_failed_or_moved_is_due_and_what_is_gone_is_taken_back() {
        let [a, b] = [1, 2].map(|n| Digest::from_bytes([n; 32]));
        let every = Duration::from_secs(100);
        let mut told = Told::default();
        assert!(told.keep_only(&[a, b].into()).is_empty());
        told.take(a, Ok(()), every);
        told.take(b, Err(DhtError::NoPeers), every);
        let due = |told: &Told| told.due.values().filter(|due| due.at <= Instant::now()).count();
        assert_eq!((due(&told), told.late(Duration::ZERO), told.late(every)), (1, 1, 0));
        told.all_due();
        assert_eq!(due(&told), 2);
        assert_eq!(told.keep_only(&BTreeSet::new()), [a]);
        assert!(told.due.is_empty() && told.announced.is_empty());
    }
}
