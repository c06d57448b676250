//! The content manager and its origin seeder in one process, so that a product is deliverable the moment it is
//! published. The origin is a seeder like any other, with a key of its own; this crate only starts and stops the two
//! together, because roles do not know each other.

use std::path::Path;
use std::time::Duration;

use protocol::Address;

/// A manager and its origin, running.
pub struct Running {
    manager: manager_node::Running,
    origin: seeder::Running,
}

/// Why they did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The manager's configuration.
    #[error(transparent)]
    Config(#[from] manager_node::ConfigError),
    /// The manager.
    #[error(transparent)]
    Manager(#[from] manager_node::StartError),
    /// The origin's invitation.
    #[error("the origin seeder could not be invited: {0}")]
    Invitation(String),
    /// The origin's folder.
    #[error("the origin seeder: {0}")]
    OriginInit(#[from] seeder::InitError),
    /// The origin's configuration.
    #[error("the origin seeder: {0}")]
    OriginConfig(#[from] seeder::ConfigError),
    /// The origin.
    #[error("the origin seeder: {0}")]
    Origin(#[from] seeder::StartError),
}

/// Starts the manager of `dir`, then its origin.
///
/// # Errors
/// [`StartError`].
pub async fn start(dir: &Path) -> Result<Running, StartError> {
    let config = manager_node::Config::load(dir)?;
    let origin_dir = config.origin_path(dir);
    let listen = config.listen.clone();
    let manager = Box::pin(manager_node::start(dir, config)).await?;
    let origin = match start_origin(&manager, &origin_dir, &listen).await {
        Ok(origin) => origin,
        Err(error) => {
            // The start's error is what counts.
            let _ = manager.stop(Duration::from_secs(5)).await;
            return Err(error);
        }
    };
    Ok(Running { manager, origin })
}

async fn start_origin(
    manager: &manager_node::Running,
    dir: &Path,
    listen: &[Address],
) -> Result<seeder::Running, StartError> {
    let invitation =
        || async { manager.origin_invitation().await.map_err(|error| StartError::Invitation(error.to_string())) };
    let config = match seeder::Config::load(dir) {
        // The manager may listen elsewhere since: its line is made anew at each start.
        Ok(config) => seeder::Config { join: invitation().await?.to_string(), ..config },
        Err(seeder::ConfigError::Missing { .. }) => {
            let mut config = seeder::Config::origin(&invitation().await?, Path::new("content"));
            config.listen = listen.iter().map(beside).collect();
            seeder::init_with(dir, &config)?;
            config
        }
        Err(error) => return Err(error.into()),
    };
    let origin = Box::pin(seeder::start_sharing(dir, config, manager.origin_content())).await?;
    match manager.set_origin(origin.peer_id()).await {
        Ok(()) => Ok(origin),
        Err(error) => Err(StartError::Invitation(error.to_string())),
    }
}

/// The origin listens where the manager does, ten ports further up; port 0 stays the system's choice.
fn beside(address: &Address) -> Address {
    let parts: Vec<String> = address
        .as_str()
        .split('/')
        .scan("", |before, part| {
            let port = matches!(*before, "tcp" | "udp").then(|| part.parse::<u16>().ok()).flatten();
            *before = part;
            Some(match port {
                Some(0) | None => part.to_owned(),
                Some(port) => port.saturating_add(10).to_string(),
            })
        })
        .collect();
    Address::new(&parts.join("/")).unwrap_or_else(|_| address.clone())
}

impl Running {
    /// The manager.
    pub fn manager(&self) -> &manager_node::Running {
        &self.manager
    }

    /// The origin.
    pub fn origin(&self) -> &seeder::Running {
        &self.origin
    }

    /// Waits until one of the two fails, and says why.
    pub async fn failed(&self) -> String {
        tokio::select! {
            reason = self.manager.failed() => reason,
            reason = self.origin.failed() => format!("the origin seeder: {reason}"),
        }
    }

    /// Stops the origin, which may still hand over receipts, then the manager.
    ///
    /// # Errors
    /// What did not stop in time, by name.
    pub async fn stop(self, deadline: Duration) -> Result<(), StopError> {
        let origin = self.origin.stop(deadline).await.map_err(|e| StopError(format!("the origin seeder: {e}")));
        let manager = self.manager.stop(deadline).await.map_err(|e| StopError(e.to_string()));
        origin.and(manager)
    }
}

/// Something did not stop in time.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StopError(String);

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_origin_listens_beside_the_manager() {
        for (manager, origin) in [
            ("/ip4/0.0.0.0/tcp/4601", "/ip4/0.0.0.0/tcp/4611"),
            ("/ip4/0.0.0.0/udp/4601/quic-v1", "/ip4/0.0.0.0/udp/4611/quic-v1"),
            ("/ip6/::1/tcp/0", "/ip6/::1/tcp/0"),
        ] {
            assert_eq!(beside(&Address::new(manager).unwrap()).as_str(), origin);
        }
    }
}
