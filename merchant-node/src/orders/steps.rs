//! One step of an order: does the next outside effect that its stage calls for and says what the order is then. Every
//! effect is repeatable, so a step whose outcome was lost is simply done again.

use protocol::api::{Reserve, SalesRequest, SalesResponse, TransactionState};
use protocol::manifest::KeyPolicy;
use protocol::ticket::{Endorsement, Lease, TicketEnvelope, TransactionData};
use protocol::trust::Trust;
use protocol::{Refusal, RefusalCode, Signed, TransactionId};

use super::{Failure, Order, Stage, verify};
use crate::clock::now_ms;
use crate::link::{AskError, Fate};
use crate::payments::PaymentError;
use crate::shop::Shop;

/// What an order is after a step.
pub(crate) struct Next {
    /// The order, at its next stage.
    pub(crate) order: Order,
    /// Its ticket, when it came with this step.
    pub(crate) ticket: Option<Box<TicketEnvelope>>,
}

impl From<Order> for Next {
    fn from(order: Order) -> Self {
        Next { order, ticket: None }
    }
}

/// Nothing can be done now; why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Pause(pub(crate) String);

impl From<PaymentError> for Pause {
    fn from(error: PaymentError) -> Self {
        Pause(error.to_string())
    }
}

fn at(mut order: Order, stage: Stage) -> Order {
    order.stage = stage;
    order
}

fn unexpected() -> Pause {
    Pause("the manager answered something else than was asked".to_owned())
}

impl Shop {
    /// Does what the order's stage calls for. An order at rest comes back as it is.
    pub(crate) async fn advance(&self, order: Order) -> Result<Next, Pause> {
        let now = now_ms();
        match order.stage {
            Stage::Received => self.authorise(order, now).await,
            Stage::Authorised => self.reserve(order, now).await,
            Stage::Reserved => self.release(order).await,
            Stage::Released if order.policy == Some(KeyPolicy::OnCompletion) => {
                Ok(at(order, Stage::AwaitingCompletion).into())
            }
            Stage::Released | Stage::Completed => {
                self.provider(&order)?.capture(order.authorisation, now).await?;
                Ok(at(order, Stage::Done).into())
            }
            Stage::Refunding => self.revoke(order).await,
            Stage::Voiding => self.give_back(order, now).await,
            Stage::AwaitingCompletion
            | Stage::Done
            | Stage::Declined
            | Stage::Cancelled
            | Stage::Expired
            | Stage::Refunded => Ok(order.into()),
        }
    }

    fn provider(&self, order: &Order) -> Result<&dyn crate::payments::PaymentProvider, Pause> {
        self.providers
            .get(order.provider.as_str())
            .map(AsRef::as_ref)
            .ok_or_else(|| Pause(format!("payment provider '{}' is not set up here any more", order.provider)))
    }

    fn too_late(&self, order: &Order, now: u64) -> bool {
        now > order.created_at.saturating_add(self.config.pending_ms)
    }

    async fn authorise(&self, mut order: Order, now: u64) -> Result<Next, Pause> {
        if self.too_late(&order, now) {
            return Ok(order.failing(Stage::Expired, late()).into());
        }
        // No money is held for what the manager will not sell.
        if let Some(why) = self.link.revoked() {
            let refusal = Refusal::new(RefusalCode::Revoked, why);
            return Ok(order.failing(Stage::Cancelled, Failure::refused(&refusal)).into());
        }
        let provider = self.provider(&order)?;
        match provider.authorise(order.authorisation, &order.reference, order.amount, now).await {
            Ok(()) => {
                order.authorised_at = now;
                Ok(at(order, Stage::Authorised).into())
            }
            Err(PaymentError::Unavailable(why)) => Err(Pause(format!("payment provider unavailable: {why}"))),
            Err(error) => {
                order.failure = Some(Failure::declined(error.to_string()));
                Ok(at(order, Stage::Declined).into())
            }
        }
    }

    /// Steps 4 to 6. The manager may have reserved before: it answers the same again. It may have released, too, if this node
    /// came back from a backup: it is asked before an order is let go whose time is over.
    async fn reserve(&self, mut order: Order, now: u64) -> Result<Next, Pause> {
        let too_late = self.too_late(&order, now);
        let request = Reserve {
            order: order.id.to_string(),
            body: order.body(),
            product: order.product,
            client: order.client,
            price: order.amount,
            salt: order.price_salt,
            payment: order.payment_commitment(),
        };
        let (data, expires_at) = match self.link.sales(SalesRequest::Reserve(request)).await {
            Ok(SalesResponse::Reserved { data, expires_at }) => (data, expires_at),
            Ok(_) => return Err(unexpected()),
            // Sold since the backup, perhaps: then its price is due. A refusal is of one that was not: a manager answers for
            // what it reserved before it asks whether it may sell.
            Err(AskError::Away(why)) if self.restored_at.is_some_and(|at| order.created_at <= at) => {
                return Err(Pause(why));
            }
            // It may have answered each time, and said why not yet.
            Err(AskError::Away(why)) if too_late => return Ok(order.failing(Stage::Expired, put_off(&why)).into()),
            Err(_) if too_late => return Ok(order.failing(Stage::Expired, late()).into()),
            Err(error) => {
                if matches!(&error, AskError::Refused(refusal) if refusal.code == RefusalCode::Revoked) {
                    self.link.refused_as_revoked().await;
                }
                return self.refused(order, error);
            }
        };
        let me = self.me();
        let checked = self.with_trust(|trust, now| verify::reserved(&data, &order, me, trust, now)).await?;
        let transaction = match checked {
            Ok(TransactionData { transaction, .. }) => transaction,
            Err(refusal) => {
                tracing::error!(order = %order.id, code = %refusal.code, "the manager's reservation does not hold");
                return Ok(order.failing(Stage::Cancelled, Failure::untrusted(&refusal)).into());
            }
        };
        if too_late {
            let state = self.state_of(transaction).await?;
            // A revoked one may have been sold before, and its price be due: the order goes on, its release is refused, and the
            // list of sales taken back says so.
            let unsold =
                |state| state == TransactionState::Reserved || is_over(state) && state != TransactionState::Revoked;
            if state.is_none_or(unsold) {
                // One that is not taken back expires.
                let cancelled = self.link.sales(SalesRequest::Cancel { transaction }).await;
                tracing::info!(order = %order.id, cancelled = cancelled.is_ok(), "its time is over, and it was not sold");
                return Ok(order.failing(Stage::Expired, late()).into());
            }
            tracing::warn!(order = %order.id, %transaction, "sold before this node came back from a backup: it goes on");
        }
        tracing::info!(step = 4, transaction = %transaction, order = %order.id, "reservation request to the manager");
        tracing::info!(step = 6, transaction = %transaction, order = %order.id, expires_at, "transaction data came");
        let endorsement = Endorsement {
            transaction_data: data.digest(),
            payment: order.payment_commitment(),
            authorised_at: order.authorised_at,
        };
        order.endorsement = Some(Signed::sign(&endorsement, &self.keypair));
        order.data = Some(data);
        order.expires_at = expires_at;
        Ok(at(order, Stage::Reserved).into())
    }

    /// Step 7. Only the manager knows whether it released before an answer was lost, so only its word ends an order
    /// here, never this node's clock.
    async fn release(&self, mut order: Order) -> Result<Next, Pause> {
        let (Some(transaction), Some(endorsement)) = (order.transaction(), order.endorsement.clone()) else {
            return Err(Pause("the order lost its transaction data; restore a backup".to_owned()));
        };
        tracing::info!(step = 7, transaction = %transaction, order = %order.id, "delivery request to the manager");
        let (ticket, policy) = match self.link.sales(SalesRequest::Release { transaction, endorsement }).await {
            Ok(SalesResponse::Released { ticket, policy }) => (ticket, policy),
            Ok(_) => return Err(unexpected()),
            Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::Revoked => {
                return self.released_and_taken_back(order, transaction, refusal).await;
            }
            Err(error) => return self.refused(order, error),
        };
        let mut checked = self.with_trust(|trust, now| verify::released(&ticket, &order, trust, now)).await?;
        if let Ok(lease) = &checked
            && policy == KeyPolicy::AtRelease
            && ticket.grant.is_none()
            && !self.key_comes_later(transaction, lease).await?
        {
            checked = Err(verify::not_ours("the ticket of an at-release product carries no key"));
        }
        if let Err(refusal) = checked {
            tracing::error!(%transaction, order = %order.id, code = %refusal.code, "the manager's ticket does not hold");
            // The manager may hold a good ticket for this sale: it is to be revoked before the money goes back.
            order.failure = Some(Failure::untrusted(&refusal));
            order.ends_as = Some(Stage::Cancelled);
            return Ok(at(order, Stage::Refunding).into());
        }
        tracing::info!(
            step = 8, transaction = %transaction, order = %order.id, client = %order.client, policy = policy.as_str(),
            "transaction data ready for the client"
        );
        order.policy = Some(policy);
        Ok(Next { order: at(order, Stage::Released), ticket: Some(ticket) })
    }

    /// A key is sealed to one lease. Where a release is repeated after a crash, the client may have moved the purchase, or have
    /// lost its lease, since: then the key comes with the next one, for which the client asks.
    async fn key_comes_later(&self, transaction: TransactionId, lease: &Lease) -> Result<bool, Pause> {
        if lease.generation > 0 || lease.delivery > 1 {
            return Ok(true);
        }
        match self.link.sales(SalesRequest::Holder { transaction }).await {
            Ok(SalesResponse::Holder { generation, .. }) => Ok(generation > lease.generation),
            Err(AskError::Away(why)) => Err(Pause(why)),
            Ok(_) | Err(AskError::Refused(_)) => Ok(false),
        }
    }

    /// The answer to a release may have been lost, and the sale been taken back since.
    async fn released_and_taken_back(
        &self,
        order: Order,
        transaction: TransactionId,
        refusal: Refusal,
    ) -> Result<Next, Pause> {
        match self.state_of(transaction).await? {
            Some(state @ TransactionState::Refunded) => {
                Ok(order.failing(Stage::Refunded, Failure::taken_back(state)).into())
            }
            // Its ticket was in the client's mailbox, and its price may be due: the list of sales taken back says so.
            Some(TransactionState::Revoked) => {
                self.desk.was_revoked(order.id);
                self.desk.nudge.notify_one();
                Err(Pause("the manager revoked the sale, and is being asked whether its payment is due".to_owned()))
            }
            _ => self.refused(order, AskError::Refused(refusal)),
        }
    }

    /// A failed call of step 4 or 7.
    fn refused(&self, order: Order, error: AskError) -> Result<Next, Pause> {
        let refusal = match error {
            AskError::Away(why) => return Err(Pause(why)),
            // Too much of this shop is under way at the manager, for now: a credit that is used up has no time to wait.
            AskError::Refused(refusal) if refusal.code == RefusalCode::LimitReached && refusal.retry_after_ms > 0 => {
                return Err(Pause(refusal.to_string()));
            }
            AskError::Refused(refusal) => refusal,
        };
        let stale = [RefusalCode::PriceBelowFloor, RefusalCode::UnknownProduct, RefusalCode::KeyRetired];
        if stale.contains(&refusal.code) {
            self.link.nudge();
        }
        let transaction = order.transaction().map(|id| id.to_string()).unwrap_or_default();
        tracing::warn!(order = %order.id, transaction, code = %refusal.code, detail = refusal.detail, "order refused");
        let end = match refusal.code {
            RefusalCode::ReservationExpired | RefusalCode::Expired => Stage::Expired,
            _ => Stage::Cancelled,
        };
        Ok(order.failing(end, Failure::refused(&refusal)).into())
    }

    /// Has the manager revoke the sale before the money goes back.
    async fn revoke(&self, mut order: Order) -> Result<Next, Pause> {
        let Some(transaction) = order.transaction() else { return Ok(at(order, Stage::Voiding).into()) };
        let refusal = match self.link.sales(SalesRequest::Refund { transaction }).await {
            Ok(SalesResponse::State(state)) if is_over(state) => None,
            Ok(SalesResponse::State(state)) => {
                Some(Refusal::new(RefusalCode::WrongState, format!("the transaction stays {}", state.as_str())))
            }
            Ok(_) => return Err(unexpected()),
            Err(AskError::Away(why)) => return Err(Pause(why)),
            Err(AskError::Refused(refusal)) => Some(refusal),
        };
        let Some(mut refusal) = refusal else {
            tracing::info!(%transaction, order = %order.id, "sale revoked");
            return Ok(at(order, Stage::Voiding).into());
        };
        // Only a sale that was released is one that a manager can have forgotten.
        if refusal.code == RefusalCode::NotYourReservation && order.before_refund.is_some() {
            match self.fate_of(&order).await? {
                Fate::Forgotten => {
                    tracing::warn!(%transaction, order = %order.id, "refunded although the manager forgot the sale");
                    order.failure = Some(Failure::forgotten());
                    return Ok(at(order, Stage::Voiding).into());
                }
                Fate::Unclear(why) => refusal = Refusal::new(refusal.code, why),
                Fate::Known(_) => {}
            }
        }
        let over = self.state_of(transaction).await?.is_some_and(is_over);
        match order.before_refund.take() {
            Some(before) if !over => {
                tracing::warn!(%transaction, order = %order.id, code = %refusal.code, "refund refused by the manager");
                self.desk.note(order.id, format!("refund refused: {refusal}"));
                order.ends_as = None;
                Ok(at(order, before).into())
            }
            _ => Ok(at(order, Stage::Voiding).into()),
        }
    }

    async fn fate_of(&self, order: &Order) -> Result<Fate, Pause> {
        let Some(sale) = order.sale() else { return Ok(Fate::Unclear("the order lost its transaction data")) };
        let fates = self.link.fates(&[sale]).await.map_err(|error| Pause(error.to_string()))?;
        Ok(fates.into_iter().next().unwrap_or(Fate::Unclear("nobody was asked")))
    }

    async fn state_of(&self, transaction: TransactionId) -> Result<Option<TransactionState>, Pause> {
        match self.link.sales(SalesRequest::Status { transactions: vec![transaction] }).await {
            Ok(SalesResponse::States(states)) => Ok(states.first().copied().flatten()),
            Ok(_) => Err(unexpected()),
            Err(error) => Err(Pause(error.to_string())),
        }
    }

    async fn give_back(&self, mut order: Order, now: u64) -> Result<Next, Pause> {
        let provider = self.provider(&order)?;
        match provider.void(order.authorisation, now).await {
            Ok(()) => {}
            Err(PaymentError::Captured) => provider.refund(order.authorisation, now).await?,
            Err(error) => return Err(error.into()),
        }
        let end = order.ends_as.unwrap_or(Stage::Cancelled);
        tracing::info!(order = %order.id, end = end.as_str(), amount = %order.amount, "money given back");
        order.failure = order.failure.map(Failure::given_back);
        Ok(at(order, end).into())
    }

    /// Verifies with the network's keys; once more with fresh ones when they do not hold the signing key.
    async fn with_trust<T>(
        &self,
        verify: impl Fn(&Trust, u64) -> Result<T, Refusal>,
    ) -> Result<Result<T, Refusal>, Pause> {
        let trust = self.link.trust().ok_or_else(|| Pause("the network's keys are not here yet".to_owned()))?;
        match verify(&trust, now_ms()) {
            Err(refusal) if refusal.code == RefusalCode::UnknownKey => {
                self.link.fetch_keys().await.map_err(|error| Pause(error.to_string()))?;
                let trust = self.link.trust().unwrap_or(trust);
                Ok(verify(&trust, now_ms()))
            }
            result => Ok(result),
        }
    }
}

/// No goods will flow for it any more.
pub(crate) fn is_over(state: TransactionState) -> bool {
    matches!(
        state,
        TransactionState::Refunded
            | TransactionState::Revoked
            | TransactionState::Expired
            | TransactionState::Cancelled
    )
}

fn put_off(why: &str) -> Failure {
    let message = format!("the manager sold nothing in time and the payment was let go: {why}");
    Failure { message, ..late() }
}

fn late() -> Failure {
    Failure {
        status: 502,
        code: "manager-away".to_owned(),
        message: "the manager could not be reached in time; nothing was sold and the payment was let go".to_owned(),
    }
}
