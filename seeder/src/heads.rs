//! What the manager's audit log was, by its own signed word: each heartbeat carries the log's newest entry. This seeder
//! keeps one of each day, so that the manager cannot change, shorten or lose what it logged without somebody being able to
//! show it; `willcall seeder heads` hands them to whoever checks an exported log.

use protocol::trust::{Heartbeat, Trust};
use protocol::{Signed, codec};
use serde_json::{Value, json};
use store::{Db, StoreError, WriteTransaction};

use crate::tables::HEADS;

/// Heartbeats kept: one a day for eleven years, of some 300 bytes each. Older ones go first.
const MAX_HEADS: u64 = 4096;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// Lines in one answer of the control socket.
const PAGE: usize = 1000;

/// Keeps what a heartbeat says of the log, in the place of an earlier one of the same day.
pub(crate) fn keep(
    txn: &WriteTransaction<'_>,
    heartbeat: &Heartbeat,
    signed: &Signed<Heartbeat>,
) -> Result<(), StoreError> {
    if heartbeat.audit.is_none() {
        return Ok(());
    }
    HEADS.put(txn, &(heartbeat.restore, heartbeat.at / DAY_MS), signed)?;
    if HEADS.len(txn)? > MAX_HEADS
        && let Some((oldest, _)) = HEADS.first(txn)?
    {
        HEADS.delete(txn, &oldest)?;
    }
    Ok(())
}

/// What in a heartbeat cannot be, after what the manager said before: a log only grows, until the manager comes back
/// from a backup, which has a restore number of its own.
pub(crate) fn contradiction(db: &Db, heartbeat: &Heartbeat) -> Result<Option<String>, StoreError> {
    let restore = heartbeat.restore;
    let Some((_, newest)) = db.read(|txn| HEADS.last(txn))? else { return Ok(None) };
    let Ok(newest) = newest.peek() else { return Ok(None) };
    if newest.restore > restore {
        let text = format!(
            "the manager's restore number went back from {} to {restore}: its operator has to run `willcall manager \
             restored --above {}`",
            newest.restore, newest.restore
        );
        return Ok(Some(text));
    }
    let (Some(before), Some(now)) = (newest.audit, heartbeat.audit) else { return Ok(None) };
    if newest.restore < restore {
        return Ok(None);
    }
    Ok(match now.number.cmp(&before.number) {
        std::cmp::Ordering::Less => Some(format!(
            "the manager's audit log went back from entry {} to {}: if its folder was put back from a copy, its \
                 operator has to stop it and run `willcall manager restored`",
            before.number, now.number
        )),
        std::cmp::Ordering::Equal if now.digest != before.digest => {
            Some(format!("the manager names two different entries {} of its audit log", now.number))
        }
        _ => None,
    })
}

/// The heads kept, newest first, before the one that `before` names (restore number and day), and the key set by which their
/// signatures are verified. `heartbeat` and `key_set` are what was signed, as the hexadecimal bytes of the document. Where
/// there are more, `next` is what to ask for them with.
pub(crate) fn list(db: &Db, trust: Option<&Trust>, before: Option<(u64, u64)>) -> Result<Value, StoreError> {
    let hex = |bytes: Vec<u8>| data_encoding::HEXLOWER.encode(&bytes);
    let (kept, total, more) = db.read(|txn| {
        let kept = HEADS.range_back(txn, ..before.unwrap_or((u64::MAX, u64::MAX)), PAGE)?;
        let first = HEADS.first(txn)?.map(|(key, _)| key);
        let more = kept.last().map(|(key, _)| *key).filter(|last| first.is_some_and(|first| first < *last));
        Ok::<_, StoreError>((kept, HEADS.len(txn)?, more))
    })?;
    let lines: Vec<Value> = kept
        .iter()
        .filter_map(|(_, signed)| {
            let heartbeat = signed.peek().ok()?;
            let head = heartbeat.audit?;
            Some(json!({
                "number": head.number, "digest": head.digest, "at": heartbeat.at, "restore": heartbeat.restore,
                "heartbeat": hex(codec::encode(signed)),
            }))
        })
        .collect();
    // The newest has every key that was ever in use, so far as it has room for them.
    let key_sets: Vec<Value> = trust
        .map(|trust| json!({"version": trust.key_set().version, "key_set": hex(codec::encode(trust.signed_key_set()))}))
        .into_iter()
        .collect();
    let next = more.map(|(restore, day)| json!([restore, day]));
    Ok(json!({ "heads": lines, "key_sets": key_sets, "total": total, "next": next }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use protocol::trust::AuditHead;
    use protocol::{Digest, Keypair, NetworkId};

    use super::*;
    use crate::tables::SCHEMA;

    #[tokio::test]
    async fn one_head_a_day_is_kept_and_a_log_that_goes_back_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("s.redb"), store::Options::new(SCHEMA)).unwrap();
        let key = Keypair::from_seed(&[1; 32]);
        let heartbeat = |at: u64, restore: u64, number: u64, digest: u8| Heartbeat {
            network: NetworkId::from_bytes([2; 32]),
            at,
            epoch: 0,
            key_set_version: 1,
            key_set: Digest::from_bytes([3; 32]),
            restore,
            audit: Some(AuditHead { number, digest: Digest::from_bytes([digest; 32]) }),
        };
        let take = async |heartbeat: Heartbeat| {
            let contradiction = contradiction(&db, &heartbeat).unwrap();
            let signed = Signed::sign(&heartbeat, &key);
            db.write(move |txn| keep(txn, &heartbeat, &signed)).await.unwrap();
            contradiction
        };
        assert_eq!(take(heartbeat(1, 0, 5, 5)).await, None);
        assert_eq!(take(heartbeat(2, 0, 7, 7)).await, None);
        assert_eq!(take(heartbeat(DAY_MS + 1, 0, 9, 9)).await, None);
        let kept = list(&db, None, None).unwrap();
        let numbers: Vec<u64> =
            kept["heads"].as_array().unwrap().iter().map(|head| head["number"].as_u64().unwrap()).collect();
        assert_eq!(numbers, [9, 7]);
        assert!(contradiction(&db, &heartbeat(DAY_MS + 2, 0, 9, 10)).unwrap().unwrap().contains("two different"));
        assert!(contradiction(&db, &heartbeat(DAY_MS + 2, 0, 8, 8)).unwrap().unwrap().contains("went back"));
        assert_eq!(contradiction(&db, &heartbeat(DAY_MS + 2, 0, 9, 9)).unwrap(), None);
        // From a backup: fewer entries, and other ones, under a restore number of its own.
        assert_eq!(take(heartbeat(DAY_MS + 3, 1, 8, 80)).await, None);
        assert_eq!(list(&db, None, None).unwrap()["heads"].as_array().unwrap().len(), 3);
        assert!(contradiction(&db, &heartbeat(DAY_MS + 4, 0, 90, 9)).unwrap().unwrap().contains("restore number"));

        // As many as fit into pages, and one more.
        let all = 2 * PAGE as u64;
        let more: Vec<_> = (0..all - 3).map(|day| heartbeat((day + 9) * DAY_MS, 1, day + 9, 9)).collect();
        db.write(move |txn| more.iter().try_for_each(|beat| keep(txn, beat, &Signed::sign(beat, &key)))).await.unwrap();
        let (mut before, mut pages) = (None, Vec::new());
        loop {
            let page = list(&db, None, before).unwrap();
            assert_eq!(page["total"], all);
            let times: Vec<u64> =
                page["heads"].as_array().unwrap().iter().map(|head| head["at"].as_u64().unwrap()).collect();
            pages.push(times);
            let Some(next) = page["next"].as_array() else { break };
            before = Some((next[0].as_u64().unwrap(), next[1].as_u64().unwrap()));
        }
        assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [PAGE, PAGE]);
        let told = pages.concat();
        assert_eq!(told.iter().collect::<std::collections::BTreeSet<_>>().len(), told.len());
        assert_eq!((told[0], told.last()), ((all + 5) * DAY_MS, Some(&2)));
    }
}
