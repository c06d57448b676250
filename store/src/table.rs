//! Typed tables over byte tables: redb sees one kind of table, so that a backup can copy any of them, and the types of
//! keys and values are checked by the compiler where the table is named.

use std::marker::PhantomData;
use std::ops::{Bound, ControlFlow, RangeBounds};

use protocol::codec::{self, Wire};
use redb::{ReadableTable, ReadableTableMetadata};

use crate::key::{KeyBytes, KeyLike, PrefixOf, end_of_prefix};
use crate::{ReadTransaction, StoreError, WriteTransaction};

type Bytes = &'static [u8];

/// What a table holds: anything with a versioned, bounded byte form.
pub trait Record: Wire {}
impl<T: Wire> Record for T {}

/// The value of a table whose keys say everything, such as an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Mark;
protocol::wire!(Mark => 1);

/// A transaction that a [`Table`] can read from.
pub trait Txn: sealed::Look {}
impl Txn for ReadTransaction {}
impl Txn for WriteTransaction<'_> {}

mod sealed {
    use super::{Bytes, ReadTransaction, ReadableTable, StoreError, WriteTransaction};
    use crate::transaction::{Opened, Seen};

    pub trait Look {
        type Opened: ReadableTable<Bytes, Bytes>;

        /// Runs `look` on the table; `None` when there is no such table yet.
        fn look<R, E: From<StoreError>>(
            &self,
            name: &'static str,
            look: impl FnOnce(&Self::Opened) -> Result<R, E>,
        ) -> Result<Option<R>, E>;

        /// Runs `look` on the value under `key`.
        fn row<R>(
            &self,
            name: &'static str,
            key: &[u8],
            look: impl FnOnce(Option<&[u8]>) -> R,
        ) -> Result<R, StoreError>;

        /// Runs `look` on the row with the highest key.
        fn last<R>(&self, name: &'static str, look: impl FnOnce(Option<(&[u8], &[u8])>) -> R) -> Result<R, StoreError>;
    }

    impl Look for ReadTransaction {
        type Opened = Seen;

        fn look<R, E: From<StoreError>>(
            &self,
            name: &'static str,
            look: impl FnOnce(&Self::Opened) -> Result<R, E>,
        ) -> Result<Option<R>, E> {
            self.table(name)?.map(|table| look(&table)).transpose()
        }

        fn row<R>(
            &self,
            name: &'static str,
            key: &[u8],
            look: impl FnOnce(Option<&[u8]>) -> R,
        ) -> Result<R, StoreError> {
            let Some(table) = self.table(name)? else { return Ok(look(None)) };
            let found = table.get(key)?;
            Ok(look(found.as_ref().map(|value| value.value())))
        }

        fn last<R>(&self, name: &'static str, look: impl FnOnce(Option<(&[u8], &[u8])>) -> R) -> Result<R, StoreError> {
            let Some(table) = self.table(name)? else { return Ok(look(None)) };
            let found = table.last()?;
            Ok(look(found.as_ref().map(|(key, value)| (key.value(), value.value()))))
        }
    }

    impl<'t> Look for WriteTransaction<'t> {
        type Opened = Opened<'t>;

        fn look<R, E: From<StoreError>>(
            &self,
            name: &'static str,
            look: impl FnOnce(&Self::Opened) -> Result<R, E>,
        ) -> Result<Option<R>, E> {
            WriteTransaction::look(self, name, look).map(Some)
        }

        fn row<R>(
            &self,
            name: &'static str,
            key: &[u8],
            look: impl FnOnce(Option<&[u8]>) -> R,
        ) -> Result<R, StoreError> {
            WriteTransaction::row(self, name, key, look)
        }

        fn last<R>(&self, name: &'static str, look: impl FnOnce(Option<(&[u8], &[u8])>) -> R) -> Result<R, StoreError> {
            WriteTransaction::last(self, name, look)
        }
    }
}

/// Longest key, bytes. The longest keys in use are a peer ID and a name or address of at most 256 bytes; four times
/// that leaves room while a page of 4 KiB still holds several keys.
const MAX_KEY: usize = 1024;

/// A named table of records `V` in the order of their keys `K`, usable as a constant. A table that was never written
/// reads as empty. Within one transaction calls can be mixed freely; only the closure of [`scan`](Self::scan) must not
/// change the table that it scans.
///
/// All methods fail with [`StoreError::Corrupt`] when a stored record does not decode, with [`StoreError::Misuse`] when
/// the same name is in use for another kind of table or the table is changed while it is scanned, and with the disk's
/// errors.
pub struct Table<K, V> {
    name: &'static str,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K, V> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K, V> Copy for Table<K, V> {}

impl<K: KeyBytes, V: Record> Table<K, V> {
    /// The table called `name`. One name stands for one pair of types in a file; changing them needs a new name or a
    /// new schema number. `willcall.store` is taken by the store itself.
    pub const fn new(name: &'static str) -> Self {
        Table { name, types: PhantomData }
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The record under `key`.
    pub fn get<Q: KeyLike<K> + ?Sized>(&self, txn: &impl Txn, key: &Q) -> Result<Option<V>, StoreError> {
        txn.row(self.name, &key_bytes(key), |found| found.map(|value| self.value(value)).transpose())?
    }

    /// Whether there is a record under `key`; it is not decoded.
    pub fn contains<Q: KeyLike<K> + ?Sized>(&self, txn: &impl Txn, key: &Q) -> Result<bool, StoreError> {
        txn.row(self.name, &key_bytes(key), |found| found.is_some())
    }

    /// Number of records.
    pub fn len(&self, txn: &impl Txn) -> Result<u64, StoreError> {
        let found = txn.look(self.name, |table| table.len().map_err(StoreError::from))?;
        Ok(found.unwrap_or(0))
    }

    /// Whether there is no record.
    pub fn is_empty(&self, txn: &impl Txn) -> Result<bool, StoreError> {
        Ok(self.len(txn)? == 0)
    }

    /// The record with the lowest key.
    pub fn first(&self, txn: &impl Txn) -> Result<Option<(K, V)>, StoreError> {
        Ok(self.range(txn, .., 1)?.pop())
    }

    /// The record with the highest key.
    pub fn last(&self, txn: &impl Txn) -> Result<Option<(K, V)>, StoreError> {
        txn.last(self.name, |found| found.map(|(key, value)| Ok((self.key(key)?, self.value(value)?))).transpose())?
    }

    /// At most `limit` records in `range`, lowest key first. The next page starts at `Bound::Excluded(last key)`.
    pub fn range(&self, txn: &impl Txn, range: impl RangeBounds<K>, limit: usize) -> Result<Vec<(K, V)>, StoreError> {
        self.collect(txn, byte_range(&range), false, limit)
    }

    /// At most `limit` records in `range`, highest key first.
    pub fn range_back(
        &self,
        txn: &impl Txn,
        range: impl RangeBounds<K>,
        limit: usize,
    ) -> Result<Vec<(K, V)>, StoreError> {
        self.collect(txn, byte_range(&range), true, limit)
    }

    /// At most `limit` records whose key begins with `prefix`, lowest key first. For a further page, use
    /// [`range`](Self::range).
    pub fn prefix<P: PrefixOf<K>>(&self, txn: &impl Txn, prefix: &P, limit: usize) -> Result<Vec<(K, V)>, StoreError> {
        self.collect(txn, prefix_range(prefix), false, limit)
    }

    /// Shows the records in `range`, lowest key first, to `visit` until it breaks; nothing is kept in memory. In a
    /// read transaction this holds the snapshot: take long scans off the async threads.
    pub fn scan<E: From<StoreError>>(
        &self,
        txn: &impl Txn,
        range: impl RangeBounds<K>,
        visit: impl FnMut(K, V) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        self.walk(txn, byte_range(&range), false, visit)
    }

    /// Stores `value` under `key`, in place of what was there.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] for a key of more than 1,024 bytes or a value over its type's limit.
    pub fn put<Q: KeyLike<K> + ?Sized>(
        &self,
        txn: &WriteTransaction<'_>,
        key: &Q,
        value: &V,
    ) -> Result<(), StoreError> {
        let (key, value) = self.encode(key, value)?;
        txn.set(self.name, key, Some(value))
    }

    /// Stores `value` under `key` if nothing is there yet; `false` when something is, which stays as it was.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn insert_new<Q: KeyLike<K> + ?Sized>(
        &self,
        txn: &WriteTransaction<'_>,
        key: &Q,
        value: &V,
    ) -> Result<bool, StoreError> {
        let (key, value) = self.encode(key, value)?;
        let is_new = txn.row(self.name, &key, |found| found.is_none())?;
        if is_new {
            txn.set(self.name, key, Some(value))?;
        }
        Ok(is_new)
    }

    /// Removes the record under `key`; `false` when there was none.
    pub fn delete<Q: KeyLike<K> + ?Sized>(&self, txn: &WriteTransaction<'_>, key: &Q) -> Result<bool, StoreError> {
        let key = key_bytes(key);
        let found = txn.row(self.name, &key, |found| found.is_some())?;
        if found {
            txn.set(self.name, key, None)?;
        }
        Ok(found)
    }

    /// Removes and returns the record under `key`.
    pub fn take<Q: KeyLike<K> + ?Sized>(&self, txn: &WriteTransaction<'_>, key: &Q) -> Result<Option<V>, StoreError> {
        let key = key_bytes(key);
        let found = txn.row(self.name, &key, |found| found.map(|value| self.value(value)).transpose())??;
        if found.is_some() {
            txn.set(self.name, key, None)?;
        }
        Ok(found)
    }

    /// Removes at most `limit` records in `range`, lowest key first, and says how many. Prune in steps of a few
    /// thousand: one step is one part of a transaction that others wait for.
    pub fn delete_range(
        &self,
        txn: &WriteTransaction<'_>,
        range: impl RangeBounds<K>,
        limit: usize,
    ) -> Result<usize, StoreError> {
        let Some(range) = checked(byte_range(&range)) else { return Ok(0) };
        txn.change(self.name, |table| {
            let mut keys = Vec::new();
            for entry in table.range::<&[u8]>(borrowed(&range))?.take(limit) {
                keys.push(entry?.0.value().to_vec());
            }
            for key in &keys {
                table.remove(key.as_slice())?;
            }
            Ok(keys.len())
        })
    }

    fn collect(
        &self,
        txn: &impl Txn,
        range: ByteRange,
        backwards: bool,
        limit: usize,
    ) -> Result<Vec<(K, V)>, StoreError> {
        let mut found = Vec::new();
        if limit > 0 {
            self.walk(txn, range, backwards, |key, value| {
                found.push((key, value));
                let more = found.len() < limit;
                Ok::<_, StoreError>(if more { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
            })?;
        }
        Ok(found)
    }

    fn walk<E: From<StoreError>>(
        &self,
        txn: &impl Txn,
        range: ByteRange,
        backwards: bool,
        mut visit: impl FnMut(K, V) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        let Some(range) = checked(range) else { return Ok(()) };
        txn.look(self.name, |table| {
            let mut entries = table.range::<&[u8]>(borrowed(&range)).map_err(StoreError::from)?;
            while let Some(entry) = if backwards { entries.next_back() } else { entries.next() } {
                let (key, value) = entry.map_err(StoreError::from)?;
                let key = self.key(key.value())?;
                let value = self.value(value.value())?;
                if visit(key, value)?.is_break() {
                    break;
                }
            }
            Ok::<_, E>(())
        })?;
        Ok(())
    }

    fn encode<Q: KeyLike<K> + ?Sized>(&self, key: &Q, value: &V) -> Result<(Vec<u8>, Vec<u8>), StoreError> {
        let key = key_bytes(key);
        let value = codec::encode(value);
        let too_large = |what, bytes, max| Err(StoreError::TooLarge { table: self.name, what, bytes, max });
        if key.len() > MAX_KEY {
            return too_large("key", key.len(), MAX_KEY);
        }
        // The codec answers with nothing when it cannot encode; storing that would be a record that never decodes.
        if value.is_empty() || value.len() > V::MAX {
            return too_large("value", value.len(), V::MAX);
        }
        Ok((key, value))
    }

    fn key(&self, bytes: &[u8]) -> Result<K, StoreError> {
        K::parse(bytes).ok_or_else(|| self.corrupt("a key does not parse".to_owned()))
    }

    fn value(&self, bytes: &[u8]) -> Result<V, StoreError> {
        codec::decode(bytes).map_err(|error| self.corrupt(error.to_string()))
    }

    fn corrupt(&self, reason: String) -> StoreError {
        StoreError::Corrupt { table: self.name, reason }
    }
}

type ByteRange = (Bound<Vec<u8>>, Bound<Vec<u8>>);

fn key_bytes<K, Q: KeyLike<K> + ?Sized>(key: &Q) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    key.append_key(&mut out);
    out
}

fn byte_range<K: KeyBytes>(range: &impl RangeBounds<K>) -> ByteRange {
    (range.start_bound().map(key_bytes::<K, K>), range.end_bound().map(key_bytes::<K, K>))
}

fn prefix_range<K, P: PrefixOf<K>>(prefix: &P) -> ByteRange {
    let mut start = Vec::with_capacity(P::LEN);
    prefix.append(&mut start);
    let end = end_of_prefix(&start).map_or(Bound::Unbounded, Bound::Excluded);
    (Bound::Included(start), end)
}

fn borrowed(range: &ByteRange) -> (Bound<&[u8]>, Bound<&[u8]>) {
    (range.0.as_ref().map(Vec::as_slice), range.1.as_ref().map(Vec::as_slice))
}

/// `None` for a range that ends before it starts: ordered maps differ in whether they panic at that.
fn checked(range: ByteRange) -> Option<ByteRange> {
    use Bound::{Excluded, Included};
    let is_empty = match &range {
        (Included(start), Included(end)) => start > end,
        (Included(start) | Excluded(start), Included(end) | Excluded(end)) => start >= end,
        _ => false,
    };
    (!is_empty).then_some(range)
}
