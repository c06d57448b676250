//! Evidence of one transaction: what is stored of it, put into one file that proves itself; and the manager's word that
//! nothing had been acknowledged by a given time, which only the manager can give.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bincode::{Decode, Encode};
use protocol::evidence::{DeliveryRecord, EvidencePack, Exporter, NonDelivery};
use protocol::trust::KeyPurpose;
use protocol::utc::Utc;
use protocol::{Refusal, RefusalCode, Signed, TransactionId, wire};
use serde::Deserialize;
use serde_json::{Value, json};
use store::{StoreError, Table, Txn, WriteTransaction};

use crate::archive::Whole;
use crate::context::{Context, now_ms};
use crate::transactions::{MOVES, PAID_DELIVERY, Sale, SaleError, Word};

/// When the first acknowledgement or completion of a transaction came in, whether it counted or not.
const HEARD: Table<TransactionId, Heard> = Table::new("first-words");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Heard {
    /// Unix milliseconds.
    at: u64,
}

wire!(Heard => 16);

/// Notes that something of a transaction was acknowledged, which came in at `at`. The time of this moment stands for it, on
/// the writer's thread: by the time when it came in nothing was stored of it, and the manager may have signed just that.
pub(crate) fn heard(txn: &WriteTransaction<'_>, id: TransactionId, at: u64) -> Result<(), StoreError> {
    heard_at(txn, id, at.max(now_ms()))
}

/// The same at its time: in whatever order it is told, the first stays.
pub(crate) fn heard_at(txn: &WriteTransaction<'_>, id: TransactionId, at: u64) -> Result<(), StoreError> {
    match HEARD.get(txn, &id)? {
        Some(first) if first.at <= at => Ok(()),
        _ => HEARD.put(txn, &id, &Heard { at }),
    }
}

/// Takes the note out again, of a transaction that moves out of the store.
pub(crate) fn forget(txn: &WriteTransaction<'_>, id: &TransactionId) -> Result<bool, StoreError> {
    HEARD.delete(txn, id)
}

/// When something of a transaction was first acknowledged, unix milliseconds.
pub(crate) fn first_at(txn: &impl Txn, id: &TransactionId) -> Result<Option<u64>, StoreError> {
    Ok(HEARD.get(txn, id)?.map(|heard| heard.at))
}

/// The transaction, wherever it lies.
fn whole(ctx: &Context, txn: &impl Txn, id: TransactionId) -> Result<Whole, SaleError> {
    let unknown = || Refusal::new(RefusalCode::NotEntitled, format!("there is no transaction {id}"));
    let mut whole = ctx.archive.whole(txn, &id)?.ok_or_else(unknown)?;
    // The first word may have come in after it moved out.
    whole.first_at = whole.first_at.into_iter().chain(first_at(txn, &id)?).min();
    Ok(whole)
}

/// When this manager last came back from a backup, where that was after the sale was formed: of such a sale it may have
/// forgotten what came in, and what seeders send again comes in late.
pub(crate) fn restored_at(ctx: &Context, sale: &Sale, now: u64) -> Result<Option<u64>, SaleError> {
    let formed_at = sale.data.peek().map_err(Refusal::from)?.formed_at;
    Ok(ctx.came_back(now).filter(|restored| formed_at < *restored))
}

/// Everything signed of a transaction, as it is stored now.
pub(crate) fn pack(ctx: &Context, id: TransactionId, now: u64) -> Result<EvidencePack, SaleError> {
    ctx.db.read(|txn| {
        let whole = whole(ctx, txn, id)?;
        let sale = &whole.sale;
        let mut pack = EvidencePack::new(Exporter::Manager, now, sale.data.clone());
        pack.key_sets = crate::keys::remembered(txn, EvidencePack::MAX_KEY_SETS)?;
        pack.manifest = ctx.catalogue.manifest(&sale.manifest)?;
        let mut record = DeliveryRecord {
            network: ctx.network(),
            transaction: id,
            transaction_data: sale.data.digest(),
            order: sale.request.body,
            state: sale.state,
            at: now,
            released_at: None,
            first_at: whole.first_at,
            completed_at: None,
            closed_at: None,
            restored_at: restored_at(ctx, sale, now)?,
            leases: Vec::new(),
        };
        if let Some(release) = &sale.release {
            pack.endorsement = Some(release.endorsement.clone());
            pack.leases.push(release.lease.clone());
            record.released_at = Some(release.at);
            record.completed_at = release.completed_at;
        }
        // Whoever had it before signed acknowledgements, too: theirs count by their own leases, newest first.
        let moves = MOVES.prefix(txn, &id, EvidencePack::MAX_MOVES)?;
        for (_, moved) in &moves {
            match &moved.word {
                Word::Holder(word) => pack.moves.push(word.clone()),
                Word::Merchant(word) => pack.recoveries.push(word.clone()),
            }
        }
        let leases = moves.into_iter().rev().map(|(_, moved)| moved.lease);
        pack.leases.extend(leases.take(EvidencePack::MAX_LEASES - 1));
        record.leases = pack.leases.iter().map(Signed::digest).collect();
        let paid = whole.delivery(PAID_DELIVERY);
        record.closed_at = paid.and_then(|delivery| delivery.closed.as_ref()).map(|closed| closed.at);
        for (_, _, ack) in whole.acks.iter().take(EvidencePack::MAX_ACKS * 4) {
            pack.add_ack(ack.clone());
        }
        let mut left_out = whole.acks.len().saturating_sub(EvidencePack::MAX_ACKS * 4);
        // The first is of the delivery that is paid, the others newest first.
        let (first, later) = whole.completions.split_at(whole.completions.len().min(1));
        let room = EvidencePack::MAX_LEASES - first.len();
        let completions = first.iter().chain(later.iter().rev().take(room));
        pack.completions = completions.map(|(_, signed)| signed.clone()).collect();
        left_out = left_out.saturating_add(later.len().saturating_sub(room));
        pack.about.left_out = pack.about.left_out.saturating_add(u32::try_from(left_out).unwrap_or(u32::MAX));
        // By a key that is not here nothing can be said; what others signed proves itself.
        let may = ctx.may_sign(KeyPurpose::Settlement).is_ok();
        pack.record = may.then(|| ctx.keys.sign(KeyPurpose::Settlement, &record));
        Ok(pack)
    })
}

/// This moment, once it is over and everything that was being counted in it is stored: what comes now is dated later.
fn moment(ctx: &Context) -> Result<u64, StoreError> {
    let now = now_ms();
    while now_ms() == now {
        std::thread::sleep(Duration::from_millis(1));
    }
    ctx.db.write_blocking(|_| Ok::<_, StoreError>(()))?;
    Ok(now)
}

/// The same with the manager's word that nothing had been acknowledged by `by`. `now` is such a [`moment`].
fn non_delivery(ctx: &Context, id: TransactionId, by: u64, now: u64) -> Result<EvidencePack, SaleError> {
    if by > now {
        let detail =
            format!("{} is still to come (it is {} here), and of that time nothing can be said yet", Utc(by), Utc(now));
        return Err(Refusal::new(RefusalCode::NotYetValid, detail).at(now).into());
    }
    // What comes in once it is set right would be dated before what was signed.
    if let Some(held) = ctx.clock_trouble(now) {
        let detail = format!("{held}: by it nothing can be said of any time; set it");
        return Err(Refusal::new(RefusalCode::WrongState, detail).at(now).into());
    }
    let Whole { sale, first_at, .. } = ctx.db.read(|txn| whole(ctx, txn, id))?;
    let formed_at = sale.data.peek().map_err(Refusal::from)?.formed_at;
    if by < formed_at {
        let detail = format!(
            "the sale was formed at {}, after {}: of a time before it nothing is said",
            Utc(formed_at),
            Utc(by)
        );
        return Err(Refusal::new(RefusalCode::WrongState, detail).into());
    }
    // What was counted meanwhile is of the time after `now`, and of no wrong clock.
    if let Some(first) = first_at.filter(|first| *first > now_ms()) {
        let detail = format!(
            "something came in that is dated {}, when this manager's clock was ahead (it is {} now): of the time \
             before nothing can be said",
            Utc(first),
            Utc(now)
        );
        return Err(Refusal::new(RefusalCode::WrongState, detail).at(now).into());
    }
    if let Some(first) = first_at.filter(|first| *first <= by) {
        let detail =
            format!("the first acknowledgement or completion came in at {}, not after {}", Utc(first), Utc(by));
        return Err(Refusal::new(RefusalCode::WrongState, detail).into());
    }
    let restored_at = restored_at(ctx, &sale, now)?;
    if let Some(restored) = restored_at.filter(|restored| by < *restored) {
        let detail = format!(
            "this manager came back from a backup at {} and may have forgotten what came in before; it can \
             speak of times from {} on, and only of what came in since",
            Utc(restored),
            Utc(restored)
        );
        return Err(Refusal::new(RefusalCode::WrongState, detail).at(now).into());
    }
    ctx.may_sign(KeyPurpose::Settlement)?;
    let mut pack = pack(ctx, id, now)?;
    let word = NonDelivery {
        network: ctx.network(),
        transaction: id,
        transaction_data: sale.data.digest(),
        by,
        issued_at: now,
        restored_at,
    };
    pack.non_delivery = Some(ctx.keys.sign(KeyPurpose::Settlement, &word));
    Ok(pack)
}

#[derive(Deserialize)]
pub(crate) struct EvidenceArgs {
    id: TransactionId,
    path: PathBuf,
    #[serde(default)]
    non_delivery: bool,
    /// Of the non-delivery, unix milliseconds; now where it is absent.
    by: Option<u64>,
}

/// Writes the file that the operator asked for.
pub(crate) fn control(ctx: &Context, args: EvidenceArgs) -> Result<Value, SaleError> {
    let pack = match args.non_delivery {
        true => {
            let now = moment(ctx)?;
            non_delivery(ctx, args.id, args.by.unwrap_or(now), now)?
        }
        false => pack(ctx, args.id, now_ms())?,
    };
    let bytes = pack.to_bytes();
    write_new(&args.path, &bytes)?;
    Ok(json!({
        "path": args.path, "bytes": bytes.len(), "transaction": args.id, "acknowledgements": pack.acks.len(),
        "left_out": pack.about.left_out, "completions": pack.completions.len(), "non_delivery": pack.non_delivery.is_some(),
    }))
}

/// Writes a file that is whole or not there, and replaces none.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), SaleError> {
    let failed = |error: std::io::Error| {
        SaleError::from(Refusal::new(RefusalCode::WrongState, format!("cannot write {}: {error}", path.display())))
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !path.is_absolute() {
        return Err(failed(std::io::Error::other("an absolute path is needed")));
    }
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(failed(error.error)),
    }
}
