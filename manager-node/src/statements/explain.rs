//! What became of one receipt. Only the seeder that made it is told: its name leads to the entry, so that nobody else's
//! question finds anything.

use protocol::statement::Explanation;
use protocol::{Digest, PeerId, Refusal, RefusalCode};

use super::{BOOKS, EARNINGS, Entry, FATES, JOURNAL, statement_of};
use crate::context::{Context, now_ms};
use crate::transactions::{SaleError, get_delivery};

/// The fate of a receipt of this seeder.
pub(crate) fn explain(ctx: &Context, seeder: PeerId, receipt: Digest) -> Result<Explanation, SaleError> {
    ctx.db.read(|txn| {
        let unknown = || {
            let detail = "no receipt of this seeder with this id is known here: it did not come in, came in above the \
                number that is kept, or is in a statement of long ago";
            SaleError::from(Refusal::new(RefusalCode::BadReceipt, detail))
        };
        let fate = FATES.get(txn, &(seeder, receipt))?.ok_or_else(unknown)?;
        let entry = JOURNAL.get(txn, &(seeder, fate.sequence))?.ok_or_else(unknown)?;
        let books = BOOKS.get(txn, &seeder)?.unwrap_or_default();
        let statement = statement_of(&ctx.archive, txn, &seeder, &books, &entry, fate.sequence)?;
        let Entry::Receipt(line) = entry else { return Err(unknown()) };
        let (mut earning, mut due_at) = (None, None);
        if let Some(id) = line.delivery {
            if let Some(found) = EARNINGS.get(txn, &(seeder, id.transaction, id.delivery))?
                && let Some(Entry::Earning(line)) = JOURNAL.get(txn, &(seeder, found.sequence))?
            {
                earning = Some(line);
            }
            due_at = get_delivery(txn, id)?.filter(|d| d.closed.is_none()).map(|delivery| delivery.due_at);
        }
        // What was unknown before that was unknown to a manager that had forgotten nothing.
        let restored_at = ctx.came_back(now_ms()).filter(|restored| *restored <= line.at);
        Ok(Explanation { line, repeats: fate.repeats, statement, earning, due_at, restored_at })
    })
}
