//! Waiting for the thing itself: tests neither guess how long something takes nor hang when it never happens.

use std::time::Duration;

use tokio::time::Instant;

/// How long a network on one loaded machine may take for anything that it does by itself.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks: short beside anything that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// Something did not happen in its time.
#[derive(Debug, thiserror::Error)]
#[error("{what} did not happen within {} s", limit.as_secs())]
pub struct Late {
    /// What was waited for.
    pub what: String,
    /// How long.
    pub limit: Duration,
}

/// Looks again and again until `look` finds something.
///
/// # Errors
/// [`Late`] after [`LIMIT`].
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, look: impl FnMut() -> F) -> Result<T, Late> {
    until_within(what, LIMIT, look).await
}

pub(crate) async fn until_within<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> F,
) -> Result<T, Late> {
    let end = Instant::now() + limit;
    let mut tick = tokio::time::interval(LOOK_EVERY);
    loop {
        tick.tick().await;
        let late = || Late { what: what.to_owned(), limit };
        if let Some(found) = tokio::time::timeout_at(end, look()).await.map_err(|_| late())? {
            return Ok(found);
        }
        if Instant::now() >= end {
            return Err(late());
        }
    }
}
