//! What is acknowledged is on this disk before the seeder hears of it.

use std::sync::Arc;

use protocol::Signed;
use protocol::deliver::ClientMessage;
use protocol::receipt::Ack;

use super::super::end::EndReason;
use super::{Conversation, What};
use crate::clock::now_ms;

impl Conversation {
    pub(super) async fn acknowledge(&mut self) -> Result<(), EndReason> {
        let Some(ack) = self.machine.ack(&self.shared.keypair, now_ms()) else { return Ok(()) };
        self.remember(ack.clone()).await;
        self.say(&ClientMessage::Ack(ack)).await?;
        self.report(What::Budget(self.budget())).await
    }

    /// Saves an acknowledgement before it is sent: a client that is killed after that must find what is in it, or it would
    /// fetch that from others and acknowledge it to them, too.
    pub(super) async fn remember(&mut self, ack: Signed<Ack>) {
        self.last_ack = Some(ack);
        self.unsaved = true;
        self.save_last().await;
    }

    /// Returns once the newest acknowledgement is saved.
    pub(super) async fn save_last(&mut self) {
        // Broken off while it waits, it waits for the same when it is called again: an older one is never saved later.
        if let Some(saving) = &mut self.saving {
            let _ = saving.await;
            self.saving = None;
        }
        if let (true, Some(ack)) = (self.unsaved, self.last_ack.clone()) {
            self.unsaved = false;
            let (acks, peer) = (Arc::clone(&self.shared.acks), self.id.peer);
            let saving = self.saving.insert(tokio::task::spawn_blocking(move || acks.save(&peer, &ack)));
            let _ = saving.await;
            self.saving = None;
        }
    }
}
