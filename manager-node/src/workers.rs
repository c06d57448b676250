//! Short work that takes a processor and no disk to wait for, such as signatures, from many callers at once. A thread for
//! each would have them wake and wait for one another more than they work: a few take one piece after the other.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;

use protocol::Refusal;
use tokio::sync::oneshot;

use crate::context::Context;
use crate::transactions::{SaleError, internal};

type Piece = Box<dyn FnOnce(&Context) + Send>;

/// Work that waits, and who works.
pub(crate) struct Workers {
    /// Most who work at once.
    most: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Piece>,
    working: usize,
}

impl Workers {
    /// Twice as many as processors, which the system takes longer to count than a piece of work takes: a look-up may
    /// have to wait for the disk after all.
    pub(crate) fn new() -> Self {
        let most = available_parallelism().map_or(2, |processors| 2 * processors.get());
        Workers { most, state: Mutex::default() }
    }

    /// Puts a piece of work into the queue; true when whoever puts it is to start one more worker.
    fn put(&self, piece: Piece) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.push_back(piece);
        let more = state.working < self.most;
        state.working += usize::from(more);
        more
    }

    /// The next piece; a worker that gets none is one no more.
    fn next(&self) -> Option<Piece> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = state.waiting.pop_front();
        state.working -= usize::from(piece.is_none());
        piece
    }
}

/// Runs `work` when one of the workers comes to it; it must not wait for a write.
pub(crate) async fn run<R: Send + 'static>(
    ctx: &Arc<Context>,
    work: impl FnOnce(&Context) -> Result<R, SaleError> + Send + 'static,
) -> Result<R, Refusal> {
    let (reply, answer) = oneshot::channel();
    let piece = move |ctx: &Context| {
        // A caller that stopped waiting needs no answer.
        let _ = reply.send(work(ctx));
    };
    if ctx.workers.put(Box::new(piece)) {
        let ctx = Arc::clone(ctx);
        tokio::task::spawn_blocking(move || {
            while let Some(piece) = ctx.workers.next() {
                // It takes its reply with it, and the worker goes on to the next.
                let _ = catch_unwind(AssertUnwindSafe(|| piece(&ctx)));
            }
        });
    }
    match answer.await {
        Ok(result) => result.map_err(SaleError::into_refusal),
        Err(_) => Err(internal(&"a piece of work panicked")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::sales::tests::shop::{Shop, Terms};

    #[tokio::test]
    async fn many_pieces_are_all_answered_and_one_that_panics_fails_alone() {
        let shop = Shop::open(Terms::default()).await;
        let pieces = (0..200_u32).map(|n| {
            run(&shop.ctx, move |_| match n % 50 {
                7 => panic!("as the test wants it"),
                _ => Ok(n),
            })
        });
        let answers = futures::future::join_all(pieces).await;
        for (n, answer) in (0..).zip(answers) {
            match answer {
                Ok(found) => assert_eq!(found, n),
                Err(refusal) => assert_eq!((n % 50, refusal.code.as_str()), (7, "internal")),
            }
        }
        // As many may work as before.
        let state = || shop.ctx.workers.state.lock().unwrap().working;
        while state() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(run(&shop.ctx, |_| Ok(1)).await.unwrap(), 1);
        shop.close().await;
    }
}
