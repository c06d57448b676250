//! A client that complains of a seeder which did nothing wrong.

use node::Protocol;
use protocol::api::{MAILBOX_PROTOCOL, MailboxRequest, MailboxResponse};
use protocol::{Keypair, PeerAddrs, PeerId, TransactionId};

use super::{LIMIT, PresentError, as_peer};

/// Tells the manager that in this purchase `seeder` sent something else as this chunk.
///
/// # Errors
/// [`PresentError`] when the manager does not take it.
pub async fn complain(
    client: &Keypair,
    manager: &PeerAddrs,
    transaction: TransactionId,
    seeder: PeerId,
    chunk: u32,
) -> Result<(), PresentError> {
    as_peer(client, async |node| {
        let complaint = MailboxRequest::Complain { transaction, seeder, chunk };
        let answer = node.call(manager, Protocol::new(MAILBOX_PROTOCOL), &complaint, LIMIT).await;
        match answer {
            Ok(MailboxResponse::Noted) => Ok(()),
            Ok(_) => Err(PresentError::NoAnswer("did not note the complaint")),
            Err(error) => Err(PresentError::Call(error)),
        }
    })
    .await
}
