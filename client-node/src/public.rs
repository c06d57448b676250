//! What is public of a network and signed by its keys may come from anybody: from a manager where one answers, otherwise
//! from seeders, of which several are asked, because one alone may be behind or hold something back.

use std::time::Duration;

use futures::StreamExt;
use protocol::PeerAddrs;
use protocol::api::{MeshRequest, MeshResponse};
use tokio::time::Instant;

use crate::link::{Link, MESH, ManagerError};

/// Seeders that are asked one question at the same time: the next when one of them answers or is given up.
const MOST_ASKED: usize = 8;
/// A manager that has not answered by then may be away: seeders are asked beside it.
const HEAD_START: Duration = Duration::from_millis(500);
/// For one seeder.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Once one answered, the others have this long to know something newer.
const SECOND_LOOK: Duration = Duration::from_millis(300);

impl Link {
    /// Asks for what is public. `rank` judges an answer of a seeder: `None` for what does not verify, more for what is
    /// newer.
    pub(crate) async fn public(
        &self,
        request: &MeshRequest,
        rank: impl Fn(&MeshResponse) -> Option<u64>,
    ) -> Result<MeshResponse, ManagerError> {
        let mut manager = std::pin::pin!(self.mesh(request));
        let head_start = tokio::time::timeout(HEAD_START, &mut manager).await;
        let seeders = self.newest_of_seeders(request, &rank);
        match head_start {
            Ok(Err(away @ ManagerError::Away { .. })) => seeders.await.ok_or(away),
            Ok(answered) => answered,
            Err(_) => {
                let mut seeders = std::pin::pin!(seeders);
                tokio::select! {
                    answered = &mut manager => match answered {
                        Err(away @ ManagerError::Away { .. }) => seeders.await.ok_or(away),
                        answered => answered,
                    },
                    found = &mut seeders => match found {
                        Some(found) => Ok(found),
                        None => manager.await,
                    },
                }
            }
        }
    }

    /// The best that seeders answer; `None` when none of them does.
    async fn newest_of_seeders(
        &self,
        request: &MeshRequest,
        rank: &impl Fn(&MeshResponse) -> Option<u64>,
    ) -> Option<MeshResponse> {
        let ask = |seeder: PeerAddrs| async move {
            let answered = self.node().call::<_, MeshResponse>(&seeder, MESH, request, CALL_TIMEOUT).await;
            (seeder.peer, answered)
        };
        let seeders = futures::stream::iter(self.seeders().to_vec());
        let mut asked = std::pin::pin!(seeders.map(ask).buffer_unordered(MOST_ASKED));
        let mut best: Option<(u64, MeshResponse)> = None;
        let mut end: Option<Instant> = None;
        loop {
            let next = match end {
                None => asked.next().await,
                Some(end) => tokio::time::timeout_at(end, asked.next()).await.ok().flatten(),
            };
            let Some((seeder, answered)) = next else { return best.map(|(_, response)| response) };
            let ranked = match answered {
                Ok(response) => rank(&response).map(|rank| (rank, response)),
                Err(error) => {
                    tracing::debug!(%seeder, %error, "not asked for what is public");
                    None
                }
            };
            if let Some((rank, response)) = ranked {
                end.get_or_insert_with(|| Instant::now() + SECOND_LOOK);
                if best.as_ref().is_none_or(|(known, _)| rank > *known) {
                    best = Some((rank, response));
                }
            }
        }
    }
}
