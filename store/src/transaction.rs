//! One write transaction, and the tables that are open in it. Opening a table looks it up in the file's directory of
//! tables, closing it writes that directory; a receipt makes thirty small reads and writes and a batch has hundreds
//! of receipts, so a table is opened once and stays open until the transaction ends.
//!
//! Most of those are of the same few rows, balances above all, which one closure after the other reads and writes. What is
//! written is therefore held in memory first and put into the table once, in the order of keys, when the transaction
//! ends or the table is gone through.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use redb::{Database, ReadOnlyTable, ReadableDatabase, ReadableTable, TableDefinition, TableError, TransactionError};

use crate::StoreError;

type Bytes = &'static [u8];

/// A table open for writing.
pub(crate) type Opened<'t> = redb::Table<'t, Bytes, Bytes>;

/// A snapshot that [`Table`](crate::Table)s are read from.
pub struct ReadTransaction {
    raw: redb::ReadTransaction,
    /// The tables opened so far, as in a [`WriteTransaction`]; by all who share the snapshot.
    tables: Mutex<Vec<(&'static str, Arc<Seen>)>>,
}

/// A table open for reading.
pub(crate) type Seen = ReadOnlyTable<Bytes, Bytes>;

impl ReadTransaction {
    fn over(raw: redb::ReadTransaction) -> Self {
        ReadTransaction { raw, tables: Mutex::default() }
    }

    pub(crate) fn raw(&self) -> &redb::ReadTransaction {
        &self.raw
    }

    /// The table called `name`; `None` when there is no such table yet.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] when something that is no byte table has that name.
    pub(crate) fn table(&self, name: &'static str) -> Result<Option<Arc<Seen>>, StoreError> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = tables.iter().find(|(known, _)| *known == name) {
            return Ok(Some(Arc::clone(table)));
        }
        match self.raw.open_table(TableDefinition::new(name)) {
            Ok(table) => {
                let table = Arc::new(table);
                tables.push((name, Arc::clone(&table)));
                Ok(Some(table))
            }
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The snapshot of what is durable now, which all reads between two commits share: beginning one and opening its tables
/// takes longer than most look-ups in them.
#[derive(Default)]
pub(crate) struct Newest(Mutex<Option<Arc<ReadTransaction>>>);

impl Newest {
    /// The snapshot.
    pub(crate) fn get(&self, database: &Database) -> Result<Arc<ReadTransaction>, TransactionError> {
        // Begun under the lock: once `forget` was called, none that was begun before it is given out.
        let mut newest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(snapshot) = newest.as_ref() {
            return Ok(Arc::clone(snapshot));
        }
        let snapshot = Arc::new(ReadTransaction::over(database.begin_read()?));
        *newest = Some(Arc::clone(&snapshot));
        Ok(snapshot)
    }

    /// Has the next read begin a new one: something was committed, or is about to be and needs the pages that only an
    /// older snapshot still has.
    pub(crate) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl fmt::Debug for Newest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Newest")
    }
}

/// How often something was written to each table since the store was opened.
#[derive(Debug, Default)]
pub(crate) struct Changes(Mutex<HashMap<&'static str, u64>>);

impl Changes {
    /// Something was written to these tables, and whoever reads from now on sees it.
    pub(crate) fn note(&self, tables: &[&'static str]) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for table in tables {
            *counts.entry(table).or_default() += 1;
        }
    }

    /// The counts of these tables, added up.
    pub(crate) fn of(&self, tables: &[&'static str]) -> u64 {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tables.iter().filter_map(|table| counts.get(table)).sum()
    }
}

/// A transaction that [`Table`](crate::Table)s are read from and written to. All closures that the writer runs
/// together share one, and with it the open tables; when one of them fails, both are thrown away and the others run in
/// new ones.
pub struct WriteTransaction<'t> {
    raw: &'t redb::WriteTransaction,
    /// The tables opened so far. Some ten of them, so that going through a list is as fast as any map.
    tables: RefCell<Vec<Rc<Place<'t>>>>,
}

/// An open table under its name. Whoever uses it borrows it: a borrow ends with its guard, also by a panic, and one too
/// many is an error and never a second view of the same pages.
struct Place<'t> {
    name: &'static str,
    table: RefCell<Held<'t>>,
}

/// A table, and what is to be put into it.
struct Held<'t> {
    table: Opened<'t>,
    /// New values by key, and `None` for what is to go.
    pending: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Bytes of `pending`.
    bytes: usize,
    /// The highest key in `table`, once it was asked for: as long as nothing is put into it, it stays that.
    highest: Option<Option<Vec<u8>>>,
    /// Why not all that was written is in `table`: then nothing of the transaction may be committed.
    failed: Option<StoreError>,
    /// Whether anything was written.
    changed: bool,
}

/// Most bytes that wait for a table: what moves many large rows is not to hold them twice.
const MAX_PENDING: usize = 1024 * 1024;

impl<'t> Held<'t> {
    /// Runs `look` on the value under `key`, as it is now.
    fn with<R>(&self, key: &[u8], look: impl FnOnce(Option<&[u8]>) -> R) -> Result<R, StoreError> {
        match self.pending.get(key) {
            Some(value) => Ok(look(value.as_deref())),
            None => Ok(look(self.table.get(key)?.as_ref().map(|value| value.value()))),
        }
    }

    fn set(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) -> Result<(), StoreError> {
        self.changed = true;
        let length = |value: &Option<Vec<u8>>| value.as_ref().map_or(0, Vec::len);
        let (key_length, value_length) = (key.len(), length(&value));
        self.bytes += value_length;
        match self.pending.insert(key, value) {
            Some(replaced) => self.bytes = self.bytes.saturating_sub(length(&replaced)),
            None => self.bytes += key_length,
        }
        if self.bytes > MAX_PENDING { self.settle() } else { Ok(()) }
    }

    /// The highest key and its value, as they are now.
    fn last<R>(&mut self, look: impl FnOnce(Option<(&[u8], &[u8])>) -> R) -> Result<R, StoreError> {
        // Above all that is in the table, nothing that is to go from it matters.
        let newest = self.pending.iter().rev().find_map(|(key, value)| Some((key, value.as_ref()?)));
        if let Some((key, value)) = newest {
            if self.highest.is_none() {
                self.highest = Some(self.table.last()?.map(|(key, _)| key.value().to_vec()));
            }
            if self.highest.as_ref().is_some_and(|highest| highest.as_ref() <= Some(key)) {
                return Ok(look(Some((key, value))));
            }
        }
        self.settle()?;
        let last = self.table.last()?;
        Ok(look(last.as_ref().map(|(key, value)| (key.value(), value.value()))))
    }

    /// Puts into the table what is to be put into it.
    fn settle(&mut self) -> Result<(), StoreError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.highest = None;
        self.bytes = 0;
        for (key, value) in std::mem::take(&mut self.pending) {
            let result = match value {
                Some(value) => self.table.insert(key.as_slice(), value.as_slice()).map(drop),
                None => self.table.remove(key.as_slice()).map(drop),
            };
            if let Err(error) = result {
                return Err(self.failed.insert(error.into()).clone());
            }
        }
        Ok(())
    }
}

impl<'t> WriteTransaction<'t> {
    /// Over a transaction that was just begun, and that can be committed once [`settle`](Self::settle) was called and this
    /// value, and with it every table, is gone.
    pub(crate) fn over(raw: &'t redb::WriteTransaction) -> Self {
        WriteTransaction { raw, tables: RefCell::default() }
    }

    /// Puts into the tables what the closures wrote.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn settle(&self) -> Result<(), StoreError> {
        let tables = self.tables.borrow();
        tables.iter().try_for_each(|place| place.table.try_borrow_mut().map_err(|_| in_use(place.name))?.settle())
    }

    /// The tables that something was written to.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] while one is being changed.
    pub(crate) fn changed(&self) -> Result<Vec<&'static str>, StoreError> {
        let mut names = Vec::new();
        for place in self.tables.borrow().iter() {
            if place.table.try_borrow().map_err(|_| in_use(place.name))?.changed {
                names.push(place.name);
            }
        }
        Ok(names)
    }

    /// Runs `look` on the table called `name`, which is made if there was none.
    ///
    /// # Errors
    /// Those of `look`; [`StoreError::Misuse`] when something that is no byte table has that name.
    pub(crate) fn look<R, E: From<StoreError>>(
        &self,
        name: &'static str,
        look: impl FnOnce(&Opened<'t>) -> Result<R, E>,
    ) -> Result<R, E> {
        let place = self.place(name)?;
        // While it is being scanned nothing can be put, so that a look inside of a scan finds nothing to settle.
        let unsettled = !place.table.try_borrow().map_err(|_| in_use(name))?.pending.is_empty();
        if unsettled {
            place.table.try_borrow_mut().map_err(|_| in_use(name))?.settle()?;
        }
        // Changes run no code of a caller's, so a look inside of one cannot be.
        let held = place.table.try_borrow().map_err(|_| in_use(name))?;
        look(&held.table)
    }

    /// Runs `look` on the value under `key` in the table called `name`, which is made if there was none.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub(crate) fn row<R>(
        &self,
        name: &'static str,
        key: &[u8],
        look: impl FnOnce(Option<&[u8]>) -> R,
    ) -> Result<R, StoreError> {
        let place = self.place(name)?;
        let held = place.table.try_borrow().map_err(|_| in_use(name))?;
        held.with(key, look)
    }

    /// Runs `look` on the row with the highest key.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub(crate) fn last<R>(
        &self,
        name: &'static str,
        look: impl FnOnce(Option<(&[u8], &[u8])>) -> R,
    ) -> Result<R, StoreError> {
        let place = self.place(name)?;
        if let Ok(mut held) = place.table.try_borrow_mut() {
            return held.last(look);
        }
        // It is being scanned, and nothing waits for it.
        let held = place.table.try_borrow().map_err(|_| in_use(name))?;
        let last = held.table.last()?;
        Ok(look(last.as_ref().map(|(key, value)| (key.value(), value.value()))))
    }

    /// Sets the value under `key` in the table called `name`, which is made if there was none; `None` removes it.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] while the table is being scanned, and when something that is no byte table has that name.
    pub(crate) fn set(&self, name: &'static str, key: Vec<u8>, value: Option<Vec<u8>>) -> Result<(), StoreError> {
        let place = self.place(name)?;
        place.table.try_borrow_mut().map_err(|_| in_use(name))?.set(key, value)
    }

    /// Runs `change` on the table called `name`, which is made if there was none.
    ///
    /// # Errors
    /// Those of `change`; otherwise as [`set`](Self::set).
    pub(crate) fn change<R>(
        &self,
        name: &'static str,
        change: impl FnOnce(&mut Opened<'t>) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        let place = self.place(name)?;
        let mut held = place.table.try_borrow_mut().map_err(|_| in_use(name))?;
        held.settle()?;
        held.changed = true;
        change(&mut held.table)
    }

    fn place(&self, name: &'static str) -> Result<Rc<Place<'t>>, StoreError> {
        let mut tables = self.tables.borrow_mut();
        if let Some(place) = tables.iter().find(|place| place.name == name) {
            return Ok(Rc::clone(place));
        }
        let table = self.raw.open_table(TableDefinition::new(name))?;
        let table = RefCell::new(Held {
            table,
            pending: BTreeMap::new(),
            bytes: 0,
            highest: None,
            failed: None,
            changed: false,
        });
        let place = Rc::new(Place { name, table });
        tables.push(Rc::clone(&place));
        Ok(place)
    }
}

fn in_use(name: &str) -> StoreError {
    StoreError::Misuse(format!("table {name} cannot be changed by what is scanning it"))
}
