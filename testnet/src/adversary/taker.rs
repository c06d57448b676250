//! A client that takes what seeders give it and never says that it got anything, so that nobody is paid for it.

use node::{read_message, write_message};
use protocol::deliver::{ClientMessage, SeederMessage};
use protocol::ticket::TicketEnvelope;
use protocol::{ChunkSet, Keypair, PeerAddrs};
use tokio::io::AsyncReadExt;

use super::{PresentError, as_peer, show};

/// Takes from one seeder, over `streams` streams one after the other, whatever it gives, and acknowledges nothing. Gives
/// how many bytes of content came in all.
///
/// # Errors
/// [`PresentError`] when the seeder cannot be reached.
pub async fn take_and_never_acknowledge(
    taker: &Keypair,
    envelope: &TicketEnvelope,
    chunks: u32,
    seeder: &PeerAddrs,
    streams: usize,
) -> Result<u64, PresentError> {
    as_peer(taker, async |node| {
        let mut taken = 0;
        for _ in 0..streams {
            let Ok(mut stream) = show(&node, envelope.ticket.clone(), seeder).await? else { continue };
            let want = ClientMessage::Want { chunks: ChunkSet::from_range(0..chunks) };
            // A seeder that has had enough of this client may have closed the stream already.
            let _ = write_message(&mut stream, &want).await;
            // Until it is sent away, which is by name.
            while let Ok(Some(message)) = read_message::<SeederMessage, _>(&mut stream).await {
                match message {
                    SeederMessage::Chunk { length, .. } => {
                        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
                        if stream.read_exact(&mut bytes).await.is_err() {
                            break;
                        }
                        taken += u64::from(length);
                    }
                    SeederMessage::Refusal(_) => break,
                    _ => {}
                }
            }
        }
        Ok(taken)
    })
    .await
}
