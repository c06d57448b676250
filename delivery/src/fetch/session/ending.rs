//! The last word to a seeder, and what is still given to one that ended the delivery itself.

use futures::StreamExt;
use protocol::Signed;
use protocol::deliver::ClientMessage;
use protocol::fetching::SessionEvent;
use protocol::receipt::Completion;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::super::end::EndReason;
use super::super::incoming::Incoming;
use super::{Conversation, LAST_ACK};
use crate::clock::now_ms;

impl Conversation {
    /// Everything is here, or is to end: the last acknowledgement, and the seeder's word that it is durable.
    pub(super) async fn finish(
        &mut self,
        completion: Option<Signed<Completion>>,
        from: &mut mpsc::Receiver<Incoming>,
    ) -> Result<std::convert::Infallible, EndReason> {
        self.drain().await?;
        let complete = completion.is_some();
        let message = self.machine.finish(&self.shared.keypair, completion, now_ms());
        if let ClientMessage::Finish { ack: Some(ack), .. } = &message {
            self.remember(ack.clone()).await;
        }
        self.say(&message).await?;
        if complete {
            let transaction = self.shared.terms.delivery.transaction;
            tracing::info!(step = 12, %transaction, seeder = %self.id.peer, "completion given to the seeder");
        }
        loop {
            let Some(incoming) = from.recv().await else {
                return Err(EndReason::Closed("the stream ended before the last word".to_owned()));
            };
            let message = match incoming {
                Incoming::Message(message) => message,
                // It was on its way already, and is here from elsewhere.
                Incoming::Chunk { .. } => continue,
                Incoming::Closed(why) => return Err(EndReason::Closed(why)),
            };
            match self.machine.message(message, &self.shared.keypair.peer_id())? {
                SessionEvent::Finished => return Err(EndReason::Finished),
                SessionEvent::Refused(refusal) => return Err(EndReason::Refused(refusal)),
                _ => {}
            }
        }
    }

    /// Waits for the chunks that are being written.
    async fn drain(&mut self) -> Result<(), EndReason> {
        while let Some(written) = self.writing.next().await {
            self.written(written).await?;
        }
        Ok(())
    }

    /// After the end: what was received and verified is acknowledged on paper, so that the next stream, today or after
    /// a restart, begins with it.
    pub(super) async fn settle(mut self, mut reason: EndReason) -> EndReason {
        while let Some(written) = self.writing.next().await {
            // A full disk or a bad chunk is the better reason than a closed stream.
            if let Err(found) = self.written(written).await
                && matches!(found, EndReason::Disk(_) | EndReason::BadChunk(_))
            {
                reason = found;
            }
        }
        if let Some(ack) = self.machine.ack(&self.shared.keypair, now_ms()) {
            self.last_ack = Some(ack);
            self.unsaved = true;
        }
        self.save_last().await;
        if self.machine.is_open() && reason.takes_last_ack() {
            let _ = tokio::time::timeout(LAST_ACK, self.give_last_ack()).await;
        }
        reason
    }

    /// The seeder ended the delivery by no fault of its own, and hears for a moment what it is paid by.
    async fn give_last_ack(&mut self) {
        let finish = ClientMessage::Finish { ack: self.last_ack.clone(), completion: None };
        // Ended in order: what was said last is not lost to a reset.
        if self.last_ack.is_some() && self.say(&finish).await.is_ok() {
            let _ = self.writer.shutdown().await;
        }
    }
}
