//! Who works on which order: an order is driven by one task at a time, however many requests and chores want it to
//! move, and each of them can wait for that task's outcome.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::ticket::TicketEnvelope;
use store::{Step, StoreError};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::{Failure, Order, OrderId, Stage, put_order};
use crate::clock::{back_off, now_ms};
use crate::shop::Shop;
use crate::tables::{BY_TIME, KEYS, KeyRecord, OPEN, ORDERS, TICKETS};

/// Orders in hand.
#[derive(Default)]
pub(crate) struct Desk {
    state: Mutex<State>,
    /// Looks at open orders now.
    pub(crate) nudge: Notify,
}

#[derive(Default)]
struct State {
    /// Orders being driven; bounded by the places for purchases and the chore's own.
    active: HashMap<OrderId, watch::Receiver<bool>>,
    /// Orders that wait; bounded by the number of open orders.
    waiting: HashMap<OrderId, Waiting>,
    /// Open orders whose sale the manager revoked; bounded by the number of open orders.
    revoked: HashMap<OrderId, Listed>,
}

/// Was all of the manager's list of sales taken back looked through for the order?
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Listed {
    #[default]
    FromWhereItWas,
    FromTheStart,
}

#[derive(Clone)]
struct Waiting {
    failures: u32,
    until: Instant,
    why: String,
}

/// Why an order could not be stored or found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OrderError {
    #[error("the idempotency key was used before with another request")]
    KeyConflict,
    #[error("{0} orders are unfinished already; try again later")]
    TooManyOpen(u64),
    #[error("this shop keeps {0} orders and takes no more")]
    Full(u64),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why an order was not refunded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RefundError {
    #[error("there is no order {0}")]
    Unknown(OrderId),
    #[error("the order is {}: only a released order can be refunded", .0.as_str())]
    Stage(Stage),
    #[error("the refund goes on by itself; it waits: {0}")]
    Waits(String),
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the order waits, if it does.
    pub(crate) fn why(&self, id: &OrderId) -> Option<String> {
        self.state().waiting.get(id).map(|waiting| waiting.why.clone())
    }

    /// How many orders wait, and why that one does which was tried most often.
    pub(crate) fn waiting(&self) -> (usize, Option<String>) {
        let state = self.state();
        let longest = state.waiting.values().max_by_key(|waiting| waiting.failures);
        (state.waiting.len(), longest.map(|waiting| waiting.why.clone()))
    }

    pub(crate) fn note(&self, id: OrderId, why: String) {
        let until = Instant::now();
        self.state().waiting.insert(id, Waiting { failures: 0, until, why });
    }

    /// Whether the order may be tried again now.
    pub(crate) fn is_due(&self, id: &OrderId) -> bool {
        let state = self.state();
        !state.active.contains_key(id) && state.waiting.get(id).is_none_or(|w| w.until <= Instant::now())
    }

    /// The manager is back: all may be tried now.
    pub(crate) fn all_due(&self) {
        let now = Instant::now();
        self.state().waiting.values_mut().for_each(|waiting| waiting.until = now);
    }

    /// The manager revoked its sale: what becomes of the payment, its list of sales taken back says.
    pub(crate) fn was_revoked(&self, id: OrderId) {
        self.state().revoked.entry(id).or_default();
    }

    /// Those of which that was said.
    pub(crate) fn revoked(&self) -> Vec<(OrderId, Listed)> {
        self.state().revoked.iter().map(|(id, listed)| (*id, *listed)).collect()
    }

    /// Notes how far it was looked for; `None` where it waits for that no more.
    pub(crate) fn listed(&self, id: &OrderId, listed: Option<Listed>) {
        let mut state = self.state();
        match listed {
            Some(listed) => state.revoked.insert(*id, listed),
            None => state.revoked.remove(id),
        };
    }

    fn wait(&self, id: OrderId, why: String, min: u64, max: u64) {
        let mut state = self.state();
        let failures = state.waiting.get(&id).map_or(0, |w| w.failures.saturating_add(1));
        let until = Instant::now() + back_off(failures, min, max);
        state.waiting.insert(id, Waiting { failures, until, why });
    }
}

/// Takes the order out of hand however its task ends, and tells those who wait.
struct InHand {
    shop: Arc<Shop>,
    id: OrderId,
    done: watch::Sender<bool>,
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.shop.desk.state().active.remove(&self.id);
        self.done.send_replace(true);
    }
}

impl Shop {
    pub(crate) fn order(&self, id: &OrderId) -> Result<Option<Order>, StoreError> {
        self.db.read(|txn| ORDERS.get(txn, id))
    }

    pub(crate) fn ticket(&self, id: &OrderId) -> Result<Option<TicketEnvelope>, StoreError> {
        self.db.read(|txn| TICKETS.get(txn, id))
    }

    pub(crate) fn key(&self, key: &str) -> Result<Option<KeyRecord>, StoreError> {
        self.db.read(|txn| KEYS.get(txn, key))
    }

    /// The newest orders.
    pub(crate) fn newest(&self, limit: usize) -> Result<Vec<Order>, StoreError> {
        self.db.read(|txn| {
            let ids = BY_TIME.range_back(txn, .., limit)?;
            let orders = ids.into_iter().map(|((_, id), _)| ORDERS.get(txn, &id));
            orders.filter_map(Result::transpose).collect()
        })
    }

    /// Orders in all, and open ones.
    pub(crate) fn order_counts(&self) -> Result<(u64, u64), StoreError> {
        self.db.read(|txn| Ok((ORDERS.len(txn)?, OPEN.len(txn)?)))
    }

    /// Stores a new order under its idempotency key, unless there is one: gives the order that is under the key now.
    pub(crate) async fn place(&self, order: Order, record: KeyRecord) -> Result<OrderId, OrderError> {
        let (max_open, max) = (self.config.max_open_orders, self.config.max_orders);
        self.db
            .write_step(Step::MerchantOrder, move |txn| {
                if let Some(there) = KEYS.get(txn, &order.key)? {
                    let same = there.request == record.request;
                    return if same { Ok(there.order) } else { Err(OrderError::KeyConflict) };
                }
                if OPEN.len(txn)? >= max_open {
                    return Err(OrderError::TooManyOpen(max_open));
                }
                if ORDERS.len(txn)? >= max {
                    return Err(OrderError::Full(max));
                }
                KEYS.put(txn, &order.key, &record)?;
                put_order(txn, &order)?;
                Ok(order.id)
            })
            .await
    }

    /// Sees to it that a task drives the order; the receiver turns true when that task has done what it could.
    pub(crate) fn drive(self: &Arc<Self>, id: OrderId) -> watch::Receiver<bool> {
        let (done, receiver) = {
            let mut state = self.desk.state();
            if let Some(active) = state.active.get(&id) {
                return active.clone();
            }
            let (done, receiver) = watch::channel(false);
            state.active.insert(id, receiver.clone());
            (done, receiver)
        };
        let in_hand = InHand { shop: Arc::clone(self), id, done };
        let token = self.supervisor.token();
        self.supervisor.spawn(
            "order",
            Box::pin(async move {
                let shop = &in_hand.shop;
                tokio::select! {
                    result = shop.drive_on(id) => if let Err(error) = result {
                        tracing::error!(order = %id, %error, "order not driven");
                        shop.desk.wait(id, error.to_string(), shop.config.retry_min_ms, shop.config.retry_max_ms);
                    },
                    () = token.cancelled() => {}
                }
            }),
        );
        receiver
    }

    async fn drive_on(&self, id: OrderId) -> Result<(), StoreError> {
        while let Some(order) = self.order(&id)? {
            let before = order.stage;
            if before.is_final() || before == Stage::AwaitingCompletion {
                return Ok(());
            }
            match self.advance(order).await {
                Ok(next) => {
                    let stage = next.order.stage;
                    if self.save(before, next.order, next.ticket).await? {
                        tracing::debug!(order = %id, from = before.as_str(), to = stage.as_str(), "order moved");
                        let refund_refused = before == Stage::Refunding && stage != Stage::Voiding;
                        if !refund_refused {
                            self.desk.state().waiting.remove(&id);
                        }
                        if stage.is_final() {
                            self.counts.orders.inc([stage.as_str()]);
                        }
                    }
                }
                Err(pause) => {
                    tracing::info!(order = %id, stage = before.as_str(), why = %pause, "order waits");
                    self.desk.wait(id, pause.0, self.config.retry_min_ms, self.config.retry_max_ms);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Stores a moved order, unless somebody else moved it since it was read at stage `before`.
    pub(crate) async fn save(
        &self,
        before: Stage,
        mut order: Order,
        ticket: Option<Box<TicketEnvelope>>,
    ) -> Result<bool, StoreError> {
        order.updated_at = now_ms();
        self.db
            .write_step(order.stage.step(), move |txn| {
                if ORDERS.get(txn, &order.id)?.is_none_or(|there| there.stage != before) {
                    return Ok(false);
                }
                if let Some(ticket) = &ticket {
                    TICKETS.put(txn, &order.id, ticket)?;
                }
                put_order(txn, &order)?;
                Ok(true)
            })
            .await
    }

    /// Takes a released sale back: revoked at the manager, money returned. Repeating it is harmless.
    pub(crate) async fn refund(self: &Arc<Self>, id: OrderId) -> Result<Order, RefundError> {
        // Again where the order moved meanwhile; it has few stages.
        loop {
            let mut order = self.order(&id)?.ok_or(RefundError::Unknown(id))?;
            match order.stage {
                Stage::Refunded => return Ok(order),
                Stage::Released | Stage::AwaitingCompletion | Stage::Completed | Stage::Done => {
                    let before = order.stage;
                    order.before_refund = Some(before);
                    order.ends_as = Some(Stage::Refunded);
                    order.stage = Stage::Refunding;
                    if self.save(before, order, None).await? {
                        break;
                    }
                }
                Stage::Refunding | Stage::Voiding => break,
                stage => return Err(RefundError::Stage(stage)),
            }
        }
        let mut driven = self.drive(id);
        let limit = Duration::from_millis(self.config.answer_ms);
        // Whether it ended or not, the order says how far it is.
        let _ = tokio::time::timeout(limit, driven.wait_for(|done| *done)).await;
        let order = self.order(&id)?.ok_or(RefundError::Unknown(id))?;
        let why = || self.desk.why(&id).unwrap_or_else(|| "the manager is being asked".to_owned());
        match order.stage {
            Stage::Refunded => Ok(order),
            Stage::Refunding | Stage::Voiding => Err(RefundError::Waits(why())),
            stage if stage.is_failed() => Err(RefundError::Stage(stage)),
            _ => Err(RefundError::Refused(why())),
        }
    }

    /// What the manager says of a delivery whose payment waits for its completion.
    pub(crate) async fn completed(
        self: &Arc<Self>,
        mut order: Order,
        outcome: Result<(), (Stage, Failure)>,
    ) -> Result<(), StoreError> {
        let id = order.id;
        match outcome {
            Ok(()) => order.stage = Stage::Completed,
            Err((end, failure)) => order = order.failing(end, failure),
        }
        if self.save(Stage::AwaitingCompletion, order, None).await? {
            self.drive(id);
        }
        Ok(())
    }
}
