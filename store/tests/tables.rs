//! The typed tables against a plain ordered map, and the bounds on what they store.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::ops::Bound;

use proptest::prelude::*;
use protocol::{PeerId, TransactionId};
use willcall_store::{Db, Mark, Options, StoreError, Table};

#[derive(Debug, Clone, PartialEq, bincode::Encode, bincode::Decode)]
struct Note(String);
protocol::wire!(Note => 64);

#[derive(Debug, Clone, PartialEq, bincode::Encode, bincode::Decode)]
struct Count(u64);
protocol::wire!(Count => 16);

fn open(folder: &tempfile::TempDir) -> Db {
    Db::open(folder.path().join("test.redb"), Options::new(1)).unwrap()
}

#[test]
fn a_table_that_was_never_written_reads_as_empty() {
    const MISSING: Table<u64, Note> = Table::new("missing");
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    db.read(|txn| -> Result<(), StoreError> {
        assert_eq!(MISSING.get(txn, &1)?, None);
        assert!(!MISSING.contains(txn, &1)?);
        assert!(MISSING.is_empty(txn)?);
        assert_eq!(MISSING.range(txn, .., 10)?, []);
        assert_eq!((MISSING.first(txn)?, MISSING.last(txn)?), (None, None));
        Ok(())
    })
    .unwrap();
    let in_write = db.write_blocking(|txn| Ok::<_, StoreError>((MISSING.get(txn, &1)?, MISSING.delete(txn, &1)?)));
    assert_eq!(in_write.unwrap(), (None, false));
}

#[test]
fn tuple_keys_page_in_order_and_stay_within_their_prefix() {
    const LINES: Table<(PeerId, u64, String), Note> = Table::new("lines");
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let peer = |n| PeerId::from_bytes([n; 32]);
    db.write_blocking(move |txn| {
        for n in [255, 1, 254, 2] {
            for time in [256, 3, 1 << 40] {
                for name in ["b", "", "a"] {
                    LINES.put(txn, &(peer(n), time, name.to_owned()), &Note(format!("{n} {time} {name}")))?;
                }
            }
        }
        Ok::<_, StoreError>(())
    })
    .unwrap();
    let texts = |lines: Vec<(_, Note)>| lines.into_iter().map(|(_, note)| note.0).collect::<Vec<_>>();
    db.read(|txn| -> Result<(), StoreError> {
        assert_eq!(LINES.len(txn)?, 36);
        let of_last = texts(LINES.prefix(txn, &peer(255), 100)?);
        assert_eq!(of_last.len(), 9, "a prefix of all 255 ends with the table");
        assert_eq!(of_last[..4], ["255 3 ", "255 3 a", "255 3 b", "255 256 "]);
        assert_eq!(texts(LINES.prefix(txn, &(peer(2), 256), 100)?), ["2 256 ", "2 256 a", "2 256 b"]);
        assert_eq!(LINES.prefix(txn, &peer(3), 100)?, []);
        assert_eq!(LINES.prefix(txn, &peer(2), 0)?, []);

        let mut paged = Vec::new();
        let mut from = Bound::Unbounded;
        loop {
            let page = LINES.range(txn, (from, Bound::Unbounded), 7)?;
            let Some((last, _)) = page.last() else { break };
            from = Bound::Excluded(last.clone());
            paged.extend(page);
        }
        assert_eq!(paged, LINES.range(txn, .., 100)?);
        assert!(paged.is_sorted_by(|a, b| a.0 < b.0));
        let mut back = LINES.range_back(txn, .., 100)?;
        back.reverse();
        assert_eq!(back, paged);
        Ok(())
    })
    .unwrap();
}

#[test]
fn borrowed_text_single_rows_and_marks() {
    const NAMES: Table<String, TransactionMark> = Table::new("names");
    const OF_PEER: Table<(PeerId, String), Mark> = Table::new("of-peer");
    const SETTINGS: Table<(), Count> = Table::new("settings");
    #[derive(Debug, PartialEq, bincode::Encode, bincode::Decode)]
    struct TransactionMark(TransactionId);
    protocol::wire!(TransactionMark => 17);

    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let peer = PeerId::from_bytes([4; 32]);
    db.write_blocking(move |txn| {
        NAMES.put(txn, "zoë", &TransactionMark(TransactionId::from_bytes([3; 16])))?;
        OF_PEER.put(txn, &(peer, "a"), &Mark)?;
        SETTINGS.put(txn, &(), &Count(5))?;
        assert_eq!(SETTINGS.take(txn, &())?, Some(Count(5)));
        SETTINGS.put(txn, &(), &Count(6))
    })
    .unwrap();
    db.read(|txn| -> Result<(), StoreError> {
        let stored = TransactionMark(TransactionId::from_bytes([3; 16]));
        assert_eq!(NAMES.get(txn, &"zoë".to_owned())?, Some(stored));
        assert_eq!(NAMES.get(txn, "zo")?, None);
        assert!(OF_PEER.contains(txn, &(peer, "a".to_owned()))?);
        assert_eq!(OF_PEER.get(txn, &(peer, "a"))?, Some(Mark));
        assert_eq!(SETTINGS.first(txn)?, Some(((), Count(6))));
        Ok(())
    })
    .unwrap();
}

#[test]
fn what_is_over_its_bound_or_of_another_kind_is_refused_by_name() {
    const NOTES: Table<String, Note> = Table::new("notes");
    const AS_COUNTS: Table<u64, Count> = Table::new("notes");
    const NUMBERS: redb::TableDefinition<'_, u64, u64> = redb::TableDefinition::new("numbers");
    const AS_NOTES: Table<u64, Note> = Table::new("numbers");
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let put = |key: String, text: String| db.write_blocking(move |txn| NOTES.put(txn, &key, &Note(text.clone())));
    put("k".repeat(1024), "t".repeat(62)).unwrap();
    let key = put("k".repeat(1025), String::new());
    assert_eq!(key, Err(StoreError::TooLarge { table: "notes", what: "key", bytes: 1025, max: 1024 }));
    let value = put("k".to_owned(), "t".repeat(63));
    assert_eq!(value, Err(StoreError::TooLarge { table: "notes", what: "value", bytes: 65, max: 64 }));

    let damaged = db.read(|txn| AS_COUNTS.range(txn, .., 1));
    assert!(matches!(damaged, Err(StoreError::Corrupt { table: "notes", .. })), "{damaged:?}");
    assert_eq!(db.failed(), None, "none of these are the disk's fault");

    // A table of another kind, as another program would have left it.
    drop(db);
    let raw = redb::Database::open(folder.path().join("test.redb")).unwrap();
    let txn = raw.begin_write().unwrap();
    txn.open_table(NUMBERS).unwrap().insert(1, 1).unwrap();
    txn.commit().unwrap();
    drop(raw);
    let db = open(&folder);
    assert!(matches!(db.read(|txn| AS_NOTES.get(txn, &1)), Err(StoreError::Misuse(_))));
    let both = db.write_blocking(|txn| {
        NOTES.put(txn, "before", &Note(String::new()))?;
        let first = AS_NOTES.get(txn, &1);
        assert!(matches!(first, Err(StoreError::Misuse(_))), "{first:?}");
        AS_NOTES.put(txn, &1, &Note(String::new()))
    });
    assert!(matches!(both, Err(StoreError::Misuse(_))), "{both:?}");
    assert!(!db.read(|txn| NOTES.contains(txn, "before")).unwrap(), "and nothing of that write is there");
    db.write_blocking(|txn| NOTES.put(txn, "after", &Note(String::new()))).unwrap();
    assert_eq!(db.failed(), None, "nor are these");
}

#[derive(Debug, Clone)]
enum Step {
    Put(u16, u64),
    InsertNew(u16, u64),
    Delete(u16),
    Take(u16),
    Get(u16),
    Last,
    DeleteRange(u16, u16, usize),
    Look(u16, u16, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = || 250_u16..520;
    let step = prop_oneof![
        3 => (key(), any::<u64>()).prop_map(|(key, value)| Step::Put(key, value)),
        2 => (key(), any::<u64>()).prop_map(|(key, value)| Step::InsertNew(key, value)),
        1 => key().prop_map(Step::Delete),
        1 => key().prop_map(Step::Take),
        2 => key().prop_map(Step::Get),
        2 => Just(Step::Last),
        1 => (key(), key(), 0_usize..20).prop_map(|(from, to, limit)| Step::DeleteRange(from, to, limit)),
        2 => (key(), key(), 0_usize..20).prop_map(|(from, to, limit)| Step::Look(from, to, limit)),
    ];
    prop::collection::vec(step, 0..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_table_behaves_like_an_ordered_map(first in steps(), second in steps()) {
        const COUNTS: Table<u16, Count> = Table::new("counts");
        let folder = tempfile::tempdir().unwrap();
        let db = open(&folder);
        let run = |before: BTreeMap<u16, Count>, steps: Vec<Step>| db.write_blocking(move |txn| {
            let mut map = before.clone();
            for step in &steps {
                match *step {
                    Step::Put(key, value) => {
                        COUNTS.put(txn, &key, &Count(value))?;
                        map.insert(key, Count(value));
                    }
                    Step::InsertNew(key, value) => {
                        assert_eq!(COUNTS.insert_new(txn, &key, &Count(value))?, !map.contains_key(&key));
                        map.entry(key).or_insert(Count(value));
                    }
                    Step::Get(key) => {
                        assert_eq!(COUNTS.get(txn, &key)?, map.get(&key).cloned());
                        assert_eq!(COUNTS.contains(txn, &key)?, map.contains_key(&key));
                    }
                    Step::Last => {
                        let last = map.last_key_value().map(|(key, count)| (*key, count.clone()));
                        assert_eq!(COUNTS.last(txn)?, last);
                    }
                    Step::Take(key) => assert_eq!(COUNTS.take(txn, &key)?, map.remove(&key)),
                    Step::Delete(key) => assert_eq!(COUNTS.delete(txn, &key)?, map.remove(&key).is_some()),
                    Step::DeleteRange(from, to, limit) => {
                        let gone: Vec<u16> =
                            map.keys().copied().filter(|key| (from..to).contains(key)).take(limit).collect();
                        assert_eq!(COUNTS.delete_range(txn, from..to, limit)?, gone.len());
                        map.retain(|key, _| !gone.contains(key));
                    }
                    Step::Look(from, to, limit) => {
                        let inside = || map.iter().filter(|(key, _)| (from..=to).contains(key));
                        let owned = |(key, count): (&u16, &Count)| (*key, count.clone());
                        let forward: Vec<_> = inside().take(limit).map(owned).collect();
                        let backward: Vec<_> = inside().rev().take(limit).map(owned).collect();
                        assert_eq!(COUNTS.range(txn, from..=to, limit)?, forward);
                        assert_eq!(COUNTS.range_back(txn, from..=to, limit)?, backward);
                    }
                }
            }
            Ok::<_, StoreError>(map)
        }).unwrap();
        // Once with nothing beneath what is written, and once with what the first left.
        let between = run(BTreeMap::new(), first);
        let expected = run(between, second);
        let stored = db.read(|txn| COUNTS.range(txn, .., usize::MAX)).unwrap();
        prop_assert_eq!(stored, expected.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn more_than_is_held_in_memory_is_written_all_the_same() {
    #[derive(Debug, Clone, PartialEq, bincode::Encode, bincode::Decode)]
    struct Large(Vec<u8>);
    protocol::wire!(Large => 128 * 1024);
    const LARGE: Table<u64, Large> = Table::new("large");
    let folder = tempfile::tempdir().unwrap();
    let db = open(&folder);
    let row = |n: u64, byte: u8| Large(vec![byte; 100_000 - usize::try_from(n).unwrap()]);
    db.write_blocking(move |txn| {
        for n in 0..40 {
            LARGE.put(txn, &n, &row(n, 1))?;
            LARGE.put(txn, &(n / 2), &row(n / 2, 2))?;
            assert_eq!(LARGE.last(txn)?.map(|(key, _)| key), Some(n));
        }
        LARGE.delete(txn, &5)?;
        LARGE.put(txn, &3, &row(3, 3))
    })
    .unwrap();
    let stored = db.read(|txn| LARGE.range(txn, .., usize::MAX)).unwrap();
    let expected = (0..40).filter(|n| *n != 5).map(|n| {
        (
            n,
            row(
                n,
                if n == 3 {
                    3
                } else if n < 20 {
                    2
                } else {
                    1
                },
            ),
        )
    });
    assert!(stored == expected.collect::<Vec<_>>());
}
