//! A buyer has lost the key that a purchase is bound to: the shop, which knows its customer, has the manager give the
//! purchase to another peer. The shop signs for it, and the manager keeps that word.

use protocol::api::{SalesRequest, SalesResponse};
use protocol::entitlement::Recovery;
use protocol::{PeerId, Refusal, RefusalCode, Signed, TransactionId};
use store::StoreError;

use crate::clock::now_ms;
use crate::link::AskError;
use crate::orders::{OrderId, Stage};
use crate::shop::Shop;

/// Times that the purchase may move on under our hands before we give up: its holder moves it, too.
const TRIES: u32 = 3;

/// Who has a purchase now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) transaction: TransactionId,
    pub(crate) client: PeerId,
    pub(crate) generation: u32,
}

/// Why a purchase stays where it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoverError {
    #[error("there is no order {0}")]
    Unknown(OrderId),
    #[error("the order is {}: only what was released can be given to another peer", .0.as_str())]
    Stage(Stage),
    #[error("the manager did not answer, repeat the command: {0}")]
    Away(String),
    #[error("the manager refused: {0}")]
    Refused(Refusal),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<AskError> for RecoverError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Away(why) => RecoverError::Away(why),
            AskError::Refused(refusal) => RecoverError::Refused(refusal),
        }
    }
}

impl Shop {
    /// Gives an order's purchase to `to`. Repeating it finds it there and changes nothing.
    pub(crate) async fn recover(&self, id: OrderId, to: PeerId) -> Result<Holder, RecoverError> {
        let order = self.order(&id)?.ok_or(RecoverError::Unknown(id))?;
        let released =
            matches!(order.stage, Stage::Released | Stage::AwaitingCompletion | Stage::Completed | Stage::Done);
        let (true, Some(transaction)) = (released, order.transaction()) else {
            return Err(RecoverError::Stage(order.stage));
        };
        let (mut tries, mut refused) = (1, None);
        loop {
            let holder = holder_of(transaction, self.link.sales(SalesRequest::Holder { transaction }).await?)?;
            // Unless a restored manager's books are behind: then it is given anew to who has it.
            if holder.client == to && refused == Some(holder.generation) {
                return Ok(holder);
            }
            let word = Recovery {
                network: self.link.join().network(),
                transaction,
                to,
                generation: holder.generation.saturating_add(1),
                at: now_ms(),
            };
            let word = Signed::sign(&word, &self.keypair);
            match self.link.sales(SalesRequest::Recover { word }).await {
                Ok(answer) => {
                    let moved = holder_of(transaction, answer)?;
                    tracing::warn!(order = %id, %transaction, from = %holder.client, %to, "purchase recovered");
                    return Ok(moved);
                }
                // It moved between the question and the word.
                Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::WrongState && tries < TRIES => {
                    (tries, refused) = (tries + 1, Some(holder.generation));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn holder_of(transaction: TransactionId, answer: SalesResponse) -> Result<Holder, RecoverError> {
    match answer {
        SalesResponse::Holder { client, generation } => Ok(Holder { transaction, client, generation }),
        _ => Err(RecoverError::Away("the manager answered something else than was asked".to_owned())),
    }
}
