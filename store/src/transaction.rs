//! One write transaction, and the tables that are open in it. Opening a table looks it up in the file's directory of
//! tables, closing it writes that directory; a receipt makes thirty small reads and writes and a batch has hundreds
//! of receipts, so a table is opened once and stays open until the transaction ends.

use std::cell::RefCell;
use std::rc::Rc;

use redb::{ReadOnlyTable, TableDefinition, TableError};

use crate::StoreError;

type Bytes = &'static [u8];

/// A table open for writing.
pub(crate) type Opened<'t> = redb::Table<'t, Bytes, Bytes>;

/// A snapshot that [`Table`](crate::Table)s are read from.
pub struct ReadTransaction {
    raw: redb::ReadTransaction,
    /// The tables opened so far, as in a [`WriteTransaction`].
    tables: RefCell<Vec<(&'static str, Rc<Seen>)>>,
}

/// A table open for reading.
pub(crate) type Seen = ReadOnlyTable<Bytes, Bytes>;

impl ReadTransaction {
    pub(crate) fn over(raw: redb::ReadTransaction) -> Self {
        ReadTransaction { raw, tables: RefCell::default() }
    }

    pub(crate) fn raw(&self) -> &redb::ReadTransaction {
        &self.raw
    }

    /// The table called `name`; `None` when there is no such table yet.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] when something that is no byte table has that name.
    pub(crate) fn table(&self, name: &'static str) -> Result<Option<Rc<Seen>>, StoreError> {
        let mut tables = self.tables.borrow_mut();
        if let Some((_, table)) = tables.iter().find(|(known, _)| *known == name) {
            return Ok(Some(Rc::clone(table)));
        }
        match self.raw.open_table(TableDefinition::new(name)) {
            Ok(table) => {
                let table = Rc::new(table);
                tables.push((name, Rc::clone(&table)));
                Ok(Some(table))
            }
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
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
    table: RefCell<Opened<'t>>,
}

impl<'t> WriteTransaction<'t> {
    /// Over a transaction that was just begun, and that can be committed once this value, and with it every table, is
    /// gone.
    pub(crate) fn over(raw: &'t redb::WriteTransaction) -> Self {
        WriteTransaction { raw, tables: RefCell::default() }
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
        // Changes run no code of a caller's, so a look inside of one cannot be.
        let table = place.table.try_borrow().map_err(|_| in_use(name))?;
        look(&table)
    }

    /// Runs `change` on the table called `name`, which is made if there was none.
    ///
    /// # Errors
    /// Those of `change`; [`StoreError::Misuse`] while the table is being scanned, and when something that is no byte
    /// table has that name.
    pub(crate) fn change<R>(
        &self,
        name: &'static str,
        change: impl FnOnce(&mut Opened<'t>) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        let place = self.place(name)?;
        let mut table = place.table.try_borrow_mut().map_err(|_| in_use(name))?;
        change(&mut table)
    }

    fn place(&self, name: &'static str) -> Result<Rc<Place<'t>>, StoreError> {
        let mut tables = self.tables.borrow_mut();
        if let Some(place) = tables.iter().find(|place| place.name == name) {
            return Ok(Rc::clone(place));
        }
        let table = RefCell::new(self.raw.open_table(TableDefinition::new(name))?);
        let place = Rc::new(Place { name, table });
        tables.push(Rc::clone(&place));
        Ok(place)
    }
}

fn in_use(name: &str) -> StoreError {
    StoreError::Misuse(format!("table {name} cannot be changed by what is scanning it"))
}
